"""Sets of images from every container, and each kind that is refused."""

import io
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from maskdm_jax.data import writer
from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import frechet, reference


def pixels(seed, height=6, width=8, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def png(image):
    out = io.BytesIO()
    Image.fromarray(image.squeeze()).save(out, "PNG")
    return out.getvalue()


def write_folder(root, images, suffix=".png"):
    for i, image in enumerate(images):
        path = root / f"class{i % 2}" / f"{i:03d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return str(root)


def read_all(opened, size=2):
    return list(opened.batches(size))


def content_hash(opened):
    content = reference.ContentHash()
    for batch in opened.batches(3):
        content.add(batch)
    return content.hexdigest()


def refused(path, *parts, num=None):
    with pytest.raises(ConfigError) as error:
        opened = reference.open_set(str(path), "--images", num)
        read_all(opened)
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.fixture
def containers(tmp_path):
    """The same five images as a folder, inside a zip, and as a prepared set."""
    images = [pixels(i) for i in range(5)]
    folder = write_folder(tmp_path / "in", images)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("__MACOSX/test/._a.png", b"not an image")
        archive.writestr("train/all/0.png", png(pixels(9)))
        for i, image in enumerate(images):
            archive.writestr(f"test/all/{i}.png", png(image))
    records = [(png(image), "all", f"{i}") for i, image in enumerate(images)]
    for name, splits in (
        ("faces", {"train": records[:2], "test": records}),
        ("one", {"train": records}),
    ):
        writer.write(
            name,
            tmp_path / "tfds",
            splits,
            num_examples=5,
            image_shape=(6, 8, 3),
            classes=["all"],
            description="",
        )
    return folder, str(tmp_path / "in.zip/test"), str(tmp_path / "tfds/faces/test")


def test_folder_zip_and_prepared_set_of_the_same_images_are_the_same_set(containers):
    hashes = set()
    for path in containers:
        opened = reference.open_set(path, "--images")
        assert opened.count == 5 and opened.shape == (6, 8, 3)
        hashes.add(content_hash(opened))
    assert len(hashes) == 1


def test_a_prepared_set_needs_no_split_if_it_has_one(containers, tmp_path):
    opened = reference.open_set(str(tmp_path / "tfds/one"), "--images")
    assert opened.count == 5 and (opened.read(3) == pixels(3)).all()
    refused(tmp_path / "tfds/one/test", "no split 'test'", "type", "one/train")
    refused(tmp_path / "tfds/faces", "several splits; it has test, train", "faces/test")
    assert reference.open_set(str(tmp_path / "tfds/faces/train"), "--images").count == 2


def test_batches_hold_every_image_in_the_order_of_the_names(tmp_path):
    images = [pixels(i) for i in range(7)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    batches = read_all(reference.open_set(str(tmp_path), "--images"), size=3)
    assert [len(b) for b in batches] == [3, 3, 1]
    assert (np.concatenate(batches) == images).all()
    first = reference.open_set(str(tmp_path), "--images", num=4)
    assert (np.concatenate(read_all(first)) == images[:4]).all()


def test_numbers_without_zeros_are_read_in_counting_order(tmp_path):
    for i in range(11):
        Image.fromarray(pixels(i)).save(tmp_path / f"{i}.png")
    (images,) = read_all(reference.open_set(str(tmp_path), "--images", num=3), 3)
    assert (images[2] == pixels(2)).all()


def test_the_hash_sees_pixels_shapes_and_copies_but_no_order():
    a, b = pixels(0)[None], pixels(1)[None]

    def digest(*parts):
        content = reference.ContentHash()
        for part in parts:
            content.add(part)
        return content.hexdigest()

    assert digest(a, b) == digest(b, a) == digest(np.concatenate([a, b]))
    changed = a.copy()
    changed[0, 0, 0, 0] ^= 1
    others = [digest(a), digest(a, a), digest(changed, b), digest(a.reshape(1, 8, 6, 3), b)]
    assert len({digest(a, b), *others}) == 5


def test_grey_palette_and_alpha_are_read_as_pytorch_fid_reads_them(tmp_path):
    colour = Image.fromarray(pixels(0))
    colour.save(tmp_path / "a.png")
    colour.convert("P").save(tmp_path / "b.png")
    colour.convert("L").save(tmp_path / "c.png")
    colour.convert("RGBA").save(tmp_path / "d.png")
    (images,) = read_all(reference.open_set(str(tmp_path), "--images"), 4)
    for image, name in zip(images, "abcd", strict=True):
        assert (image == np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))).all()


def test_a_set_of_grey_images_has_one_channel(tmp_path):
    path = write_folder(tmp_path, [pixels(i, channels=1) for i in range(2)])
    opened = reference.open_set(path, "--images")
    assert opened.shape == (6, 8, 1) and (opened.read(0) == pixels(0, channels=1)).all()


