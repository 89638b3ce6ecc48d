import io
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from maskdm_jax.config import default_config
from maskdm_jax.data import prepare, sources
from maskdm_jax.errors import RunError


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
    record = opened(tmp_path, "faces", (8, 16)).folder.glob("*.array_record*")
    data = (tmp_path / "in" / "a.jpg").read_bytes()
    from array_record.python import array_record_module

    stored = array_record_module.ArrayRecordReader(str(next(record))).read_all()[0]
    assert data in stored


@pytest.mark.parametrize("encoding, magic", [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8")])
def test_resized_images_have_the_chosen_encoding(tmp_path, encoding, magic):
    path = tmp_path / "a.png"
    picture(20, 20).save(path)
    data, problem = prepare._encode((str(path), (8, 8), 3, encoding, 95))
    assert problem is None and data.startswith(magic)
    assert Image.open(io.BytesIO(data)).size == (8, 8)


def test_exif_orientation_is_applied(tmp_path):
    image = picture(8, 8)
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    data, _ = prepare._encode((str(tmp_path / "a.png"), (8, 8), 3, "png", 95))
    upright = np.asarray(Image.open(io.BytesIO(data)))
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
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    assert run(tmp_path) == 2
    assert "holds no image files" in capsys.readouterr().err
    picture(8, 8).save(tmp_path / "in" / "a.png")
    assert run(tmp_path, "My Faces") == 2
    assert "--name my_faces" in capsys.readouterr().err
    assert run(tmp_path) == 0
    assert run(tmp_path) == 2
    assert "exists; delete that folder" in capsys.readouterr().err


def test_grey_images_have_one_channel(tmp_path):
    (tmp_path / "in").mkdir()
    picture(8, 8, 0, "L").save(tmp_path / "in" / "a.png")
    assert run(tmp_path, "faces", "8", "--channels", "1") == 0
    assert opened(tmp_path, "faces", (8, 8), 1)[0]["image"].shape == (8, 8, 1)


def test_links_are_followed_and_hidden_files_left_out(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture(8, 8).save(elsewhere / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cat").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(tmp_path / "in")
    (elsewhere / "._a.png").write_bytes(b"not a picture")
    assert run(tmp_path) == 0
    assert len(opened(tmp_path, "faces", (8, 8))) == 1


def test_images_beside_class_folders_are_an_error(tmp_path, capsys):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    picture(8, 8).save(tmp_path / "in" / "cat" / "a.png")
    picture(8, 8).save(tmp_path / "in" / "stray.png")
    assert run(tmp_path) == 2
    assert "stray.png" in capsys.readouterr().err


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    data, _ = prepare._encode((str(tmp_path / "a.png"), (8, 8), 1, "png", 95))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), values >> 8)


def test_a_worker_needs_neither_jax_nor_tfds():
    code = (
        "import sys, maskdm_jax.data.prepare; "
        "print([m for m in ('jax', 'flax', 'tensorflow_datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result


def test_a_killed_worker_ends_the_preparation_with_one_sentence(tmp_path, monkeypatch):
    for i in range(40):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    first = prepare._encode_all([(str(tmp_path / "0.png"), (8, 8), 3, "png", 95)] * 2000, 2)
    next(first)
    (worker, *_) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RunError, match="was killed, .* type fewer than 2 --num_processes"):
        list(first)


def test_images_keep_their_order_over_many_batches(tmp_path):
    for i in range(100):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i:03d}.png")
    jobs = [(str(tmp_path / f"{i:03d}.png"), (8, 8), 3, "png", 95) for i in range(100)]
    encoded = [data for data, problem in prepare._encode_all(jobs, 2)]
    assert encoded == [(tmp_path / f"{i:03d}.png").read_bytes() for i in range(100)]


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
