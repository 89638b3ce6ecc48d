"""What scores a run's images and weights, in training and in --mode=evaluate.

Scores of images come from `quality`, with the training images (or `eval.reference`) as reference.
The split `eval.heldout_split`, where the data set has one, gives the held-out loss by noise level,
the floor that no model can beat, and the check for memorised images.
"""

import dataclasses
import time

import jax
import numpy as np

from maskdm_jax import draw, heldout, sharding
from maskdm_jax.config import default_config
from maskdm_jax.data import sources
from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import frechet, inception, measure, reference, score, swd
from maskdm_jax.run import distributed, progress, telemetry

# What two scores must share to be compared, besides the set and the features.
_SETTINGS = (
    "sampler", "spacing", "steps", "eta", "guidance_scale", "label", "seed", "weights", "ema_std",
)  # fmt: skip


def for_training(config):
    """The config of `Evaluation.in_training`: few images, in the steps of a preview."""
    config = config.copy_and_resolve_references()
    config.sample.update(
        num=config.eval.num_in_training,
        steps=config.sample.preview_steps,
        weights="ema",
        ema_std=0.0,
    )
    return config


class Evaluation:
    """Scores images and weights of one run.

    Process 0 measures images, on its own devices; the held-out loss is computed on all of them.
    """

    def __init__(self, config, mesh):
        """Opens the sets, and measures those that samples are compared with.

        Args:
          config: the run's; its `eval` fields say what to compute.
          mesh: the devices of the held-out loss.

        Raises:
          ConfigError: for a reference, weights or metrics that cannot give the scores.
        """
        self._config, self._mesh = config, mesh
        sets = {"reference": _reference(config)}  # its errors first
        self._heldout = _open_heldout(config)
        self._draw = None
        self._loss = heldout.jit_heldout_loss(config, mesh)
        self._metrics = _metrics(config, self._heldout)
        if not distributed.is_main():
            return
        layers = measure.layers(self._metrics, [config.eval.features])
        self._weights = None
        if layers:
            flag = "--config.eval.inception_weights"
            self._weights = score.load_weights(config.eval.inception_weights, layers, flag)
        if self._heldout is not None:
            sets["heldout"] = _as_set(config, self._heldout)
        if "memorisation" in self._metrics:  # of the images that the model has seen
            sets["training"] = _as_set(config, sources.open_source(config))
        self._check(sets)
        self._extract = None
        if layers:
            self._extract = inception.Extractor(self._weights, layers, config.sample.batch_size)
        self._measured = {
            name: score.from_statistics(opened, "eval.reference", layers, self._weights)
            if isinstance(opened, frechet.Statistics)
            else self._measure(opened)
            for name, opened in sets.items()
        }

    def image_scores(self, samples: reference.Images) -> dict:
        """Scores of drawn images; call it on process 0 alone.

        Returns:
          {"scores": {name: value}, "definition", "warnings"} and, with held-out images and fid,
          "floor": their own fid, and that of as many samples.
        """
        ref, kept = self._measured["reference"], self._measured.get("heldout")
        measured = self._measure(samples)
        found = {
            "scores": self._scores(measured),
            "definition": self.definition(measured.count),
            "warnings": measure.bias_warnings(measured, ref) if "fid" in self._metrics else [],
        }
        if kept is not None and "fid" in self._metrics:
            count = min(samples.count, kept.count)
            held = _as_set(self._config, self._heldout)
            found["floor"] = {"n": count} | {
                name: measure.scores(self._first(whole, opened, count), ref, ["fid"])
                for name, whole, opened in (
                    ("heldout", kept, held),
                    ("samples", measured, samples),
                )
            }
        return found

    def definition(self, count: int) -> dict:
        """What the scores of `count` samples share with those that they may be compared with."""
        names = ("reference", "heldout", "training")
        ref, kept, seen = (self._measured.get(name) for name in names)
        shape = (*self._config.data.image_size, self._config.data.channels)
        samples = dataclasses.replace(ref, count=count, shape=shape)
        found = measure.definition(samples, ref, self._metrics, self._weights, kept)
        if seen is not None:
            found["training_sha256"] = seen.sha256
        settings = {name: self._config.sample[name] for name in _SETTINGS}
        return found | settings | {"crop": self._config.data.crop}

    def _scores(self, measured):
        ref, kept = self._measured["reference"], self._measured.get("heldout")
        others = [name for name in self._metrics if name != "memorisation"]
        found = measure.scores(measured, ref, others)
        if seen := self._measured.get("training"):
            found |= measure.scores(measured, seen, ["memorisation"], kept)
        return found

    def _first(self, whole, opened, count):
        """The first `count` images of a set of which all are measured already."""
        if whole.count == count:
            return whole
        return self._measure(dataclasses.replace(opened, count=count), ["fid"])

    def heldout_loss(self, params) -> dict | None:
        """{"mean", "bins": {bin of ln SNR: loss}, "n"} of weights; None without held-out images.

        Every process calls it with the same weights.
        """
        if self._heldout is None:
            return None
        size, count = self._config.sample.batch_size, len(self._heldout)
        by_batch = sharding.batch_sharding(self._mesh)
        rows = sharding.local_rows(by_batch, size)
        total = np.zeros(heldout.NUM_BINS)
        for first in range(0, count, size):
            index_B = np.arange(first, first + size, dtype=np.int32)
            # The last batch is padded: one shape is compiled.
            examples = [self._heldout[int(i) % count] for i in index_B[rows]]
            image, label = (np.stack([e[k] for e in examples]) for k in ("image", "label"))
            if self._config.model.num_classes and label.min() < 0:
                raise ConfigError(
                    f"eval.heldout_split {self._heldout.split} of {self._config.data.name} has no "
                    "labels, which this model needs; type --config.eval.heldout_split=validation, "
                    "or ='' for none"
                )
            local = (image, label, index_B[rows])
            arrays = [jax.make_array_from_process_local_data(by_batch, x) for x in local]
            values = np.asarray(self._loss(params, *arrays), np.float64)
            total += values[: count - first].sum(0)
        bins = total / count
        return {
            "n": count,
            "schedule": self._config.diffusion.schedule,
            "num_timesteps": self._config.diffusion.num_timesteps,
            "mean": float(np.nanmean(bins)),
            "bins": dict(zip(heldout.NAMES, bins.tolist(), strict=True)),
        }

    def in_training(self, step: int, ema) -> dict:
        """Draws `eval.num_in_training` images from the EMA, and scores them and its held-out loss.

        Every process calls it; the record is process 0's alone.
        """
        start, config = time.perf_counter(), self._config
        by_batch = sharding.batch_sharding(self._mesh)
        if self._draw is None:
            self._draw = draw.jit_draw(config, self._mesh, by_batch)
        size, num = config.sample.batch_size, config.sample.num
        batches = draw.in_batches(self._draw, ema, range(num), size, by_batch)
        drawn = np.concatenate([image_BHWC for _, image_BHWC in batches])
        loss = self.heldout_loss(ema)
        if not distributed.is_main():
            return {}
        samples = reference.Images("the samples", drawn.shape[1:], num, drawn.__getitem__)
        return {
            "step": step,
            "key": f"{telemetry.TRAINING}{step}",
            **self.image_scores(samples),
            "heldout_loss": {} if loss is None else {"ema": loss},
            "seconds": round(time.perf_counter() - start, 1),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        }

    def _measure(self, opened, metrics=None):
        size = self._config.sample.batch_size
        num_batches = -(-opened.count // size)
        what = f"measuring {opened.path}"
        batches = progress.track(opened.batches(size), num_batches, what, f"batches of {size}")
        return measure.measure(batches, self._extract, metrics or self._metrics, opened.path)

    def _check(self, sets):
        config, num = self._config, self._config.sample.num
        shape = (*config.data.image_size, config.data.channels)
        samples = reference.Images("the samples", shape, num, None)
        for opened in (samples, *sets.values()):
            if not isinstance(opened, frechet.Statistics):
                reference.check_comparable(samples, opened)
                measure.check_enough(opened.path, opened.count, self._metrics)
                _check_side(opened, self._metrics)
            elif set(self._metrics) - {"memorisation"} != {"fid"}:
                raise ConfigError(
                    f"eval.reference {config.eval.reference} holds statistics, which give fid "
                    "alone; type --config.eval.metrics=\"('fid',)\""
                )


def _check_side(opened, metrics):
    if "swd" in metrics and min(opened.shape[:2]) < swd.PATCH:
        raise ConfigError(
            f"swd compares patches of {swd.PATCH} pixels, but {opened.path} has images of "
            f"{opened.shape[0]}x{opened.shape[1]}; type --config.eval.metrics=\"('fid',)\""
        )


def _reference(config):
    if config.eval.reference:
        return reference.open_set(config.eval.reference, "eval.reference")
    whole = config.copy_and_resolve_references()
    whole.data.fraction = 1.0
    return _as_set(config, sources.open_source(whole))


def _as_set(config, source):
    name = f"{config.data.name}, split {source.split}"
    return reference.Images(
        name, source.image_shape, len(source), lambda index: source[index]["image"]
    )


def _open_heldout(config):
    """The held-out split; None, with a remark, if the data set has none."""
    split = config.eval.heldout_split
    if not split:
        return None
    if split == config.data.split:
        progress.remark(
            f"eval.heldout_split {split} is the split of the training images: scores come without "
            "held-out loss, floor and memorisation"
        )
        return None
    held = config.copy_and_resolve_references()
    held.data.update(split=split, fraction=1.0)
    try:
        return sources.open_source(held)
    except sources.NoSplitError as error:
        if split != default_config().eval.heldout_split:
            raise ConfigError(str(error).replace("data.split", "eval.heldout_split")) from error
        progress.remark(
            f"{config.data.name} has no split {split} (eval.heldout_split): scores come without "
            "held-out loss, floor and memorisation"
        )
        return None


def _metrics(config, heldout_source):
    """The metrics of the config that can be computed."""
    metrics = tuple(config.eval.metrics)
    if heldout_source is None:
        metrics = tuple(name for name in metrics if name != "memorisation")
    return metrics
