"""The Python interface: a trained model from a checkpoint, its predictions, samples and scores.

    model = maskdm_jax.load("W2")
    x0, eps = model.predict(x_t, t)
    images = model.sample(64)

It is for one process, such as a notebook, and uses all of its devices. docs/api.md has examples.
"""

import hashlib
import inspect
import json
import math
import pathlib
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from maskdm_jax import arguments, denoiser, draw, evaluation, sharding, trained
from maskdm_jax.api_sampling import Sampling
from maskdm_jax.diffusion import make_process
from maskdm_jax.diffusion.process import invert, network_input, noised, to_device, x0_and_eps
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import patches, uvit
from maskdm_jax.model.sizes import grid_shape
from maskdm_jax.quality import reference as reference_lib


class Model(Sampling):
    """A trained model; `load` makes it. The methods that draw images are those of `Sampling`.

    Attributes:
      config: of the training, with the fields that `load` was given; do not change it.
      params: the network's parameters, a tree of float32 arrays.
      step: updates of the checkpoint; None for an official file that does not say.
      image_shape: (height, width, channels).
      num_timesteps: T; None for EDM.
      num_classes: 0 for an unconditional model.
      num_patches: N, patches of an image, numbered row by row.
    """

    def __init__(self, network: trained.Trained):
        """Compiles nothing yet; the first call of each method does."""
        config, params, self.step, self._sha256 = network
        super().__init__(config, params)
        edm = config.diffusion.framework == "edm"
        self.num_timesteps: int | None = None if edm else config.diffusion.num_timesteps
        self.num_classes: int = config.model.num_classes
        self.num_patches = math.prod(grid_shape(config.data.image_size, config.model.patch_size))
        self._process = make_process(config.diffusion, config.data.image_size)
        self._predict = jax.jit(
            _make_predict(config, self._mesh, self._process),
            compiler_options=sharding.compiler_options(self._mesh),
        )

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        count = sum(x.size for x in jax.tree.leaves(self.params))
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        return f"<maskdm_jax.Model: {shape}, {classes}, {count:,} parameters, step {self.step}>"

    def predict(
        self,
        x_t: ArrayLike,
        t: ArrayLike,
        label: ArrayLike | None = None,
        visible_ids: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The model's estimates of the clean image and of the noise in `x_t`.

        Args:
          x_t: noisy images, float [B, H, W, C], such as `add_noise` makes from images in [-1, 1];
            with `visible_ids`, noisy patches [B, V, P] of (row, column, channel) values.
          t: timesteps, ints of 0 .. T - 1, one for all images or [B]; for EDM sigmas, floats above
            0: the noise's standard deviation on images in [-1, 1].
          label: classes, ints of 0 .. num_classes - 1, one for all images or [B]; num_classes, or
            None for all images, means "no class".
          visible_ids: patch numbers, ints of 0 .. N - 1, [B, V], for `x_t` in the same order; not
            at levels where the model reads coarse tokens (`model.coarse`).

        Returns:
          (x0, eps), float32 of `x_t`'s shape: x_t = signal x0 + noise eps at t. x0 is not clipped.

        Raises:
          ConfigError: for arguments of another shape, dtype or range.
        """
        x_t = arguments.floats("x_t", x_t)
        if visible_ids is None:
            arguments.check_shape("x_t", x_t, ("B", *self.image_shape))
        else:
            arguments.check_shape("visible_ids", visible_ids, ("B", "V"))
            values = patches.patch_dim(self.config.model.patch_size, self.image_shape[2])
            arguments.check_shape("x_t", x_t, (*np.shape(visible_ids), values))
            visible_ids = arguments.ids(
                "visible_ids", visible_ids, self.num_patches, np.shape(visible_ids)
            )
        batch = x_t.shape[0]
        t_B = self._times(t, batch)
        label_B = self._labels(label, batch)
        if visible_ids is not None and self.config.model.coarse:
            self._check_reads_patches(t_B)
        return self._predict(self.params, *self._placed(x_t, t_B, label_B, visible_ids))

    def _check_reads_patches(self, t_B):
        level, first = self._process.at(jnp.asarray(t_B)), denoiser.tiers(self.config)[0]
        if np.any(level.noise / level.signal > first.high):
            raise ConfigError(
                f"t has {t_B.max()} with visible_ids, but above noise / signal of {first.high:g} "
                "this model reads coarse tokens; expected less noise; type other t, or leave out "
                "visible_ids"
            )

    def add_noise(self, x0: ArrayLike, eps: ArrayLike, t: ArrayLike) -> jax.Array:
        """x_t = signal x0 + noise eps, float32 of x0's shape.

        Args:
          x0: clean images in [-1, 1], or their patches: float [B, ...].
          eps: unit normal noise of x0's shape.
          t: as for `predict`.
        """
        x0, eps = arguments.floats("x0", x0), arguments.floats("eps", eps)
        arguments.check_shape("eps", eps, x0.shape)
        level = self._process.at(jnp.asarray(self._times(t, x0.shape[0])))
        return noised(level, x0, eps)

    def score(
        self,
        num: int,
        reference: str | pathlib.Path | None,
        features: int = 768,
        *,
        metrics: tuple[str, ...] = ("fid",),
        inception_weights: str | pathlib.Path = "",
        **settings,
    ) -> dict:
        """Draws images and scores them against a set of real ones; see docs/scores.md.

        Args:
          num: images to draw, at least 2; thousands for a score that means something.
          reference: a folder, a zip, a prepared set, or an .npz of statistics; None for the
            training images of `config.data`.
          features: 2048, 768, 192 or 64.
          metrics: names in `quality.measure.METRICS`, except "memorisation".
          inception_weights: file of the feature network; empty: downloaded once, if it is needed.
          settings: of the drawing, as for `sample`.

        Returns:
          A record as in scores.jsonl, without a held-out loss: "step", "scores" {name: value},
          "definition", "warnings", the hashes of checkpoint and config, "seconds" and "device".

        Raises:
          ConfigError: for a value that cannot work, or sets or weights that give no such score.
        """
        start = time.perf_counter()
        config = self._configured(num, **settings)
        given = {
            "eval.num": num,
            "eval.reference": str(reference or ""),
            "eval.features": features,
            "eval.metrics": metrics,
            "eval.inception_weights": str(inception_weights),
            "eval.heldout_split": "",
        }
        with arguments.said_in_python(self.score):
            arguments.change(config, given)
            if "memorisation" in config.eval.metrics:
                raise ConfigError(
                    "memorisation needs held-out images, which evaluating a run reads; type "
                    "metrics=('fid',)"
                )
            scorer = evaluation.Evaluation(config, self._mesh)
            scorer.measure_sets()
            drawn = self._drawn(config)
            samples = reference_lib.Images("the samples", drawn.shape[1:], num, drawn.__getitem__)
            found = scorer.image_scores(samples)
        return {
            "step": self.step,
            **found,
            "evaluations": draw.evaluations(config),
            "heldout_loss": {},
            "checkpoint_sha256": self._sha256,
            "config_sha256": hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest(),
            "seconds": round(time.perf_counter() - start, 1),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        }

    def _times(self, t, batch):
        if self.num_timesteps is None:
            return arguments.sigmas("t", t, (batch,))
        return arguments.ids("t", t, self.num_timesteps, (batch,))

    def _labels(self, label, batch):
        if not self.num_classes:
            if label is not None:
                raise ConfigError(
                    f"label is {label!r}, but this model has no classes; leave it out"
                )
            return None
        label = self.num_classes if label is None else label
        return arguments.ids("label", label, self.num_classes + 1, (batch,))

    def _placed(self, *arrays):
        """The arrays split over the devices, or whole on each if these do not divide the batch."""
        by_batch = arrays[0].shape[0] % self._mesh.size == 0
        where = (sharding.batch_sharding if by_batch else sharding.replicated)(self._mesh)
        return [None if x is None else jax.device_put(x, where) for x in arrays]


def load(
    path: str | pathlib.Path,
    *,
    step: int | None = None,
    weights: str = "ema",
    fields: Mapping[str, object] | None = None,
) -> Model:
    """The model of a run, or of an official PyTorch checkpoint.

    Args:
      path: a run's workdir, its folder of checkpoints or one of them, or an official .pt file.
      step: the checkpoint's; None for the newest that is whole.
      weights: "ema", their average, or "raw".
      fields: config fields by name that differ from the training's: how to compute
        (`{"model.dtype": "float32"}`), or what an official file does not hold: "model.num_heads"
        (if width and depth are not those of a named size), "data.image_size" (if not square), and
        the noise schedule (if the file has no betas).

    Raises:
      ConfigError: if there is no such checkpoint, if it is damaged, or for fields that it
        contradicts or that are arguments of a method, such as `sample`.
    """
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise ConfigError(
            f"fields is {fields!r}; expected a dict of config fields; type "
            "fields={'model.dtype': 'float32'}"
        )
    drawing = inspect.signature(Model.sample).parameters
    given = {"weights": "load", "strength": "image_to_image"} | dict.fromkeys(drawing, "sample")
    for name, method in given.items():
        if f"sample.{name}" in fields:  # it would be recorded, and have no effect
            raise ConfigError(
                f"fields holds sample.{name}, which is an argument of {method}; leave it out, and "
                f"type {method}(..., {name}={fields[f'sample.{name}']!r})"
            )
    with arguments.said_in_python(load):
        return Model(trained.read(path, step, weights, fields))


def _make_predict(config, mesh, process):
    model, whole = uvit.make_model(config, mesh), denoiser.make_predict(config, mesh, process)
    patch_size, image_size = config.model.patch_size, config.data.image_size
    inverse_at = _make_inverse(config.diffusion, process)

    def predict(params, x_t, t_B, label_B, visible_BV):
        x_BVP = patches.patchify(x_t, patch_size) if visible_BV is None else x_t
        level = process.at(t_B)
        given = params, network_input(level, x_BVP), level.time
        if visible_BV is None:
            output = whole(*given, label_B)
        else:
            output = uvit.apply(model, *given, visible_BV=visible_BV, label_B=label_B)
        at_t = jax.tree.map(lambda x: x[:, None, None], inverse_at(t_B))
        estimates = x0_and_eps(at_t, x_BVP, output)
        if visible_BV is not None:
            return estimates
        return tuple(patches.unpatchify(x, patch_size, image_size) for x in estimates)

    return predict


def _make_inverse(diffusion, process):
    """t_B -> the `Inverse` of each level, float32 [B]."""
    if diffusion.framework == "edm":  # whose coefficients are no differences of large numbers
        return lambda t_B: invert(process.at(t_B))
    # In float64 for every t; a walk of T steps begins at T - 1.
    num_timesteps = diffusion.num_timesteps
    table = jax.tree.map(
        lambda x: to_device(np.broadcast_to(x, num_timesteps)[::-1]),
        invert(process.ladder(num_timesteps, "timestep")),
    )
    return lambda t_B: jax.tree.map(lambda x: x[t_B], table)