def test_other_files_are_left_out_and_named(tmp_path, capsys):
    path = write_folder(tmp_path, [pixels(0), pixels(1)])
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    assert reference.open_set(path, "--images").count == 2
    left_out = capsys.readouterr().err
    assert "left out hidden" in left_out and "text: 1 (notes.txt)" in left_out


def test_the_grid_beside_drawn_samples_is_left_out(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i:06d}.png").write_bytes(png(pixels(i)))
    (tmp_path / "grid.png").write_bytes(png(pixels(0, 50, 50)))
    refused(tmp_path, "different sizes", "6x8", "grid.png is 50x50")
    (tmp_path / "settings.json").write_text("{}")
    assert reference.open_set(str(tmp_path), "--images").count == 3
    assert "grids of samples: 1 (grid.png)" in capsys.readouterr().err
    zipped = shutil.make_archive(str(tmp_path), "zip", tmp_path)
    assert reference.open_set(zipped, "--images").count == 3
    assert "grids of samples: 1" in capsys.readouterr().err


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    refused(tmp_path / "no", "is no set; expected a folder or zip")
    write_folder(tmp_path / "in", [pixels(0)])
    refused(tmp_path / "in/class0/deeper", "is no set")
    refused("gs://bucket/images", "buckets")


def test_an_empty_folder_and_an_empty_part_of_a_zip_are_refused(tmp_path, containers):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images; expected JPEG, PNG")
    refused(tmp_path / "in.zip/val", "holds no images")


def test_text_named_jpg_is_refused_by_name(tmp_path):
    path = write_folder(tmp_path, [pixels(0), pixels(1)])
    (tmp_path / "text.jpg").write_text("not an image")
    refused(path, "text.jpg cannot be read: cannot identify image file; ", "remove it")


def test_a_damaged_image_is_refused_by_name(tmp_path):
    path = write_folder(tmp_path, [pixels(0, 40, 40), pixels(1, 40, 40)])
    whole = (tmp_path / "class0/000.png").read_bytes()
    (tmp_path / "class0/000.png").write_bytes(whole[: len(whole) // 2])
    refused(path, "class0/000.png cannot be read", "repair it")


def test_a_set_of_one_image_is_refused(tmp_path):
    refused(write_folder(tmp_path, [pixels(0)]), "has one image; expected at least 2")


def test_images_of_different_sizes_are_refused_with_both(tmp_path):
    path = write_folder(tmp_path, [pixels(0), pixels(1), pixels(2, 8, 6)])
    refused(path, "class0/000.png is 6x8", "class0/002.png is 8x6", "--size 6x8")


def test_a_wrong_number_of_images_is_refused(tmp_path):
    path = write_folder(tmp_path, [pixels(0), pixels(1)])
    refused(path, "--num is 3", "has 2 images; type --num 2", num=3)
    refused(path, "--num is 1; expected at least 2", num=1)


def test_sets_of_different_size_or_colour_are_refused(tmp_path):
    small, large, grey = (
        reference.open_set(write_folder(tmp_path / name, [x, x]), "--images")
        for name, x in (
            ("small", pixels(0)),
            ("large", pixels(0, 12, 16)),
            ("grey", pixels(0, channels=1)),
        )
    )
    reference.check_comparable(small, small)
    with pytest.raises(ConfigError, match="6x8.* 12x16 .*--size 6x8"):
        reference.check_comparable(small, large)
    with pytest.raises(ConfigError, match="is colour, but .* is grey; .*--channels 3"):
        reference.check_comparable(small, grey)
    odd = reference.Images("the samples", (6, 8, 4), 2, None)
    with pytest.raises(ConfigError, match="is of 4 channels, but .* type a set of 4 channels"):
        reference.check_comparable(odd, grey)


def test_an_npz_is_read_as_statistics(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    opened = reference.open_set(str(tmp_path / "stats.npz"), "--reference")
    assert isinstance(opened, frechet.Statistics) and len(opened.mu_D) == 4


def test_a_zip_is_read_as_for_training(tmp_path):
    """Of a folder, with an image without a suffix; a name that stands twice is refused."""
    path = tmp_path / "faces.zip"
    data = io.BytesIO()
    Image.fromarray(pixels(0, 8, 8)).save(data, "PNG")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("faces/train/10.png", "faces/train/2", "faces/test/1.png", "faces/test/2.png"):
            archive.writestr(name, data.getvalue())
    assert reference.open_set(f"{path}/train", "--images").count == 2
    assert reference.open_set(f"{path}/faces/train", "--images").count == 2
    assert reference.open_set(str(path), "--images").count == 4
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("faces/test/2.png", data.getvalue())
    with pytest.raises(ConfigError, match="holds faces/test/2.png twice"):
        reference.open_set(str(path), "--images")
