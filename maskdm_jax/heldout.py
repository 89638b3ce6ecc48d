"""The held-out loss by noise level: the mean squared error of eps, in ten bins of log SNR.

Each image meets one level of every bin. Levels and noise depend on the image's number alone, so any
two models solve the same problems; outputs are turned into eps first, so losses of all predictions
and frameworks can be compared. (A mean square of eps depends on the level's SNR alone, not on the
scale of x_t.)
"""

import itertools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maskdm_jax import denoiser, draw, rng, sharding
from maskdm_jax.data import read_ahead
from maskdm_jax.diffusion import make_process
from maskdm_jax.diffusion.objective import denoising_loss
from maskdm_jax.diffusion.process import invert
from maskdm_jax.errors import ConfigError
from maskdm_jax.model import patches
from maskdm_jax.run import progress

# Of ln(signal^2 / noise^2); the first and the last bin are open.
EDGES = np.linspace(-10, 10, 11)
NUM_BINS = len(EDGES) - 1
NAMES = tuple(f"{low:g} to {high:g}" for low, high in zip(EDGES, EDGES[1:], strict=False))


class HeldoutLoss:
    """The held-out loss of weights on all images of a set; every process calls it alike."""

    def __init__(self, config, mesh: Mesh, source):
        """
        Args:
          config: the run's; batches have `draw.batch_size` images.
          mesh: the devices.
          source: the held-out images, a `data.sources.Source`.

        Raises:
          ConfigError: if the model has classes and the first image no label.
        """
        self._config, self._mesh, self._source = config, mesh, source
        if config.model.num_classes:  # refused before a run trains until its first scores
            self._check_labels(source[0]["label"])
        self._size, self._by_batch = draw.batch_size(config, mesh), sharding.batch_sharding(mesh)
        self._loss = jit_heldout_loss(config, mesh)

    def of_config(self, config) -> "HeldoutLoss":
        """The same images' loss for another network."""
        return HeldoutLoss(config, self._mesh, self._source)

    def __call__(self, params) -> dict:
        """{"mean", "bins": {bin of ln SNR: loss}, "n", "schedule", "num_timesteps"} of weights.

        The last two name the levels; for EDM they are its ends and 0.

        Raises:
          ConfigError: if the model has classes and an image no label.
        """
        size, count, config = self._size, len(self._source), self._config
        rows = sharding.local_rows(self._by_batch, size)
        firsts = range(0, count, size)
        # The last batch is padded: one shape is compiled.
        indices = (int(first + row) % count for first in firsts for row in rows)
        threads = config.data.num_threads
        examples = read_ahead.in_order(self._source.__getitem__, indices, threads, 2 * len(rows))
        total = np.zeros(NUM_BINS)
        for first in progress.track(firsts, len(firsts), "held-out loss", f"batches of {size}"):
            share = list(itertools.islice(examples, len(rows)))
            image, label = (np.stack([e[k] for e in share]) for k in ("image", "label"))
            self._check_labels(label)
            values = self._of_batch(params, image, label, (first + rows).astype(np.int32))
            total += values[: count - first].sum(0)
        bins = total / count
        diffusion = config.diffusion
        schedule, num_timesteps = diffusion.schedule, diffusion.num_timesteps
        if diffusion.framework == "edm":
            schedule = f"edm (sigma {diffusion.sigma_min:g} to {diffusion.sigma_max:g})"
            num_timesteps = 0
        return {
            "n": count,
            "schedule": schedule,
            "num_timesteps": num_timesteps,
            # Not nanmean: a loss of nan is a result, unlike a bin without a level.
            "mean": float(bins[_bins_of(config, _process(config))[0]].mean()),
            "bins": dict(zip(NAMES, bins.tolist(), strict=True)),
        }

    def _check_labels(self, label):
        if self._config.model.num_classes and np.min(label) < 0:
            raise ConfigError(
                f"eval.heldout_split {self._source.split} of {self._config.data.name} has no "
                "labels, which this model needs; type --config.eval.heldout_split=validation, "
                "or ='' for none"
            )

    def seconds_per_image(self, params) -> float:
        """Compiles, and measures a warm batch."""
        rows = sharding.local_rows(self._by_batch, self._size)
        image = np.zeros((len(rows), *self._source.image_shape), np.uint8)
        none = np.zeros(len(rows), np.int32)
        self._of_batch(params, image, none, none)
        start = time.perf_counter()
        self._of_batch(params, image, none, none)
        return (time.perf_counter() - start) / self._size

    def _of_batch(self, params, *local):
        """float64 [B, NUM_BINS] of all images of a batch, of which `local` are this process's."""
        arrays = [jax.make_array_from_process_local_data(self._by_batch, x) for x in local]
        return np.asarray(self._loss(params, *arrays), np.float64)


