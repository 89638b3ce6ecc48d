"""What scores a run's images and weights, in training and in --mode=evaluate.

Scores of images come from `quality`, with the training images (or `eval.reference`) as reference.
The split `eval.heldout_split`, where the data set has one, gives the held-out loss by noise level,
the floor that no model can beat, and the check for memorised images.
"""

import copy
import dataclasses
import socket
import time

import jax
import numpy as np

from maskdm_jax import draw, draw_batches, heldout, score_sets, sharding
from maskdm_jax.config import FIELDS, differences, get
from maskdm_jax.data import sources
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import MEANING, SHAPE
from maskdm_jax.quality import (
    frechet,
    inception,
    kept,
    measure,
    neighbours,
    reference,
    score,
    swd,
)
from maskdm_jax.run import distributed, progress, telemetry

# What two scores must share to be compared, besides the set and the features. Of the later fields,
# a definition holds those that are not at their default, so earlier scores remain comparable.
_SETTINGS = (
    "sampler", "spacing", "steps", "eta", "guidance_scale", "label", "seed", "weights", "ema_std",
)  # fmt: skip
_LATER = ("recompute_eps", "threshold", "guidance_interval")


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
    """Scores images and weights of one run, on all devices.

    With several processes, all call every method alike: each decodes its share of the images, and
    process 0 computes the scores.
    """

    def __init__(self, config, mesh):
        """Opens the sets that samples are compared with; `measure_sets` measures them.

        Args:
          config: the run's; its `eval` fields say what to compute.
          mesh: all devices.

        Raises:
          ConfigError: for a reference, weights or metrics that cannot give the scores.
        """
        self._config, self._mesh = config, mesh
        self._by_batch = sharding.batch_sharding(mesh)
        self._sets = {"reference": score_sets.reference_set(config)}  # its errors first
        source = score_sets.open_heldout(config)
        self._heldout = None if source is None else heldout.HeldoutLoss(config, mesh, source)
        self._draw = None
        self._metrics = _metrics(config, source)
        self._layers = measure.layers(self._metrics, [config.eval.features])
        self._weights = None
        if self._layers:
            if config.data.channels not in (1, 3):
                raise ConfigError(
                    f"data.channels is {config.data.channels}, but the feature network of the "
                    f"metrics {', '.join(self._metrics)} reads grey or colour images; type "
                    "--config.eval.metrics=\"('swd',)\""
                )
            flag = "--config.eval.inception_weights"
            self._weights = score.load_weights(config.eval.inception_weights, self._layers, flag)
        if source is not None:
            self._sets["heldout"] = score_sets.as_set(config, source)
        if "memorisation" in self._metrics:  # of the images that the model has seen
            self._sets["training"] = score_sets.as_set(config, sources.open_source(config))
        self._check()
        self._check_alike()
        if self._has_floor() and config.sample.num < self._sets["heldout"].count:
            held = self._sets["heldout"]  # as many as there are samples
            self._sets["floor"] = dataclasses.replace(held, count=config.sample.num)
        self._extract = None
        if self._layers:
            self._extract = inception.Extractor(
                self._weights, self._layers, config.sample.batch_size, list(mesh.devices.flat)
            )
        self._measured = {}

    def of_phase(self, config) -> "Evaluation":
        """The same, with the sets that are measured already, for another phase of the run."""
        other = copy.copy(self)
        other._config = config
        if differences(config, self._config, (SHAPE, MEANING)):  # another network
            other._draw = None
            if self._heldout is not None:
                other._heldout = self._heldout.of_config(config)
        return other

    @property
    def has_heldout(self) -> bool:
        """Whether there are held-out images, and so a held-out loss."""
        return self._heldout is not None

    def measure_sets(self) -> None:
        """Measures the sets that samples are compared with, or reads what an earlier start kept.

        Raises:
          ConfigError: for sets that cannot give the scores: before a run trains until its first.
        """
        for name, opened in self._sets.items():
            if name in self._measured:
                continue
            if isinstance(opened, frechet.Statistics):
                found = score.from_statistics(opened, "eval.reference", self._layers, self._weights)
            else:
                found = self._kept_or_measured(name, opened)
            self._measured[name] = found
        if "training" in self._sets and distributed.is_main():
            sets = (self._measured[name] for name in ("training", "heldout"))
            neighbours.unseen_distances(*(s.features[self._config.eval.features] for s in sets))

    def seconds(self, num_records: int, params) -> dict[str, float]:
        """How long the sets and `num_records` scored checkpoints take, but for drawing and reading.

        Measured by a warm batch of each.

        Args:
          num_records: checkpoints to score, with `sample.num` images each.
          params: any weights of the model.

        Returns:
          {what, in words: seconds}.
        """
        found, config = {}, self._config
        if self._extract is not None:
            unmeasured = {  # by path: the training images may be the reference, too
                self._path(name) or name: opened.count
                for name, opened in self._sets.items()
                if isinstance(opened, reference.Images)
                and name not in self._measured
                and not self._is_kept(name)
            }
            (count,) = distributed.agreed([sum(unmeasured.values())])
            count += num_records * (config.sample.num + self._num_floor_samples())
            if count:
                shape = (*config.data.image_size, config.data.channels)
                each = self._extract.seconds_per_image(shape)
                found[f"features of {count:,} images"] = count * each
        if self._heldout is not None and num_records:
            count = 2 * num_records * self._sets["heldout"].count  # of two kinds of weights
            each = self._heldout.seconds_per_image(params)
            found[f"held-out losses of {count:,} images"] = count * each
        return found

    def image_scores(self, samples: reference.Images) -> dict:
        """Scores of drawn images, after `measure_sets`.

        Returns:
          {"scores": {name: value}, "definition", "warnings"} and, with held-out images and fid,
          "floor": their own fid, and that of as many samples. {} except on process 0.
        """
        whole = first = self._measure(samples, self._metrics)
        if num := self._num_floor_samples():
            first = self._measure(dataclasses.replace(samples, count=num), ("fid",))
        if not distributed.is_main():
            return {}
        ref, fid = self._measured["reference"], "fid" in self._metrics
        found = {
            "scores": self._scores(whole),
            "definition": self.definition(whole.count),
            "warnings": measure.bias_warnings(whole, ref) if fid else [],
        }
        if self._has_floor():
            held = self._measured.get("floor", self._measured["heldout"])
            found["floor"] = {
                "n": held.count,
                "heldout": measure.scores(held, ref, ["fid"]),
                "samples": measure.scores(first, ref, ["fid"]),
            }
        return found

    def definition(self, count: int) -> dict:
        """What the scores of `count` samples share with those that they may be compared with.

        Process 0 alone knows it, after `measure_sets`.
        """
        names = ("reference", "heldout", "training")
        ref, held, seen = (self._measured.get(name) for name in names)
        shape = (*self._config.data.image_size, self._config.data.channels)
        samples = dataclasses.replace(ref, count=count, shape=shape)
        found = measure.definition(samples, ref, self._metrics, self._weights, held)
        if seen is not None:
            found["training_sha256"] = seen.sha256
        settings = {name: self._config.sample[name] for name in _SETTINGS}
        for name in _LATER:
            if (value := get(self._config, f"sample.{name}")) != FIELDS[f"sample.{name}"].default:
                settings[name] = list(value) if isinstance(value, tuple) else value
        return found | settings | {"crop": self._config.data.crop}

    def _scores(self, measured):
        ref, held = self._measured["reference"], self._measured.get("heldout")
        others = [name for name in self._metrics if name != "memorisation"]
        found = measure.scores(measured, ref, others)
        if seen := self._measured.get("training"):
            found |= measure.scores(measured, seen, ["memorisation"], held)
        return found

    def _has_floor(self):
        return "heldout" in self._sets and "fid" in self._metrics

    def _num_floor_samples(self):
        """How many samples are measured once more for the floor; 0 if it is of all."""
        count = self._sets["heldout"].count if self._has_floor() else 0
        return count if count < self._config.sample.num else 0

    def heldout_loss(self, params) -> dict | None:
        """`heldout.HeldoutLoss` of weights; None without held-out images."""
        return None if self._heldout is None else self._heldout(params)

    def in_training(self, step: int, ema) -> dict:
        """Draws `eval.num_in_training` images from the EMA, and scores them and its held-out loss.

        Every process calls it; the record is process 0's alone.
        """
        start, config = time.perf_counter(), self._config
        if self._draw is None:
            self._draw = draw_batches.Drawing(config, self._mesh)
        num = config.sample.num
        with progress.Progress("drawing", num, "images") as shown:
            batches = self._draw.in_batches(ema, range(num), shown)
            drawn = np.concatenate([image_BHWC for _, image_BHWC in batches])
        loss = self.heldout_loss(ema)
        samples = reference.Images("the samples", drawn.shape[1:], num, drawn.__getitem__)
        found = self.image_scores(samples)
        if not distributed.is_main():
            return {}
        return {
            "step": step,
            "key": f"{telemetry.TRAINING}{step}",
            **found,
            "evaluations": draw.evaluations(config),
            "heldout_loss": {} if loss is None else {"ema": loss},
            "seconds": round(time.perf_counter() - start, 1),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        }

    def _measure(self, opened, metrics, extract=True):
        size, threads = self._config.sample.batch_size, self._config.data.num_threads
        batches = opened.batches(size, self._by_batch, threads)
        num_batches = -(-opened.count // size)
        what = f"measuring {opened.path}"
        tracked = progress.track(batches, num_batches, what, f"batches of {size}")
        metrics = metrics if distributed.is_main() else ()  # the others keep nothing
        return measure.measure(tracked, self._extract if extract else None, metrics, opened.path)

    def _path(self, name):
        """Where what is measured of a set is kept; None if it is not."""
        opened = self._sets[name]
        if not self._layers or isinstance(opened, frechet.Statistics) or not opened.keep_as:
            return None
        sha256 = self._weights.sha256
        return kept.path_of(
            opened.keep_as, opened.count, self._metrics_of(name), self._layers, sha256
        )

    def _is_kept(self, name):
        path = self._path(name)
        return path is not None and path.exists()

    def _metrics_of(self, name):
        return ("fid",) if name == "floor" else self._metrics

    def _kept_or_measured(self, name, opened):
        """A measured set; one that was read from its file is on process 0 alone."""
        metrics, path = self._metrics_of(name), self._path(name)
        found = kept.read(path) if path and distributed.is_main() else None
        (is_kept,) = distributed.agreed([found is not None])
        if not is_kept:
            found = self._measure(opened, metrics)
            if path and distributed.is_main():
                kept.write(path, found)
        elif "swd" in metrics:
            first = dataclasses.replace(opened, count=min(opened.count, swd.MAX_IMAGES))
            images = self._measure(first, ("swd",), extract=False).images
            found = found and dataclasses.replace(found, images=images)
        return found

    def _check_alike(self):
        """Refuses processes that would measure different sets, or with different weights."""
        images = [s for s in self._sets.values() if isinstance(s, reference.Images)]
        mine = [opened.count for opened in images]
        mine += [int(self._weights.sha256[:6], 16)] if self._weights else []
        if distributed.agreed(mine) != mine:
            raise ConfigError(
                f"the images or weights to score with on {socket.gethostname()} are not those of "
                "process 0; expected the same data set, eval.reference and eval.inception_weights "
                "on every host; type paths on a file system that all hosts share"
            )

    def _check(self):
        config, num = self._config, self._config.sample.num
        shape = (*config.data.image_size, config.data.channels)
        samples = reference.Images("the samples", shape, num, None)
        for opened in (samples, *self._sets.values()):
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


def _metrics(config, heldout_source):
    """The metrics of the config that can be computed."""
    metrics = tuple(config.eval.metrics)
    if heldout_source is None:
        metrics = tuple(name for name in metrics if name != "memorisation")
    return metrics
