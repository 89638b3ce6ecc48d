"""The Python interface's drawing: from noise, from images, around known pixels, between two seeds.

`api.Model` has these methods; docs/sampling.md has examples.
"""

import functools
import inspect

import jax
import numpy as np
from jax.typing import ArrayLike

from maskdm_jax import arguments, draw, draw_batches, sharding
from maskdm_jax.config import validate
from maskdm_jax.errors import ConfigError

# Fields of config.sample that a compiled program depends on.
_COMPILED = (
    "sampler", "spacing", "steps", "eta", "recompute_eps", "threshold", "guidance_scale",
    "guidance_interval", "strength",
)  # fmt: skip


class Sampling:
    """Draws images from the parameters of a model, on all devices.

    Image i depends on (seed, i), the settings and what is given for it alone.
    """

    def __init__(self, config, params):
        """Compiles nothing yet; the first call of each method does."""
        self.config, self.params = config, params
        self.image_shape = (*config.data.image_size, config.data.channels)
        self._mesh = sharding.make_mesh(config)
        self._draws = {}  # compiled samplers, by what they were compiled for

    def sample(
        self,
        num: int,
        sampler: str = "ddim",
        steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        label: int | None = None,
        seed: int = 0,
        *,
        spacing: str = "timestep",
        recompute_eps: bool = False,
        threshold: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> np.ndarray:
        """Draws images, as `--mode=sample` does with these settings.

        Args:
          num: images. `config.sample.batch_size` of them are drawn at a time, see
            `draw.batch_size`.
          sampler: "ddim", "ddpm", "dpm_solver" or "heun".
          steps: 1 to T; any number for EDM. Each is one evaluation of the network; with "heun" two,
            but one in the last.
          eta: DDIM's noise: 0 is deterministic, 1 adds as much as DDPM.
          guidance_scale: 1 is the plain model; any other needs a model with classes.
          label: the class of all images; None: image i has class i mod num_classes.
          seed: of the noise.
          spacing: "timestep", "log_snr" or "karras".
          recompute_eps: whether DDIM takes eps from the clipped x0, as the official sampler does
            for the predictions x0 and v.
          threshold: quantile of |x0| for dynamic thresholding; 0: x0 is clipped to [-1, 1].
          guidance_interval: shares of the way from noise to image between which to guide.

        Returns:
          uint8 [num, H, W, C].

        Raises:
          ConfigError: for a value that cannot work.
        """
        config = self._configured(
            num, sampler, steps, eta, guidance_scale, label, seed, spacing=spacing,
            recompute_eps=recompute_eps, threshold=threshold, guidance_interval=guidance_interval,
        )  # fmt: skip
        return self._drawn(config)

    def inpaint(
        self, image: ArrayLike, known_mask: ArrayLike, num: int | None = None, **settings
    ) -> np.ndarray:
        """Draws the unknown pixels of images anew; the known ones stay exactly as they are.

        Args:
          image: uint8 [H, W, C] for all, or [M, H, W, C], of which image i takes number i mod M.
            Values of unknown pixels have no influence.
          known_mask: bool [H, W], true where a pixel is known.
          num: images to draw; None: one for each given.
          settings: as for `sample`.

        Returns:
          uint8 [num, H, W, C].

        Raises:
          ConfigError: for an image or a mask of another size, or a value that cannot work.
        """
        images = arguments.pixels("image", image, self.image_shape)
        known = np.asarray(known_mask)
        arguments.check_shape("known_mask", known, self.image_shape[:2])
        if known.dtype != bool:
            raise ConfigError(
                f"known_mask has dtype {known.dtype}; expected bools, True where a pixel is known; "
                "type known_mask.astype(bool)"
            )
        num = len(images) if num is None else num
        return self._drawn(self._configured(num, **settings), images=images, known=known)

    def image_to_image(
        self, image: ArrayLike, strength: float, num: int | None = None, **settings
    ) -> np.ndarray:
        """Draws images that resemble given ones: noise is added to these, and removed again.

        (SDEdit, Meng et al. 2022.)

        Args:
          image: as for `inpaint`.
          strength: the share of the steps that are taken, the last ones: near 0 the image barely
            changes, with 1 almost nothing of it is left.
          num: images to draw; None: one for each given.
          settings: as for `sample`; the network is evaluated for `strength` of the steps.

        Returns:
          uint8 [num, H, W, C].

        Raises:
          ConfigError: for an image of another size, or a value that cannot work.
        """
        images = arguments.pixels("image", image, self.image_shape)
        config = self._configured(len(images) if num is None else num, **settings)
        with arguments.said_in_python(self.image_to_image):
            arguments.change(config, {"sample.strength": strength})
        return self._drawn(config, images=images)

    def interpolate(self, seed_a: int, seed_b: int, num: int = 8, **settings) -> np.ndarray:
        """Images on the way from image 0 of one seed to image 0 of another.

        Their noise is cos(angle) a + sin(angle) b with angles even between 0 and pi / 2, so it is
        unit normal all the way.

        Args:
          seed_a: the first image is `sample(1, seed=seed_a)`.
          seed_b: the last image is `sample(1, seed=seed_b)`.
          num: images, at least 2.
          settings: as for `sample`, without a seed; without `label`, all are of class 0.

        Returns:
          uint8 [num, H, W, C].

        Raises:
          ConfigError: for a sampler that adds noise, or a value that cannot work.
        """
        config = self._configured(num, seed=seed_a, **settings)
        with arguments.said_in_python(self.interpolate):
            arguments.change(config.copy_and_resolve_references(), {"sample.seed": seed_b})
        if seed_a == seed_b:
            raise ConfigError(
                f"seed_b is {seed_b}, as seed_a; expected another; type seed_b={seed_a + 1}"
            )
        if num < 2:
            raise ConfigError(f"num is {num}; expected at least 2, both ends; type num=2")
        if config.sample.sampler == "ddpm" or (
            config.sample.sampler == "ddim" and config.sample.eta
        ):
            raise ConfigError(
                f"sampler {config.sample.sampler!r} with eta={config.sample.eta:g} adds noise in "
                "its steps; expected one that adds none; type sampler='ddim', eta=0"
            )
        seeds = {"seed_a": seed_a, "seed_b": seed_b, "num": num}
        return self._drawn(config, draw.jit_interpolation, **seeds)

    def _configured(self, *args, **settings):
        """The model's config with the arguments of `sample`, checked."""
        bound = inspect.signature(self.sample).bind(*args, **settings)
        bound.apply_defaults()
        given = bound.arguments
        given["label"] = -1 if given["label"] is None else given["label"]
        config = self.config.copy_and_resolve_references()
        config.sample.strength = 1.0
        with arguments.said_in_python(self.sample):
            arguments.change(config, {f"sample.{name}": value for name, value in given.items()})
            validate(config)
        return config

    def _drawn(self, config, jit=draw.jit_draw, **given):
        """The images of `config.sample`; arrays of `given` are put on every device."""
        settings, by_batch = config.sample, sharding.batch_sharding(self._mesh)
        size = draw.batch_size(config, self._mesh, settings.num)
        key = (jit, *(settings[name] for name in _COMPILED))
        if key not in self._draws:
            self._draws[key] = jit(config, self._mesh, by_batch)
        whole = sharding.replicated(self._mesh)
        given = {
            name: jax.device_put(x, whole) if isinstance(x, np.ndarray) else x
            for name, x in given.items()
        }
        if jit is draw.jit_draw:
            given["seed"] = settings.seed
        jitted = functools.partial(self._draws[key], label=settings.label, **given)
        batches = draw_batches.in_batches(jitted, self.params, range(settings.num), size, by_batch)
        return np.concatenate([image_BHWC for _, image_BHWC in batches])