def jit_heldout_loss(config, mesh: Mesh) -> Callable[..., jax.Array]:
    """The held-out loss under jit on `mesh`.

    Returns:
      (params, image_BHWC uint8, label_B int32, index_B int32) -> float32 [B, NUM_BINS], nan for a
      bin in which the process has no level. The batch is split over the devices, the result is
      replicated; index_B numbers the images.
    """
    params = draw.abstract_params(config, mesh)
    by_batch = sharding.batch_sharding(mesh)
    return jax.jit(
        _make_loss(config, mesh),
        in_shardings=(jax.tree.map(lambda x: x.sharding, params), *[by_batch] * 3),
        out_shardings=sharding.replicated(mesh),
        compiler_options=sharding.compiler_options(mesh),
    )


def _make_loss(config, mesh):
    process = _process(config)
    apply = denoiser.make_predict(config, mesh, process)
    has_levels, draw_level = _bins_of(config, process)

    def loss(params, image_BHWC, label_B, index_B):
        x0_BNP = patches.cut(image_BHWC, config.model.patch_size)
        keys = jax.vmap(lambda i: rng.stream(0, "heldout", i))(index_B)

        def predict(x_BNP, time_B):
            label = label_B if config.model.num_classes else None
            return apply(params, x_BNP, time_B, label)

        def in_bin(k):
            bin_keys = jax.vmap(lambda key: jax.random.fold_in(key, k))(keys)
            eps = jax.vmap(lambda key: jax.random.normal(key, x0_BNP.shape[1:]))(bin_keys)
            t_B = draw_level(k, _spread(index_B))
            level = process.at(t_B)
            # An error of the output is an error of eps, times this coefficient of the inverse.
            per_output = jnp.square(jnp.broadcast_to(invert(level).eps[1], t_B.shape))
            values = denoising_loss(predict, process, x0_BNP, eps, t_B) * per_output
            return jnp.where(jnp.asarray(has_levels)[k], values, jnp.nan)

        return jax.lax.map(in_bin, jnp.arange(NUM_BINS)).T

    return loss


def _process(config):
    return make_process(config.diffusion, config.data.image_size)


def _bins_of(config, process):
    """Which bins have a level, bool [NUM_BINS] of NumPy, and (bin, spread_B) -> time_B."""
    if config.diffusion.framework == "edm":
        return _sigmas_of_bins(process)
    return _timesteps_of_bins(process, config.diffusion.num_timesteps)


def _timesteps_of_bins(process, num_timesteps):
    """For DDPM: times that are even in t."""
    first, count = _levels_of_bins(process, num_timesteps)

    def draw_level(k, spread_B):
        counts = jnp.asarray(np.maximum(count, 1))
        return jnp.asarray(first)[k] + spread_B * counts[k] // 2**16

    return count > 0, draw_level


def _sigmas_of_bins(process):
    """For EDM: sigmas that are even in ln SNR = -2 ln(sigma) between the sampler's ends."""
    log_snr = -2 * np.log(process.ladder(2, "log_snr").noise)
    inner = np.clip(EDGES[1:-1], *log_snr)
    low, high = np.append(log_snr[0], inner), np.append(inner, log_snr[1])

    def draw_level(k, spread_B):
        low_k, high_k = (jnp.asarray(ends, jnp.float32)[k] for ends in (low, high))
        return jnp.exp(-(low_k + (high_k - low_k) * (spread_B + 0.5) / 2**16) / 2)

    return low < high, draw_level


def _levels_of_bins(process, num_timesteps):
    """The first t of each bin, and the number of its t, int32 [NUM_BINS] of NumPy."""
    level = jax.device_get(process.at(jnp.arange(num_timesteps)))
    log_snr = 2 * np.log(np.float64(level.signal) / level.noise)
    bins = np.searchsorted(EDGES[1:-1], log_snr, side="right")
    count = np.bincount(bins, minlength=NUM_BINS)
    first = [np.flatnonzero(bins == k)[0] if count[k] else 0 for k in range(NUM_BINS)]
    return np.asarray(first, np.int32), np.asarray(count, np.int32)


def _spread(index_B):
    """Numbers in 0 .. 2^16 - 1 that any run of images covers evenly (golden-ratio multiples)."""
    return ((index_B.astype(jnp.uint32) * jnp.uint32(2654435769)) >> 16).astype(jnp.int32)
