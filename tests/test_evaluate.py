import dataclasses
import json
import re
import shutil
from unittest import mock

import event_files
import jax
import numpy as np
import pytest
from conftest import TINY

from configs import finetune_digits
from maskdm_jax import (
    checkpoint,
    compare,
    evaluate,
    evaluation,
    heldout,
    images,
    score_sets,
    sharding,
    state,
    train,
)
from maskdm_jax.config import default_config, validate_devices
from maskdm_jax.data import digits, sources, writer
from maskdm_jax.diffusion import make_process
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import uvit
from maskdm_jax.quality import inception, measure, score
from maskdm_jax.run import distributed, wandb_mirror
from maskdm_jax.run.telemetry import described_scores, read_scores


@pytest.fixture(scope="module")
def split_dir(tmp_path_factory):
    """A TFDS folder with digits in splits train (60) and test (20)."""
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.rint(source.images * (255 / 16)).astype(np.uint8)
    examples = [(digits._png(pixels[i]), str(source.target[i]), str(i)) for i in range(80)]
    folder = tmp_path_factory.mktemp("split")
    writer.write(
        "few_digits",
        folder,
        {"train": examples[:60], "test": examples[60:]},
        num_examples=80,
        image_shape=(8, 8, 1),
        classes=[str(i) for i in range(10)],
        description="Digits.",
    )
    return folder


@pytest.fixture
def config(split_dir):
    config = finetune_digits.get_config()
    config.update_from_flattened_dict(TINY | {"model.depth": 1})
    config.data.update(name="few_digits", dir=str(split_dir))
    config.train.update(num_steps=4, sample_every_steps=0)
    config.optim.warmup_steps = 1
    config.init.path = ""
    config.checkpoint.every_steps = 2
    config.sample.update(batch_size=8, steps=3, preview_steps=3)
    config.eval = default_config().eval  # the digits' own is for 8x8 pixels
    config.eval.update(num=30, num_in_training=12, features=64)
    return config


@dataclasses.dataclass(frozen=True)
class FakeWeights:
    sha256: str = "abcdef"


class FakeExtractor:
    """Six random projections of the pixels in place of the network's features."""

    num_images = 0

    def __init__(self, weights, layers, batch_size, devices):
        self._layers = layers
        self.matrix = np.random.default_rng(0).normal(size=(64, 6))

    def __call__(self, image_BHWC):
        FakeExtractor.num_images += len(image_BHWC)
        features = image_BHWC.reshape(len(image_BHWC), -1) / 255 @ self.matrix
        return {layer: features.astype(np.float32) for layer in self._layers}

    def seconds_per_image(self, shape):
        assert shape == (8, 8, 1)
        return 1.0


@pytest.fixture
def fake_network(monkeypatch):
    monkeypatch.setattr(inception, "Extractor", FakeExtractor)
    monkeypatch.setattr(score, "load_weights", lambda *args: FakeWeights())


def mesh_of(config):
    return sharding.make_mesh(config, jax.devices()[:1])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_loss_of_every_prediction_is_that_of_eps(config, monkeypatch, prediction):
    config.diffusion.prediction = prediction
    process = make_process(config.diffusion, config.data.image_size)

    def no_noise_seen(model, params, x_BNP, time_B, label_B=None):
        """The output of a network that takes x_t for noise-free: eps = 0, x0 = x_t / signal."""
        level = process.at(time_B)
        p, signal = (np.float32(1) * v for v in (level.p, level.signal))
        return x_BNP * (p / signal * np.ones(len(x_BNP), np.float32))[:, None, None]

    monkeypatch.setattr(uvit, "apply", no_noise_seen)
    mesh = mesh_of(config)
    params = state.fresh_params(config, mesh)
    image = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    index = np.arange(64, dtype=np.int32)
    loss = heldout.jit_heldout_loss(config, mesh)(params, image, index % 10, index)
    # eps is unit noise: 64 images of 64 pixels give its mean square to 2 %.
    np.testing.assert_allclose(np.mean(loss, axis=0), 1, rtol=0.1)


def test_an_image_has_its_own_levels_and_noise_in_any_batch(config):
    mesh = mesh_of(config)
    params = state.fresh_params(config, mesh)
    loss = heldout.jit_heldout_loss(config, mesh)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    index = np.arange(8, dtype=np.int32)
    whole = np.asarray(loss(params, image, index % 10, index))
    turned = np.asarray(loss(params, image[::-1], index[::-1] % 10, index[::-1]))
    np.testing.assert_allclose(turned[::-1], whole, rtol=1e-4)
    shifted = np.asarray(loss(params, image, index % 10, index + 8))
    assert (shifted != whole).all()


