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
    order = Order(seed=0, num_examples=10, batch_size=4)
    ids = np.concatenate([order.ids(step) for step in range(5)])
    epochs = ids.reshape(2, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert (epochs[0] != epochs[1]).any()


def test_order_is_a_function_of_seed_and_step_alone():
    forward = Order(0, 10, 4)
    steps = [forward.ids(step) for step in range(8)]
    np.testing.assert_array_equal(Order(0, 10, 4).ids(7), steps[7])
    np.testing.assert_array_equal(forward.ids(0), steps[0])
    assert (Order(1, 10, 4).ids(0) != steps[0]).any()


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
        ({"data.name": ""}, "data.name is empty"),
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
    with pytest.raises(RunError, match="they take 0.1 MiB, and .* type --config.data.cache=none"):
        read(tiny_config, 0)
    left = [path.name for path in (tmp_path / "digits" / "1.0.0" / "decoded").iterdir()]
    assert left == [".lock"]
