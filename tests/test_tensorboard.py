"""What TensorBoard is given, read back from its event files."""

import io
import itertools
import json
import sys
import types

import event_files
import numpy as np
import pytest
from PIL import Image
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2

from maskdm_jax import images, train
from maskdm_jax.config import default_config, get, to_json
from maskdm_jax.field_table import FIELDS
from maskdm_jax.run import tensorboard
from maskdm_jax.run.telemetry import read_metrics

SCORED = {"step": 4, "key": "a", "values": {"scores/fid": 3.0}, "definition": "n 10; ema"}


@pytest.fixture
def clock(monkeypatch):
    """A second passes with each look at the time: files are named by the second."""
    seconds = itertools.count(1_700_000_000)
    ticking = types.SimpleNamespace(time=lambda: next(seconds))
    monkeypatch.setattr(event_file_writer, "time", ticking)


@pytest.fixture
def board(tmp_path):
    """Makes the board of a start after `first_step` updates."""

    def make(first_step=0, config=None):
        return tensorboard.Board(tmp_path, (config or default_config()).to_dict(), first_step)

    return make


def test_a_run_shows_metrics_previews_config_and_hyperparameters(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # with log.wandb off, nothing imports it
    tiny_config.train.update(num_steps=2, sample_every_steps=1)
    tiny_config.sample.update(preview_num=4, preview_steps=2)
    train.train(tiny_config, tmp_path)
    found = event_files.values(tmp_path / "tensorboard")
    for record in read_metrics(tmp_path):
        for name in record.keys() - {"step", "device"}:
            ((_, value),) = [each for each in found[name] if each[0] == record["step"]]
            assert value.simple_value == np.float32(record[name]), name
    assert [step for step, _ in found["preview"]] == [1, 2]
    for step, value in found["preview"]:
        path = tmp_path / "previews" / f"step_{step:07d}.png"
        shown = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
        np.testing.assert_array_equal(shown[..., None], images.read_png(path, 1))
        assert (value.image.height, value.image.width) == shown.shape
        assert value.image.colorspace == 1
    ((_, text),) = found["config"]
    assert json.loads(text.tensor.string_val[0]) == json.loads(to_json(tiny_config))
    assert text.metadata.plugin_data.plugin_name == "text"
    told = event_files.hparams(tmp_path / "tensorboard")
    assert told.keys() == FIELDS.keys()
    assert told["optim.lr_peak"] == get(tiny_config, "optim.lr_peak")
    assert told["model.qkv_bias"] is False and told["mask.kind"] == "patch"
    assert told["data.image_size"] == "(8, 8)"


def test_a_resumed_run_has_the_hyperparameters_of_its_newest_start_alone(board, clock, tmp_path):
    board().close()
    config = default_config()
    config.optim.lr_peak = 0.5
    board(2, config).close()
    folder = tmp_path / "tensorboard"
    assert event_files.hparams(folder)["optim.lr_peak"] == 0.5
    assert len(event_files.values(folder)["config"]) == 1


def test_a_resumed_run_tells_tensorboard_to_drop_what_came_after_its_checkpoint(board, tmp_path):
    board(7).close()
    (start,) = [e for e in event_files.events(tmp_path / "tensorboard") if e.session_log.status]
    assert (start.step, start.session_log.status) == (8, event_pb2.SessionLog.START)


def test_scores_with_the_same_key_are_shown_once_with_their_definition(clock, tmp_path):
    for fid in (5.0, 3.0):
        tensorboard.write_scores(tmp_path, **SCORED | {"values": {"scores/fid": fid}})
    tensorboard.write_scores(tmp_path, **SCORED | {"key": "b", "step": 6})
    found = event_files.values(tmp_path / "tensorboard" / "scores")
    assert sorted((step, v.simple_value) for step, v in found["scores/fid"]) == [(4, 3), (6, 3)]
    for _, value in found["scores/definition"]:
        assert value.tensor.string_val[0] == b"n 10; ema"
        assert value.metadata.plugin_data.plugin_name == "text"
    tensorboard.drop_scores(tmp_path, "b")
    found = event_files.values(tmp_path / "tensorboard" / "scores")
    assert [step for step, _ in found["scores/fid"]] == [4]