def test_a_loss_of_nan_is_no_bin_without_a_level(config, monkeypatch):
    config.diffusion.update(schedule="linear", num_timesteps=50)  # without a level in the last bin
    config.data.split = "test"
    loss = heldout.HeldoutLoss(config, mesh_of(config), sources.open_source(config))
    values = np.ones(heldout.NUM_BINS)
    values[-1] = np.nan
    monkeypatch.setattr(loss, "_of_batch", lambda params, image, *_: np.tile(values, (8, 1)))
    assert loss(None)["mean"] == 1
    values[3] = np.nan
    assert np.isnan(loss(None)["mean"])


def test_every_level_falls_into_its_bin_and_bins_without_levels_are_empty(config):
    config.diffusion.update(schedule="linear", num_timesteps=50)
    process = make_process(config.diffusion, config.data.image_size)
    first, count = (np.asarray(x) for x in heldout._levels_of_bins(process, 50))
    assert count.sum() == 50
    level = process.at(np.arange(50))
    log_snr = 2 * np.log(np.asarray(level.signal) / np.asarray(level.noise))
    for k in np.flatnonzero(count):
        inside = log_snr[first[k] : first[k] + count[k]]
        assert k == 0 or (inside >= heldout.EDGES[k]).all()
        assert k == 9 or (inside < heldout.EDGES[k + 1]).all()
    assert count[-1] == 0  # little noise is missing there
    mesh = mesh_of(config)
    params, index = state.fresh_params(config, mesh), np.arange(8, dtype=np.int32)
    image = np.zeros((8, 8, 8, 1), np.uint8)
    loss = heldout.jit_heldout_loss(config, mesh)(params, image, index, index)
    np.testing.assert_array_equal(np.isnan(loss), np.broadcast_to(count == 0, (8, 10)))


def test_training_and_evaluate_write_scores_with_their_definition(
    config, tmp_path, fake_network, monkeypatch, capsys
):
    config.eval.every_steps = 2
    mirror = mock.Mock(spec=wandb_mirror.Mirror)
    monkeypatch.setattr(wandb_mirror, "start", lambda *args: mirror)
    train.train(config, tmp_path)
    records = read_scores(tmp_path)
    sent = [call.args for call in mirror.scores.call_args_list]
    assert [step for step, _, _ in sent] == [2, 4]
    assert [record["step"] for record in records] == [2, 4]
    assert all(record["definition"]["n"] == 12 for record in records)
    shown = event_files.values(tmp_path / "tensorboard" / "scores")
    assert len(shown["scores/definition"]) == 2
    plotted = sorted(shown["scores/fid64"], key=lambda pair: pair[0])
    for (step, value), record, (_, scores, definition) in zip(plotted, records, sent, strict=True):
        assert step == record["step"]
        assert value.simple_value == np.float32(record["scores"]["fid64"])
        assert scores["scores/fid64"] == record["scores"]["fid64"] and "n 12" in definition

    restored, restore_item = [], checkpoint.restore_item
    monkeypatch.setattr(
        checkpoint, "restore_item", lambda *args: restored.append(args[1:3]) or restore_item(*args)
    )
    config.eval.checkpoints = "all"
    first = evaluate.evaluate(config, tmp_path)
    assert [record["step"] for record in first] == [2, 4]
    assert [call.args[0] for call in mirror.evaluated.call_args_list] == [2, 4]
    assert restored == [(2, "ema"), (2, "params"), (4, "ema"), (4, "params")]
    # Training has measured and kept the sets. The floor takes 20 of 30 samples once more.
    told = capsys.readouterr().out
    expected = (
        r"about 0:01:4\d: drawing 60 images 0:00:0\d, features of 100 images 0:01:40, "
        r"held-out losses of 80 images 0:00:0\d\ndrawing 30 images"
    )
    assert re.search(expected, told), told
    for record in first:
        assert {"fid64", "kid64", "precision64", "coverage64", "swd"} <= record["scores"].keys()
        assert "memorisation_ratio64" in record["scores"]
        assert record["definition"]["n"] == 30 and record["definition"]["weights"] == "ema"
        assert record["floor"]["n"] == 20
        assert record["heldout_loss"].keys() == {"ema", "raw"}
        assert len(record["heldout_loss"]["raw"]["bins"]) == 10
        assert record["checkpoint_sha256"] and record["config_sha256"] and record["device"]
    assert read_scores(tmp_path) == records + json.loads(json.dumps(first))
    measure.check_same_definition(first)

    # What is scored already is not scored again; other settings are.
    num_images = FakeExtractor.num_images
    (tmp_path / "samples").rename(tmp_path / "elsewhere")
    assert evaluate.evaluate(config, tmp_path) == first
    assert FakeExtractor.num_images == num_images

    plot = tmp_path / "swd.png"
    table = compare.compare([str(tmp_path)], score="swd", plot=str(plot))
    head, _, *rows = table.split("\n\n")[0].splitlines()
    assert head.startswith("| run | step | fid64 | kid64 |") and len(rows) == 2
    assert f"| {first[1]['scores']['fid64']:.4g} |" in rows[1] and "n 30, " in table
    assert plot.read_bytes().startswith(b"\x89PNG")

    config.sample.eta = 0.5
    config.eval.checkpoints = "3:"
    (other,) = evaluate.evaluate(config, tmp_path)
    assert other["step"] == 4 and other["definition"]["eta"] == 0.5
    with pytest.raises(ConfigError, match="eta is 1.0 and 0.5"):
        measure.check_same_definition([first[1], other])
    assert compare.main(["--runs", str(tmp_path)]) == 2
    assert compare.main(["--runs", str(tmp_path), "--num=12"]) == 0
    only = compare.compare([str(tmp_path)], step=2)
    assert only.count("\n| ") == 2 and f"| {first[0]['scores']['fid64']:.4g} |" in only
    assert "n 30" in only and compare.main(["--runs", str(tmp_path), "--step=4"]) == 2
    (tmp_path / "few").mkdir()
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    few = [line for line in lines if json.loads(line)["definition"]["n"] == 12]
    (tmp_path / "few/scores.jsonl").write_text("\n".join(few) + "\n")
    capsys.readouterr()
    compare.compare([str(tmp_path), str(tmp_path / "few")], step=2)
    assert f"{tmp_path / 'few'}: left out, with no such scores" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--ema_std is 0.1, but the scores are of 0; type --ema"):
        compare.compare([str(tmp_path)], ema_std=0.1)
    assert compare.main(["--runs", str(tmp_path), "--score=fud", "--num=12"]) == 2


