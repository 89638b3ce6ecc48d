import dataclasses
import errno
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

from maskdm_jax import sharding
from maskdm_jax.data import sources
from maskdm_jax.data.batch import materialize
from maskdm_jax.data.loader import Loader, Order
from maskdm_jax.errors import ConfigError, RunError


def test_every_epoch_reads_every_example_once():
    order = Order(seed=0, num_examples=10)
    ids = np.concatenate([order.ids(4 * step, 4) for step in range(5)])
    epochs = ids.reshape(2, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert (epochs[0] != epochs[1]).any()


def test_order_is_a_function_of_seed_and_step_alone():
    forward = Order(0, 10)
    steps = [forward.ids(4 * step, 4) for step in range(8)]
    np.testing.assert_array_equal(Order(0, 10).ids(28, 4), steps[7])
    np.testing.assert_array_equal(forward.ids(0, 4), steps[0])
    assert (Order(1, 10).ids(0, 4) != steps[0]).any()


def read(config, step, count=2):
    mesh = sharding.make_mesh(config)
    loader = Loader(config, sources.open_source(config), mesh)
    feed = loader.batches(step)
    return [jax.device_get(materialize(config, loader.arrays, next(feed))) for _ in range(count)]


def test_all_caches_give_the_same_batches_from_any_step(tiny_config):
    tiny_config.train.num_steps = 200
    start = read(tiny_config, 0, count=5)
    assert start[0]["image"].shape == (16, 8, 8, 1) and start[0]["image"].dtype == np.uint8
    for cache in ("none", "host", "device"):
        tiny_config.data.cache = cache
        for batch, expected in zip(read(tiny_config, 3), start[3:], strict=True):
            np.testing.assert_array_equal(batch["image"], expected["image"])
            np.testing.assert_array_equal(batch["label"], expected["label"])


def test_images_and_labels_are_the_embedded_digits(tiny_config):
    from sklearn.datasets import load_digits

    digits = load_digits()
    source = sources.open_source(tiny_config)
    assert len(source) == 1797 and source.num_classes == 10
    for index in (0, 1796):
        np.testing.assert_array_equal(
            source[index]["image"][..., 0], np.rint(digits.images[index] * 255 / 16)
        )
        assert source[index]["label"] == digits.target[index]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"data.name": "cats"}, "maskdm_jax.data.prepare --images FOLDER --name cats --size 8"),
        ({"data.name": ""}, "data.name is ''"),
        ({"data.image_size": (16, 16)}, '--config.data.image_size="(8, 8)"'),
        ({"data.split": "test"}, "--config.data.split=train"),
        ({"model.num_classes": 11}, "--config.model.num_classes=10"),
        ({"model.num_classes": 5}, "--config.model.num_classes=10"),
    ],
)
def test_a_data_set_that_does_not_fit_is_named(tiny_config, fields, expected):
    tiny_config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError) as error:
        sources.open_source(tiny_config)
    assert expected in str(error.value)


def test_a_disk_too_full_for_the_decoded_images_is_one_sentence(tiny_config, tmp_path, monkeypatch):
    shutil.copytree(pathlib.Path(tiny_config.data.dir) / "digits", tmp_path / "digits")
    shutil.rmtree(tmp_path / "digits" / "1.0.0" / "decoded", ignore_errors=True)
    tiny_config.data.dir = str(tmp_path)

    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        RunError, match="about 0.1 MiB are needed, and .* type --config.data.cache=none"
    ):
        read(tiny_config, 0)
    left = [path.name for path in (tmp_path / "digits" / "1.0.0" / "decoded").iterdir()]
    assert left == [".lock"]


@pytest.fixture
def copied(tiny_config, tmp_path):
    """A config of its own copy of the digits, and the copy's folder."""
    sources.open_source(tiny_config)
    folder = tmp_path / "data" / "digits" / "1.0.0"
    shutil.copytree(
        pathlib.Path(tiny_config.data.dir) / "digits" / "1.0.0",
        folder,
        ignore=shutil.ignore_patterns("decoded"),
    )
    tiny_config.data.dir, tiny_config.data.cache = str(tmp_path / "data"), "host"
    return tiny_config, folder


def replace(path, data):
    path.unlink()  # a file that is still mapped into memory must not shrink
    path.write_bytes(data)


def cut(path):
    replace(path, path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_decode_cache_is_decoded_again(copied, capsys):
    config, folder = copied
    expected = read(config, 0, 1)[0]["image"]
    (images,) = (folder / "decoded").glob("train-image-*.npy")
    whole = images.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b"|u1", b"|i1")):
        replace(images, damaged)
        np.testing.assert_array_equal(read(config, 0, 1)[0]["image"], expected)
        assert "are not whole; decoding again" in capsys.readouterr().err


def test_what_a_killed_decoder_left_is_removed_by_the_next(copied):
    config, folder = copied
    (folder / "decoded").mkdir()
    left = folder / "decoded" / ".train-image-0123456789ab.npy.host-1"
    left.write_bytes(b"half of it")
    read(config, 0, 1)
    assert not left.exists()


@pytest.mark.parametrize("damaged", ["*.array_record*", "dataset_info.json", "features.json"])
@pytest.mark.parametrize("cache", ["none", "host"])
def test_a_damaged_data_set_is_one_sentence(copied, cache, damaged):
    config, folder = copied
    config.data.cache = cache
    (path,) = folder.glob(damaged)
    cut(path)
    with pytest.raises(ConfigError, match=f"cannot be read: .*; restore {folder.parent}.*prepare"):
        read(config, 0, 1)


def test_a_copy_of_a_data_set_has_its_fingerprint_and_another_set_has_not(copied, tmp_path):
    config, folder = copied
    copy = sources.open_source(config)
    shutil.copytree(folder.parents[1], tmp_path / "elsewhere")
    config.data.dir = str(tmp_path / "elsewhere")
    assert sources.open_source(config).fingerprint == copy.fingerprint
    changed = [copy._read(i) for i in range(len(copy))]
    changed[-1] = (changed[0][0], changed[-1][1])  # one image differs
    assert dataclasses.replace(copy, contents="other bytes").fingerprint != copy.fingerprint
    other = dataclasses.replace(copy, records=[{"image": i, "label": n} for i, n in changed])
    assert other.fingerprint != copy.fingerprint
    assert dataclasses.replace(other, records=other.records[:-1]).fingerprint != other.fingerprint


@pytest.mark.parametrize("cache", ["none", "host", "device"])
@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_is_no_class_is_refused_unless_classes_are_ignored(copied, cache, label):
    config, _ = copied
    config.data.cache, config.train.batch_size = cache, 8
    source = sources.open_source(config)
    records = [dict(zip(("image", "label"), source._read(i), strict=True)) for i in range(8)]
    records[5]["label"] = label
    source = dataclasses.replace(source, records=records)

    def first_batch():
        return next(Loader(config, source, sharding.make_mesh(config)).batches(0))

    with pytest.raises(ConfigError, match=f"train of digits has the label {label}; .* 0 to 9, "):
        first_batch()
    config.model.num_classes = 0
    first_batch()


def test_a_set_whose_files_were_replaced_is_decoded_again(copied):
    config, folder = copied
    read(config, 0, 1)
    (before,) = (folder / "decoded").glob("train-image-*.npy")
    (records,) = folder.glob("*.array_record*")
    replace(records, records.read_bytes())
    read(config, 0, 1)
    (after,) = (folder / "decoded").glob("train-image-*.npy")
    assert after.name != before.name
