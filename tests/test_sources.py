"""Readers of data sets, crops and fractions. The loader's tests are in test_loader.py."""

import hashlib
import io
import pathlib
import shutil
import sys
import zipfile

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from configs import pretrain_digits
from maskdm_jax import sharding
from maskdm_jax.config import default_config
from maskdm_jax.data import archives, encode, loader, pixels, prepare, sources, toy
from maskdm_jax.errors import ConfigError, RunError


def picture(height=8, width=8, seed=0, mode="RGB"):
    channels = {"RGB": 3, "L": 1}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def encoded(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def config_of(tmp_path, name, **fields):
    config = default_config()
    config.data.name, config.data.dir, config.data.image_size = str(name), str(tmp_path), (8, 8)
    config.update_from_flattened_dict({f"data.{key}": value for key, value in fields.items()})
    return config


def opened(tmp_path, name, **fields):
    return sources.open_source(config_of(tmp_path, name, **fields))


def refusal(tmp_path, name, **fields):
    with pytest.raises(ConfigError) as error:
        source = opened(tmp_path, name, **fields)
        [source[i] for i in range(len(source))]
    assert "\n" not in str(error.value)
    return str(error.value)


def images(source):
    return [source[i]["image"].tobytes() for i in range(len(source))]


NAMES = [f"train/2/{i}.png" for i in range(9)] + [f"train/10/{i}.png" for i in range(4)]
NAMES += [f"val/10/{i}.png" for i in range(3)]
FOLDER = {name: encoded(picture(seed=seed)) for seed, name in enumerate(NAMES)}


# -------------------------------------------------------------------------------------------- zips


def test_a_zip_reads_as_the_prepared_folder_of_the_same_images(tmp_path):
    for name, data in FOLDER.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    prepare.prepare(tmp_path / "in", "faces", (8, 8), data_dir=tmp_path, num_processes=1)
    reverse = dict(reversed(FOLDER.items()))
    write_zip(tmp_path / "a.zip", reverse)
    write_zip(tmp_path / "b.zip", {f"top/{name}": data for name, data in reverse.items()})
    for split, fraction in (("train", 1.0), ("train", 0.3), ("validation", 1.0)):
        expected = opened(tmp_path, "faces", split=split, fraction=fraction)
        for name in ("a.zip", tmp_path / "b.zip"):
            source = opened(tmp_path, name, split=split, fraction=fraction)
            assert images(source) == images(expected)
            assert [source[i]["label"] for i in range(len(source))] == [
                expected[i]["label"] for i in range(len(expected))
            ]
            assert source.num_classes == 2
    assert [int(opened(tmp_path, "a.zip")[i]["label"]) for i in (0, 8, 9)] == [0, 0, 1]


def test_what_a_zip_leaves_out_is_named(tmp_path, capsys):
    members = {"a.png": encoded(picture()), "__MACOSX/._a.png": b"\0", "notes.txt": b"hello"}
    write_zip(tmp_path / "a.zip", members)
    assert len(opened(tmp_path, "a.zip")) == 1
    assert "text: 1 (notes.txt)" in capsys.readouterr().err
    write_zip(tmp_path / "a.zip", members | {"raw.cr2": b"\0\1"})
    assert "more than 1 % of the zip file" in refusal(tmp_path, "a.zip")


def test_a_zip_of_one_image_is_a_data_set(tmp_path):
    image = picture()
    write_zip(tmp_path / "a.zip", {"a.png": encoded(image)})
    source = opened(tmp_path, "a.zip")
    assert len(source) == 1 and source.fingerprint
    np.testing.assert_array_equal(source[0]["image"], np.asarray(image))


def test_bad_zips_are_one_sentence(tmp_path):
    assert "which is no file; expected a .zip" in refusal(tmp_path, "a.zip")
    assert refusal(tmp_path, "gs://bucket/zips/a.zip").endswith(
        "type --config.data.dir=gs://bucket/zips --config.data.name=a.zip"
    )
    write_zip(tmp_path / "a.zip", {})
    assert "holds no images; expected" in refusal(tmp_path, "a.zip")
    write_zip(tmp_path / "a.zip", {"a.txt": b"hello"})
    assert "holds no images but text: 1 (a.txt)" in refusal(tmp_path, "a.zip")
    (tmp_path / "a.zip").write_bytes(b"")
    assert "cannot be read" in refusal(tmp_path, "a.zip")

    write_zip(tmp_path / "a.zip", FOLDER)
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[: len(whole) // 2])  # its directory is at the end
    assert "cannot be read: File is not a zip file; copy or make it again" in refusal(
        tmp_path, "a.zip"
    )
    at = whole.index(b"PK\1\2") + 8  # the flags of the first member
    (tmp_path / "a.zip").write_bytes(whole[:at] + bytes([whole[at] | 1]) + whole[at + 1 :])
    assert "is encrypted; expected one without a password" in refusal(tmp_path, "a.zip")
    at = whole.index(FOLDER["train/2/4.png"]) + 60
    (tmp_path / "a.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert "train/2/4.png of" in refusal(tmp_path, "a.zip")

    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encoded(picture()))
        archive.writestr("a.png", encoded(picture(seed=1)))
    assert "holds a.png twice" in refusal(tmp_path, "a.zip")
    write_zip(tmp_path / "a.zip", {"cat/a.png": encoded(picture()), "b.png": encoded(picture())})
    assert f"data.name {tmp_path}/a.zip holds images beside" in refusal(tmp_path, "a.zip")


def test_text_named_jpg_is_named_wherever_it_is(tmp_path):
    members = {f"{i:03d}.jpg": encoded(picture(seed=i), "JPEG") for i in range(200)}
    for bad in ("000.jpg", "100.jpg"):  # among the images looked at first, and not
        write_zip(tmp_path / "a.zip", members | {bad: b"hello"})
        text = refusal(tmp_path, "a.zip")
        assert (
            f"{bad} of {tmp_path}/a.zip cannot be read: cannot identify image file; repair" in text
        )
        assert "repair or remove it" in text


def test_grey_and_colour_are_not_mixed_up(tmp_path):
    write_zip(tmp_path / "grey.zip", {f"{i}.png": encoded(picture(mode="L")) for i in range(3)})
    write_zip(
        tmp_path / "colour.zip", {"a.png": encoded(picture()), "b.png": FOLDER["val/10/0.png"]}
    )
    assert "--config.data.channels=1" in refusal(tmp_path, "grey.zip")
    assert "--config.data.channels=3" in refusal(tmp_path, "colour.zip", channels=1)
    for crop in ("none", "center"):
        assert opened(tmp_path, "grey.zip", channels=1, crop=crop)[0]["image"].shape == (8, 8, 1)
    assert "--config.data.channels=1" in refusal(tmp_path, "grey.zip", crop="center")
    # A grey photograph among colours is no mistake.
    write_zip(
        tmp_path / "both.zip", {"a.png": encoded(picture(mode="L")), "b.png": encoded(picture())}
    )
    assert opened(tmp_path, "both.zip")[0]["image"].shape == (8, 8, 3)


# ------------------------------------------------------------------------------------------- crops


def test_the_central_crop_starts_at_a_whole_pixel_and_resizes_only_if_it_must():
    image = picture(11, 24)
    for size in ((11, 11), (11, 24)):
        cut = np.asarray(pixels.cropped(image, "center", size))
        left = (24 - size[1]) // 2
        np.testing.assert_array_equal(cut, np.asarray(image)[:, left : left + size[1]])
    half = np.asarray(pixels.cropped(image, "center", (6, 12)))  # columns 1 to 22
    box = (1, 0, 23, 11)
    np.testing.assert_array_equal(
        half, np.asarray(image.crop(box).resize((12, 6), Image.Resampling.LANCZOS))
    )


@pytest.mark.parametrize("size", [(10, 25), (25, 10), (23, 31), (20, 1)])
def test_prepare_and_the_central_crop_give_the_same_pixels(tmp_path, size):
    (tmp_path / "a.png").write_bytes(encoded(picture(32, 32).crop((0, 0, *size))))
    stored = encode.encode(tmp_path / "a.png", encode.Target((24, 8))).data
    read = pixels.decode((tmp_path / "a.png").read_bytes(), 3, "center", (24, 8))
    np.testing.assert_array_equal(pixels.decode(stored, 3), read)


def test_the_crop_of_celeba_is_the_fields():
    image = picture(218, 178)
    whole = np.asarray(pixels.cropped(image, "celeba", (128, 128)))
    np.testing.assert_array_equal(whole, np.asarray(image)[57:185, 25:153])  # round y 121, x 89
    # The triangle filter of half the resolution, as torchvision's Resize of a PIL image applies it.
    rows = np.zeros((64, 128))
    for i in range(64):
        weights = {2 * i + k: 1 - abs(k - 0.5) / 2 for k in range(-1, 3)}
        weights = {k: w for k, w in weights.items() if 0 <= k < 128}
        for k, weight in weights.items():
            rows[i, k] = weight / sum(weights.values())
    expected = np.einsum("ai,ijc,bj->abc", rows, whole.astype(float), rows)
    half = np.asarray(pixels.cropped(image, "celeba", (64, 64)))
    assert np.abs(half - expected).max() <= 1


def test_crops_read_sets_of_many_sizes_upright_and_in_8_bits(tmp_path):
    turned = Image.fromarray(np.tile(np.arange(0, 240, 20, np.uint8)[:, None], (1, 20)))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    out = io.BytesIO()
    turned.save(out, "PNG", exif=exif)
    deep = Image.fromarray(np.full((9, 9), 200 << 8 | 77, np.uint16))
    members = {"0.png": out.getvalue(), "1.png": encoded(deep)}
    write_zip(tmp_path / "a.zip", members)
    assert "--config.data.crop=center" in refusal(tmp_path, "a.zip", channels=1)
    source = opened(tmp_path, "a.zip", channels=1, crop="center")
    assert (source[1]["image"] == 200).all()
    column = source[0]["image"][:, 0, 0].astype(int)
    assert (np.diff(column) < 0).all()


def test_a_crop_that_does_not_suit_the_images_is_refused(tmp_path):
    write_zip(tmp_path / "a.zip", {"a.png": encoded(picture(8, 8))})
    assert "type --config.data.crop=center" in refusal(tmp_path, "a.zip", crop="celeba")
    write_zip(
        tmp_path / "b.zip", {"a.png": encoded(picture(218, 178)), "b.png": encoded(picture())}
    )
    assert "b.png of" in refusal(tmp_path, "b.zip", crop="celeba")
    write_zip(tmp_path / "c.zip", {"a.png": encoded(picture(218, 178))})
    text = refusal(tmp_path, "c.zip", crop="celeba", image_size=(64, 32))
    assert 'type --config.data.image_size="(64, 64)"' in text
    text = refusal(tmp_path, "c.zip")
    assert '--config.data.image_size="(218, 178)"' in text and "data.crop=center" in text
    # Of another size than the images that are looked at first.
    members = {f"{i:03d}.png": encoded(picture(8, 8)) for i in range(200)}
    write_zip(tmp_path / "d.zip", members | {"100.png": encoded(picture(9, 8))})
    assert "100.png of" in refusal(tmp_path, "d.zip")


# --------------------------------------------------------------------------------------- fractions


def test_a_fraction_is_the_examples_of_smallest_hash(tmp_path):
    names = [f"{i}.png" for i in range(205)]
    write_zip(tmp_path / "a.zip", {n: encoded(picture(seed=i)) for i, n in enumerate(names)})
    by_hash = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    taken = {}
    for fraction, count in ((0.1, 20), (0.01, 2), (0.5, 102), (0.999, 205)):
        source = opened(tmp_path, "a.zip", fraction=fraction)
        taken[fraction] = {source.records[i]["id"].decode() for i in range(len(source))}
        assert len(source) == count and taken[fraction] == set(by_hash[:count])
    assert taken[0.01] < taken[0.1] < taken[0.5]
    assert "--config.data.fraction=0.0049" in refusal(tmp_path, "a.zip", fraction=0.002)
    assert len(opened(tmp_path, "a.zip", fraction=0.0049)) == 1


def test_a_fraction_of_a_set_without_ids_is_by_index(tmp_path):
    fields = {"image_size": (1, 2), "channels": 1}
    whole = opened(tmp_path, "swiss_roll", **fields)
    part = opened(tmp_path, "swiss_roll", fraction=0.001, **fields)
    by_hash = sorted(range(50_000), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    assert images(part) == [whole[i]["image"].tobytes() for i in sorted(by_hash[:50])]


def test_a_fraction_of_a_prepared_set_is_by_its_ids_which_are_read_without_decoding(
    tiny_config, monkeypatch
):
    def decode(*args):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(pixels, "decode", decode)
    tiny_config.data.fraction = 0.01
    source = sources.open_source(tiny_config)
    by_hash = sorted(
        (f"{i:04d}".encode() for i in range(1797)), key=lambda i: hashlib.sha256(i).digest()
    )
    assert [source.records[i]["id"] for i in range(len(source))] == sorted(by_hash[:18])


# ------------------------------------------------------------------------------ fingerprint, caches


def test_fingerprint_and_cache_tell_crops_and_fractions_apart(tmp_path, monkeypatch):
    members = {f"{i}.png": encoded(picture(8, 8, i)) for i in range(40)}
    write_zip(tmp_path / "a.zip", members)
    variants = [{}, {"crop": "center"}, {"fraction": 0.5}, {"image_size": (4, 4), "crop": "center"}]
    prints = [opened(tmp_path, "a.zip", **fields).fingerprint for fields in variants]
    assert len(set(prints)) == 4

    decoded = []
    decode = pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda *a: decoded.append(1) or decode(*a))
    for expected in (40 + 40 + 20 + 40, 0):
        for fields in variants:
            config = config_of(tmp_path, "a.zip", **fields)
            config.train.batch_size = 8
            loader.Loader(config, sources.open_source(config), sharding.make_mesh(config))
        assert len(decoded) == expected
        decoded.clear()


def test_a_device_that_is_too_small_for_the_set_is_named_before_decoding(tiny_config, monkeypatch):
    tiny_config.data.cache = "device"
    source = sources.open_source(tiny_config)

    class Device:
        device_kind = "small card"

        def memory_stats(self):
            return {"bytes_limit": 1797 * 68 + 99, "bytes_in_use": self.in_use}

    class Mesh:
        local_devices = [Device()]

    Device.in_use = 99
    loader._check_device_room(tiny_config, source, Mesh)
    Device.in_use = 100
    with pytest.raises(ConfigError, match="needs 0.000114 GiB .* 1,797 images, but a small card"):
        loader._check_device_room(tiny_config, source, Mesh)


def test_a_disk_that_is_too_small_for_the_set_is_named_before_a_file_is_made(tmp_path, monkeypatch):
    write_zip(tmp_path / "a.zip", FOLDER)
    config = config_of(tmp_path, "a.zip")
    free = shutil.disk_usage(tmp_path)._replace(free=13 * (8 * 8 * 3 + 4) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(RunError, match="need 2.37e-06 GiB, but .* type --config.data.cache=none"):
        loader.Loader(config, sources.open_source(config), sharding.make_mesh(config))
    assert not list(tmp_path.rglob("*.npy*"))


# ------------------------------------------------------------------------------ the TFDS catalogue


def write_catalogue(data_dir, shape=(None, None, 3), config=None, example=None, **others):
    """A set as the catalogue has them: images of many sizes, and neither ids nor labels.

    Other features, with the `example` that all six are: in `others`.
    """
    import tensorflow_datasets as tfds

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version="1.0.0")] if config else []
        pkg_dir_path = data_dir

        def _info(self):
            features = {"image": tfds.features.Image(shape=shape, encoding_format="png")}
            features |= others
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                height, width = shape[0] or 8 + i, shape[1] or 9
                yield i, {"image": encoded(picture(height, width, i))} | (example or {})

    builder = Pictures(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def test_a_catalogue_set_of_many_sizes_is_read_with_a_crop(tmp_path):
    write_catalogue(tmp_path)
    text = refusal(tmp_path, "pictures")
    assert "has images of many sizes; expected 8 pixels" in text
    assert "type --config.data.crop=center" in text
    source = opened(tmp_path, "pictures", crop="center")
    np.testing.assert_array_equal(source[0]["image"], np.asarray(picture(8, 9, 0))[:, :8])
    assert len(source) == 6 and source.num_classes == 0
    assert len(opened(tmp_path, "pictures", crop="center", fraction=0.5)) == 3


def test_a_catalogue_set_of_another_size_is_read_with_a_crop(tmp_path):
    write_catalogue(tmp_path, (8, 9, 3))
    assert '"(8, 9)" --config.data.channels=3, or --config.data.crop=center' in refusal(
        tmp_path, "pictures"
    )
    assert opened(tmp_path, "pictures", crop="center", image_size=(4, 4))[0]["image"].shape == (
        4, 4, 3,
    )  # fmt: skip


def test_a_catalogue_set_of_arrays_is_cropped_as_its_files_would_be(tmp_path):
    import tensorflow_datasets as tfds

    for mode, channels in (("RGB", 3), ("L", 1)):
        image = picture(12, 9, mode=mode)
        array = np.asarray(image).reshape(12, 9, channels)
        write_catalogue(
            tmp_path / mode,
            example={"image": array},
            image=tfds.features.Tensor(shape=array.shape, dtype=np.uint8),
        )
        source = opened(tmp_path / mode, "pictures", crop="center", channels=channels)
        np.testing.assert_array_equal(
            source[5]["image"], pixels.decode(encoded(image), channels, "center", (8, 8))
        )


def test_a_catalogue_set_of_anything_but_images_of_8_bits_is_refused(tmp_path):
    import tensorflow_datasets as tfds

    for dtype, shape in ((np.uint16, (8, 8, 1)), (np.uint8, (8, 8)), (np.uint8, (2, 8, 8, 3))):
        folder = tmp_path / f"{len(shape)}"
        feature = tfds.features.Tensor(shape=shape, dtype=dtype)
        write_catalogue(folder, example={"image": np.zeros(shape, dtype)}, image=feature)
        assert f"has images that are {feature!r}; expected height, width and channels" in (
            refusal(folder, "pictures", channels=1)
        )


def test_labels_that_are_no_class_are_left_out_and_refused_if_the_model_has_classes(tmp_path):
    from tensorflow_datasets import features

    for kind, label, value in (
        ("text", features.Text(), "Ada"),
        ("several", features.Sequence(features.ClassLabel(num_classes=4)), [3, 1]),
        ("score", features.Scalar(np.float32), 2.7),
    ):
        write_catalogue(tmp_path / kind, (8, 8, 3), example={"label": value}, label=label)
        config = config_of(tmp_path / kind, "pictures")
        config.train.batch_size = 8
        source = sources.open_source(config)
        assert source.fingerprint and source[0]["label"] == 0
        loader.Loader(config, source, sharding.make_mesh(config))  # which decodes the set
        config.model.num_classes = 4
        with pytest.raises(ConfigError, match="no label that is one class per image, .*classes=0"):
            sources.open_source(config)


def test_a_catalogue_set_half_prepared_is_named_with_what_to_type(tmp_path):
    folder = write_catalogue(tmp_path, (8, 8, 3), config="big")
    assert folder.parts[-3:] == ("pictures", "big", "1.0.0")
    write_catalogue(tmp_path, (8, 8, 3), config="small")
    assert len(opened(tmp_path, "pictures/big")) == 6
    # Without the catalogue's own default.
    shutil.rmtree(tmp_path / "pictures" / ".config")
    text = refusal(tmp_path, "pictures")
    assert "big, small; expected one" in text and "--config.data.name=pictures/big" in text
    (shard,) = folder.glob("*.array_record*")
    shard.unlink()
    text = refusal(tmp_path, "pictures/big")
    assert "cannot be read" in text and f"restore {tmp_path}/pictures/big" in text
    folder.rename(folder.parent / "incomplete.ABCDEF_1.0.0")
    text = refusal(tmp_path, "pictures/big")
    assert "is prepared only in part, in " in text and "tfds build pictures/big --file" in text
    assert "tfds build cats --file_format=array_record" in refusal(tmp_path, "cats")


# --------------------------------------------------------------------------------- lmdb, swiss roll


def test_an_lmdb_is_one_split_named_by_its_folder(tmp_path):
    lmdb = pytest.importorskip("lmdb", reason="This needs lmdb.")
    for split, count in (("train", 5), ("val", 2)):
        folder = tmp_path / f"church_outdoor_{split}_lmdb"
        with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
            for i in range(count):
                key = hashlib.sha1(f"{split}{i}".encode()).hexdigest().encode()
                transaction.put(key, encoded(picture(12, 20, i), "WEBP"))
    name = "church_outdoor_train_lmdb"
    source = opened(tmp_path, name, crop="center")
    assert len(source) == 5 and source[4]["image"].shape == (8, 8, 3)
    assert len(opened(tmp_path, name, crop="center", fraction=0.4)) == 2
    assert "--config.data.split=train" in refusal(tmp_path, name, split="validation")
    assert len(opened(tmp_path, "church_outdoor_val_lmdb", split="validation", crop="center")) == 2
    assert "--config.data.crop=center" in refusal(tmp_path, name)
    archives._environment.cache_clear()
    (tmp_path / name / "data.mdb").write_bytes(b"short")
    assert f"unpack {tmp_path}/{name} again" in refusal(tmp_path, name, crop="center")


def test_a_missing_lmdb_package_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "bedroom_train_lmdb").mkdir()
    (tmp_path / "bedroom_train_lmdb" / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    archives._environment.cache_clear()
    assert "type: pip install 'maskdm_jax[lmdb]'" in refusal(tmp_path, "bedroom_train_lmdb")


def test_the_swiss_roll_is_two_pixels_and_a_spiral(tmp_path):
    source = opened(tmp_path, "swiss_roll", image_size=(1, 2), channels=1)
    drawn = np.stack([source[i]["image"] for i in range(2000)])
    assert drawn.shape == (2000, 1, 2, 1) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, toy.to_pixels(toy.points("train"))[:2000])
    points = toy.to_points(drawn)
    assert np.abs(points - toy.points("train")[:2000]).max() <= 0.5 / 127.5 + 1e-9
    radius = np.linalg.norm(points, axis=1) / 0.93
    assert radius.min() == pytest.approx(1 / 3, abs=0.1) and radius.max() < 1.1
    # The radius, unrolled by the angle, is the same at both ends of a turn.
    turns = radius * 4.5 / 2 - np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi)
    assert np.abs(turns - np.rint(turns)).max() < 0.25
    assert (toy.points("test")[:100] != toy.points("train")[:100]).any()


def test_the_digits_still_need_nothing(data_dir):
    config = pretrain_digits.get_config()
    config.update_from_flattened_dict(TINY)
    config.data.dir = str(data_dir)
    assert len(sources.open_source(config)) == 1797
