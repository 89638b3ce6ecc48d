import io
import multiprocessing
import os
import pathlib
import random
import re
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from maskdm_jax.config import default_config
from maskdm_jax.data import encode, folders, pixels, prepare, sources
from maskdm_jax.errors import ConfigError, RunError


def picture(height, width, seed=0, mode="RGB"):
    channels = {"RGB": 3, "L": 1, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def opened(tmp_path, name, size, channels=3):
    config = default_config()
    config.data.name, config.data.dir = name, str(tmp_path / "tfds")
    config.data.image_size, config.data.channels = size, channels
    config.model.patch_size = 1
    return sources.open_source(config)


def encoded(path, channels=3, **target):
    """An image of 8 x 8 pixels made from `path`, encoded."""
    result = encode.encode(path, encode.Target((8, 8), channels, **target))
    assert result.data is not None, result.problem
    return result.data


def run(tmp_path, name="faces", size="8", *flags):
    return prepare.main(
        ["--images", str(tmp_path / "in"), "--name", name, "--size", size]
        + ["--data_dir", str(tmp_path / "tfds"), "--num_processes", "1", *flags]
    )


def test_a_folder_of_classes_becomes_a_labelled_set(tmp_path):
    for i, (label, mode) in enumerate([("cat", "RGB"), ("dog", "L"), ("dog", "RGBA")]):
        folder = tmp_path / "in" / label / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        picture(12, 20, i, mode).save(folder / f"{i}.png")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    assert run(tmp_path) == 0
    source = opened(tmp_path, "faces", (8, 8))
    assert [int(source[i]["label"]) for i in range(3)] == [0, 1, 1]
    assert source.num_classes == 2 and source[0]["image"].shape == (8, 8, 3)


def test_the_central_part_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    assert run(tmp_path) == 0
    assert (opened(tmp_path, "faces", (8, 8))[0]["image"] == 200).all()


def test_files_of_the_right_size_are_kept_byte_for_byte(tmp_path):
    (tmp_path / "in").mkdir()
    picture(8, 16).save(tmp_path / "in" / "a.jpg", quality=60)
    assert run(tmp_path, "faces", "8x16") == 0
    record = opened(tmp_path, "faces", (8, 16)).cache_dir.parent.glob("*.array_record*")
    data = (tmp_path / "in" / "a.jpg").read_bytes()
    from array_record.python import array_record_module

    stored = array_record_module.ArrayRecordReader(str(next(record))).read_all()[0]
    assert data in stored


@pytest.mark.parametrize("encoding, magic", [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8")])
def test_resized_images_have_the_chosen_encoding(tmp_path, encoding, magic):
    path = tmp_path / "a.png"
    picture(20, 20).save(path)
    data = encoded(path, encoding=encoding)
    assert data.startswith(magic)
    assert Image.open(io.BytesIO(data)).size == (8, 8)


def test_exif_orientation_is_applied(tmp_path):
    image = picture(8, 8)
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    upright = pixels.decode(encoded(tmp_path / "a.png"), 3)
    np.testing.assert_array_equal(upright, np.asarray(image)[::-1, ::-1])


def test_one_unreadable_file_in_a_hundred_is_listed_and_skipped(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(99):
        picture(8, 8, i).save(tmp_path / "in" / f"{i:03d}.png")
    whole = (tmp_path / "in" / "000.png").read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path) == 0
    err = capsys.readouterr().err
    assert "skipped" in err and "cut.png" in err
    assert len(opened(tmp_path, "faces", (8, 8))) == 99


def test_more_than_one_percent_unreadable_is_an_error_and_writes_nothing(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(20):
        picture(8, 8, i).save(tmp_path / "in" / f"{i:03d}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"not a picture")
    assert run(tmp_path) == 2
    assert "bad.png" in capsys.readouterr().err
    assert not list((tmp_path / "tfds").rglob("*.array_record*"))
    assert not list((tmp_path / "tfds" / "faces").glob("*"))
    (tmp_path / "in" / "bad.png").unlink()
    assert run(tmp_path) == 0


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert run(tmp_path) == 2
    assert "which is no folder" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    assert run(tmp_path) == 2
    assert "holds no images" in capsys.readouterr().err
    picture(8, 8).save(tmp_path / "in" / "a.png")
    assert run(tmp_path, "My Faces") == 2
    assert "--name=my_faces" in capsys.readouterr().err
    assert run(tmp_path) == 0
    assert run(tmp_path) == 2
    assert "exists; delete that folder" in capsys.readouterr().err


def test_grey_images_have_one_channel(tmp_path):
    (tmp_path / "in").mkdir()
    picture(8, 8, 0, "L").save(tmp_path / "in" / "a.png")
    assert run(tmp_path, "faces", "8", "--channels", "1") == 0
    assert opened(tmp_path, "faces", (8, 8), 1)[0]["image"].shape == (8, 8, 1)


def test_links_are_followed_and_hidden_files_left_out(tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture(8, 8).save(elsewhere / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cat").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(tmp_path / "in")
    (elsewhere / "._a.png").write_bytes(b"not a picture")
    assert run(tmp_path) == 0
    assert len(opened(tmp_path, "faces", (8, 8))) == 1
    assert (
        "left out: hidden (the name starts with a dot): 1 (cat/._a.png)" in capsys.readouterr().out
    )


def test_images_beside_class_folders_are_an_error(tmp_path, capsys):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    picture(8, 8).save(tmp_path / "in" / "cat" / "a.png")
    picture(8, 8).save(tmp_path / "in" / "stray.png")
    assert run(tmp_path) == 2
    assert "stray.png" in capsys.readouterr().err


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    for name in ("a.png", "a.pgm"):
        data = encoded(tmp_path / name, channels=1)
        np.testing.assert_array_equal(pixels.decode(data, 1)[..., 0], values >> 8)


def test_a_worker_needs_neither_jax_nor_tfds():
    code = (
        "import sys, maskdm_jax.data.encode; "
        "print([m for m in ('jax', 'flax', 'tensorflow_datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result


def test_a_killed_worker_ends_the_preparation_with_one_sentence(tmp_path, monkeypatch):
    for i in range(40):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    first = encode.encode_all([tmp_path / "0.png"] * 2000, encode.Target((8, 8)), 2)
    next(first)
    (worker, *_) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RunError, match="was killed, .* type --num_processes=1"):
        list(first)


def test_images_keep_their_order_over_many_batches(tmp_path):
    for i in range(100):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i:03d}.png")
    paths = [tmp_path / f"{i:03d}.png" for i in range(100)]
    results = [result.data for result in encode.encode_all(paths, encode.Target((8, 8)), 2)]
    assert results == [(tmp_path / f"{i:03d}.png").read_bytes() for i in range(100)]


def test_ctrl_c_is_one_line_of_the_main_process_alone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (800, 800, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "0.bmp")
    for i in range(1, 300):
        os.link(tmp_path / "in" / "0.bmp", tmp_path / "in" / f"{i}.bmp")
    command = [sys.executable, "-m", "maskdm_jax.data.prepare", "--images", str(tmp_path / "in")]
    command += ["--name", "many", "--size", "256", "--data_dir", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--num_processes", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 3:  # two workers, and what tracks their resources
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "stopped\n")
    assert not list((tmp_path / "out" / "many").glob("1.0.0"))


def test_pixels_do_not_depend_on_an_installed_opencv(tmp_path, monkeypatch):
    deep = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(deep, "PNG")
    rows = b"".join(b"\0" + bytes([i, 77] * 3 * 8) for i in range(8))  # 16-bit RGB: 77 is dropped
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "deep.png").write_bytes(png(8, 8, bits=16, colour=2, rows=rows))
    see_through = picture(8, 8)
    see_through.save(tmp_path / "in" / "keyed.png", transparency=see_through.getpixel((3, 4)))
    picture(8, 8, 1).save(tmp_path / "in" / "plain.jpg")
    assert run(tmp_path) == 0
    source = opened(tmp_path, "faces", (8, 8))
    np.testing.assert_array_equal(
        source[0]["image"], np.broadcast_to(np.arange(8)[:, None, None], (8, 8, 3))
    )
    expected = np.array(see_through)
    expected[4, 3] = 255
    np.testing.assert_array_equal(source[1]["image"], expected)
    # All that TFDS itself, with OpenCV or without, would read is the same.
    stored = [source.records[i]["image"] for i in range(len(source))]
    assert all(pixels.is_plain(Image.open(io.BytesIO(data)), data) for data in stored)


def png(width, height, *, bits, colour, rows, extra=b""):
    """A PNG file from its filtered rows."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "keyed grey"])
def test_transparent_parts_show_the_background(tmp_path, mode):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = 200, 200, 200, 255
    rgba[:, 4:] = 9, 90, 9, 0  # colours that nobody sees
    image = Image.fromarray(rgba)
    if mode == "keyed grey":
        grey = Image.fromarray(np.where(rgba[..., 3], 200, 9).astype(np.uint8))
        grey.save(tmp_path / "a.png", transparency=9)
    elif mode == "P":
        image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.gif")
        image.quantize().save(tmp_path / "a.png")
    elif mode == "PA":
        image.convert("P").convert("PA").convert("RGBA").save(tmp_path / "a.webp", lossless=True)
        image.save(tmp_path / "a.png")
    else:
        image.convert(mode).save(tmp_path / "a.png")
    for background in ((255, 255, 255), (10, 20, 30)):
        result = pixels.decode(encoded(tmp_path / "a.png", background=background), 3)
        assert (result[:, :4] == 200).all() and (result[:, 4:] == background).all()


def test_float_images_are_scaled_from_0_to_1_or_unreadable(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    result = pixels.decode(encoded(tmp_path / "a.tif", channels=1), 1)
    np.testing.assert_array_equal(result[..., 0], np.rint(values * 255))
    for bad in (values * 2, values - 0.5, values * np.nan):
        Image.fromarray(bad).save(tmp_path / "a.tif")
        result = encode.encode(tmp_path / "a.tif", encode.Target((8, 8)))
        assert result.data is None and "expected 0 to 1" in result.problem


def test_32_bit_integers_are_unreadable(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(tmp_path / "a.tif")
    result = encode.encode(tmp_path / "a.tif", encode.Target((8, 8)))
    assert result.data is None and "expected" in result.problem


def test_what_is_left_out_is_named_and_joins_the_one_percent_rule(tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    for i in range(300):
        picture(8, 8, i).save(root / f"{i}.png")
    (root / "notes.txt").write_text("über\n" * 2000)
    (root / "raw.cr2").write_bytes(b"\0\1\2" * 99)
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    picture(8, 8).save(root / "no_suffix", "PNG")
    picture(8, 8).save(root / "old.JFIF", "JPEG")
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "wrote 302 images, 0 unreadable" in out
    assert "files *.cr2: 1 (raw.cr2); links to nothing: 1 (gone.jpg); text: 1 (notes.txt)" in out
    (root / "second.cr2").write_bytes(b"\0\1\2")
    (root / "empty.jpg").write_bytes(b"")
    assert run(tmp_path, "again") == 2
    err = capsys.readouterr().err
    assert "4 of 306 files would be left out, more than 1 %: 1 unreadable, listed above; " in err
    assert "files *.cr2: 2 (raw.cr2, second.cr2)" in err


def test_a_folder_that_cannot_be_listed_is_left_out_by_name(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    picture(8, 8).save(tmp_path / "dog" / "a.png")
    listed = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = folders.find(tmp_path)
    assert [path.name for path in found.images] == ["a.png"]
    assert found.described() == "folders without permission: 1 (cat)" and found.num_lost() == 1


def test_classes_are_numbered_as_people_count_and_printed(tmp_path, capsys):
    for i in (10, 2, 0, 1):
        (tmp_path / "in" / str(i)).mkdir(parents=True)
        picture(8, 8, i).save(tmp_path / "in" / str(i) / "a.png")
    assert run(tmp_path) == 0
    assert "labels: 0 = 0 (1), 1 = 1 (1), 2 = 2 (1), 3 = 10 (1)" in capsys.readouterr().out


def test_train_and_val_folders_are_splits(tmp_path, capsys):
    for split, label, value in (("val", "dog", 1), ("train", "cat", 2), ("train", "dog", 3)):
        folder = tmp_path / "in" / split / label
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (value,) * 3).save(folder / "a.png")
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "split train: 2 images" in out and "split validation: 1 images" in out
    config = default_config()
    config.data.name, config.data.dir = "faces", str(tmp_path / "tfds")
    config.data.image_size = (8, 8)
    seen = {}
    for config.data.split in ("train", "validation"):
        source = sources.open_source(config)
        seen[config.data.split] = [
            (int(source[i]["label"]), int(source[i]["image"][0, 0, 0])) for i in range(len(source))
        ]
    assert seen == {"train": [(0, 2), (1, 3)], "validation": [(1, 1)]}


@pytest.mark.parametrize(
    "paths, words",
    [
        (["train/a.png", "cat/a.png"], "holds cat beside train, the name of a split"),
        (["train/cat/a.png", "test/a.png"], "has class folders in train only"),
    ],
)
def test_splits_that_are_not_clear_are_refused(tmp_path, capsys, paths, words):
    for path in paths:
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        picture(8, 8).save(tmp_path / "in" / path)
    assert run(tmp_path) == 2
    err = capsys.readouterr().err
    assert words in err and "type --images" in err


def test_the_test_share_is_chosen_by_name_alone(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(60):
        Image.new("RGB", (8, 8), (i,) * 3).save(tmp_path / "in" / f"{i}.png")
    chosen = []
    for name in ("first", "second"):
        assert run(tmp_path, name, "8", "--test_share", "0.25") == 0
        config = default_config()
        config.data.name, config.data.dir = name, str(tmp_path / "tfds")
        config.data.image_size, config.data.split = (8, 8), "test"
        source = sources.open_source(config)
        chosen.append({int(source[i]["image"][0, 0, 0]) for i in range(len(source))})
        for i in range(0, 60, 7):  # the others stay where they are
            (tmp_path / "in" / f"{i}.png").unlink(missing_ok=True)
    assert 5 < len(chosen[0]) < 30
    assert chosen[1] == {i for i in chosen[0] if i % 7}
    assert run(tmp_path, "third", "8", "--test_share", "1.5") == 2
    assert "type --test_share=0.99" in capsys.readouterr().err


def test_names_that_are_not_utf_8_are_kept_as_escapes(tmp_path, capsys):
    folder = os.fsencode(tmp_path / "in") + b"/caf\xe9\n"
    os.makedirs(folder)
    picture(8, 8).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", folder + b"/\xff.png")
    assert run(tmp_path) == 0
    assert "labels: 0 = caf\\xe9\\n (1)" in capsys.readouterr().out
    source = opened(tmp_path, "faces", (8, 8))
    assert source.records[0]["id"] == rb"caf\xe9\n/\xff.png"


def test_a_full_disk_is_one_sentence_with_what_is_needed(tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(40):
        picture(128, 128, i).save(tmp_path / "in" / f"{i}.png")
    limit = 2**20  # a file-size limit is reported as a full disk is
    code = "import resource, sys; from maskdm_jax.data import prepare; "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit("
    flags = ["--images", str(tmp_path / "in"), "--name", "big", "--size", "128"]
    flags += ["--data_dir", str(tmp_path / "tfds"), "--num_processes", "1"]
    code += f"prepare.main({flags!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the data set big could not be written to") and "Trace" not in (
        result.stderr
    )
    needed = float(re.search(r"about ([\d.]+) MiB are needed", last)[1])
    assert 1.8 < needed < 2.4
    assert not list((tmp_path / "tfds" / "big").iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "in").mkdir()
    picture(8, 8).save(tmp_path / "in" / "a.png")
    left = tmp_path / "tfds" / "faces" / "incomplete.ABCDEF_1.0.0"
    left.mkdir(parents=True)
    (left / "faces-train.array_record").write_bytes(b"half")
    assert run(tmp_path) == 0
    assert [path.name for path in (tmp_path / "tfds" / "faces").iterdir()] == ["1.0.0"]


def test_a_data_folder_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    picture(8, 8).save(tmp_path / "in" / "a.png")
    (tmp_path / "tfds").write_text("a file")
    assert run(tmp_path) == 2
    assert "--data_dir" in capsys.readouterr().err
    config = default_config()
    config.data.name, config.data.dir = "digits", str(tmp_path / "tfds")
    with pytest.raises(ConfigError, match=f"is a file.*--config.data.dir={tmp_path}"):
        sources.open_source(config)
    config.data.dir = "/proc/nobody"  # nobody can write there, not even root
    with pytest.raises(ConfigError, match="data.dir /proc/nobody cannot be written to"):
        sources.open_source(config)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--quality", "500"], "type --quality=100"),
        (["--background", "greenish"], "type --background=black"),
        (["--size", "0"], "expected pixels, up to 8192: 256, or 128x64"),
    ],
)
def test_a_wrong_value_is_answered_with_what_to_type(tmp_path, capsys, flags, words):
    (tmp_path / "in").mkdir()
    picture(8, 8).save(tmp_path / "in" / "a.png")
    assert run(tmp_path, "faces", "8", *flags) == 2
    assert words in capsys.readouterr().err


def tiff(tmp_path, values, tags):
    """A TIFF of one strip with the given tags."""
    tags = {
        256: values.shape[1], 257: values.shape[0], 259: 1, 262: 1, 277: 1, 278: values.shape[0],
        **tags,
    }  # fmt: skip
    data = values.tobytes()
    entries = sorted({**tags, 273: 0, 279: len(data)}.items())
    start = 8 + 2 + 12 * len(entries) + 4
    table = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in entries
    )
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + b"\0" * 4 + data)
    return path


@pytest.mark.parametrize(
    "dtype, tags, reason",
    [
        (np.uint16, {258: 16, 262: 0}, "0 for white"),
        (np.int8, {258: 8, 339: 2}, "signed integers"),
        (np.int16, {258: 16, 339: 2}, "signed integers"),
    ],
)
def test_images_that_pillow_reads_wrongly_are_unreadable(tmp_path, dtype, tags, reason):
    values = np.arange(64).reshape(8, 8).astype(dtype)
    result = encode.encode(tiff(tmp_path, values, tags), encode.Target((8, 8)))
    assert result.data is None and reason in result.problem


def test_sixteen_bits_with_a_transparent_colour_are_unreadable(tmp_path):
    rows = b"".join(b"\0" + bytes([i, 77] * 8) for i in range(8))
    key = b"tRNS" + bytes([3, 77])
    key = struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key))
    (tmp_path / "a.png").write_bytes(png(8, 8, bits=16, colour=0, rows=rows, extra=key))
    result = encode.encode(tmp_path / "a.png", encode.Target((8, 8)))
    assert result.data is None and "transparent colour" in result.problem


def test_names_that_count_alike_keep_one_order(tmp_path):
    names = ["001", "01", "1", "2", "10"]
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert sorted(names, key=folders.counting_order) == ["001", "01", "1", "2", "10"]


def test_a_link_to_a_folder_beside_it_is_read_where_it_stands(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "in" / "train").mkdir(parents=True)
    (tmp_path / "in" / "val").mkdir()
    picture(8, 8).save(tmp_path / "store" / "a.png")
    for split in ("train", "val"):
        (tmp_path / "in" / split / "cats").symlink_to(tmp_path / "store")
    found = folders.find(tmp_path / "in")
    assert folders.splits(tmp_path / "in", found.images).keys() == {"train", "validation"}


def test_drawings_are_no_notes(tmp_path):
    (tmp_path / "a.svg").write_text("<svg/>")
    (tmp_path / "a.txt").write_text("")
    found = folders.find(tmp_path)
    assert found.described() == "files *.svg: 1 (a.svg); text: 1 (a.txt)"
    assert found.num_lost() == 1


def test_two_folders_of_one_split_are_refused(tmp_path, capsys):
    for name in ("train", "Train"):
        (tmp_path / "in" / name).mkdir(parents=True)
        picture(8, 8).save(tmp_path / "in" / name / "a.png")
    assert run(tmp_path) == 2
    assert "several folders of split train: Train, train" in capsys.readouterr().err


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(300):
        path = tmp_path / "in" / f"{i}.bmp"
        os.link(tmp_path / "in" / "0.bmp", path) if i else picture(800, 800).save(path)
    flags = ["--images", tmp_path / "in", "--name", "many", "--size", "256"]
    flags += ["--data_dir", tmp_path / "out", "--num_processes", "2"]
    command = [sys.executable, "-m", "maskdm_jax.data.prepare", *map(str, flags)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(found := children.read_text().split()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