def test_a_set_without_held_out_images_is_scored_without_them(
    tiny_config, trained, tmp_path, capsys
):
    workdir = shutil.copytree(trained, tmp_path / "copy")
    tiny_config.eval.metrics = ("swd",)
    tiny_config.eval.num = 8
    (record,) = evaluate.evaluate(tiny_config, workdir)
    assert "swd" in record["scores"] and record["heldout_loss"] == {} and "floor" not in record
    assert "digits has no split test (eval.heldout_split)" in capsys.readouterr().err
    assert "network" not in record["definition"]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"checkpoints": "many"}, "expected newest, all, a step or a range"),
        ({"checkpoints": "90:"}, "holds the steps .*type --config.eval.checkpoints=all"),
        ({"checkpoints": "3"}, "holds the steps .2, 4.; type --config.eval.checkpoints=all"),
        (
            {"reference": "/nowhere"},
            "eval.reference /nowhere is no set; .*type --config.eval.reference=PATH",
        ),
        ({"num": 4, "metrics": ("density_coverage",)}, "needs at least 6 images"),
    ],
)
def test_what_cannot_be_scored_is_refused(config, tmp_path_factory, fake_network, fields, words):
    workdir = tmp_path_factory.getbasetemp() / "refused"
    if not workdir.exists():
        train.train(config, workdir)
    config.eval.update(fields)
    with pytest.raises(ConfigError, match=words):
        evaluate.evaluate(config, workdir)


def test_the_scores_are_told_in_one_line_with_n_and_sampler(config):
    definition = {"n": 10_000, "weights": "ema", "sampler": "ddim", "steps": 50, "eta": 0.0}
    definition |= {"spacing": "timestep", "guidance_scale": 1.0, "reference_sha256": "ab" * 32}
    record = {"step": 7, "scores": {"fid768": 0.5}, "heldout_loss": {}, "definition": definition}
    assert described_scores(record) == (
        "step 7: fid768 0.5 (n 10,000; ema, ddim 50 timestep, eta 0, guidance 1; reference "
        "abababab; network none)"
    )


def test_the_training_split_is_no_held_out_split(config, tmp_path, fake_network, capsys):
    config.data.split = "test"
    config.train.num_steps, config.eval.num, config.eval.metrics = 1, 10, ("fid", "memorisation")
    train.train(config, tmp_path)
    (record,) = evaluate.evaluate(config, tmp_path)
    assert "floor" not in record and record["heldout_loss"] == {}
    assert "is the split of the training images" in capsys.readouterr().err
    config.eval.heldout_split = "tset"
    with pytest.raises(ConfigError, match="eval.heldout_split is 'tset'; .*heldout_split=test"):
        evaluate.evaluate(config, tmp_path)


def test_other_images_in_the_same_place_are_scored_again(config, tmp_path, fake_network):
    config.train.num_steps, config.eval.num, config.eval.metrics = 1, 10, ("fid",)
    train.train(config, tmp_path / "w")
    config.eval.reference = str(tmp_path / "images")
    scored = []
    for seed in (0, 1):
        (tmp_path / "images").mkdir(exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 8, 8, 1), np.uint8)
        for i, image in enumerate(pixels):
            images.save_png(tmp_path / "images" / f"{i}.png", image)
        (record,) = evaluate.evaluate(config, tmp_path / "w")
        scored.append(record["scores"]["fid64"])
    assert scored[0] != scored[1] and len(read_scores(tmp_path / "w")) == 2


def test_a_resumed_run_drops_what_it_scored_beyond_its_checkpoint(config, tmp_path, fake_network):
    config.eval.update(every_steps=1, metrics=("fid",))
    config.train.num_steps = 4
    train.train(config, tmp_path)
    assert [r["step"] for r in read_scores(tmp_path)] == [1, 2, 3, 4]
    assert len(list((tmp_path / "tensorboard" / "scores").iterdir())) == 4
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    config.eval.every_steps = 4
    train.train(config, tmp_path)
    assert [r["step"] for r in read_scores(tmp_path)] == [1, 2, 4]
    shown = event_files.values(tmp_path / "tensorboard" / "scores")
    assert sorted(step for step, _ in shown["scores/fid64"]) == [1, 2, 4]


def test_scores_in_training_need_a_batch_of_samples_that_suits_the_devices(config):
    config.eval.every_steps = 1
    with pytest.raises(ConfigError, match="sample.batch_size is 8; expected a multiple of 3"):
        validate_devices(config, 3, "train")


def test_a_held_out_split_without_labels_is_refused_for_a_model_with_classes(config, monkeypatch):
    config.model.num_classes, config.eval.metrics = 10, ("swd",)
    scorer = evaluation.Evaluation(config, mesh_of(config))
    params, source = state.fresh_params(config, mesh_of(config)), scorer._heldout._source
    unlabelled = [e | {"label": np.int32(-1)} for e in (source[i] for i in range(20))]
    monkeypatch.setattr(type(source), "__getitem__", lambda _, i: unlabelled[i])
    says = "has no labels, .* type --config.eval.heldout_split"
    with pytest.raises(ConfigError, match=says):
        scorer.heldout_loss(params)
    with pytest.raises(ConfigError, match=says):  # before anything is trained
        evaluation.Evaluation(config, mesh_of(config))


def test_held_out_images_that_the_model_has_seen_are_refused_before_it_trains(config, fake_network):
    config.eval.metrics = ("memorisation",)
    scorer = evaluation.Evaluation(config, mesh_of(config))
    scorer._sets["heldout"] = scorer._sets["training"]
    with pytest.raises(ConfigError, match="also training images; .* --config.eval.heldout_split"):
        scorer.measure_sets()


def test_the_feature_network_is_refused_for_images_that_it_cannot_read(config, monkeypatch):
    for name in ("reference_set", "open_heldout"):
        monkeypatch.setattr(score_sets, name, lambda config: None)
    config.data.channels, config.eval.metrics = 4, ("fid",)
    with pytest.raises(ConfigError, match="data.channels is 4, .* type --config.eval.metrics"):
        evaluation.Evaluation(config, mesh_of(config))


def test_hosts_that_would_score_with_other_sets_are_refused(config, fake_network, monkeypatch):
    monkeypatch.setattr(distributed, "agreed", lambda numbers: [n + 1 for n in numbers])
    with pytest.raises(ConfigError, match="are not those of process 0; .* type paths on a file"):
        evaluation.Evaluation(config, mesh_of(config))
