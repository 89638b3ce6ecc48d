"""Model FLOPs, and the peak that MFU is relative to.

Counts are 2 per multiply-add, for matmuls and attention only, without remat or padding; training is
3 x the forward pass. MFU = model FLOPs / (step time x dense bf16 peak of the chips).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from maskdm_jax.model import patches
from maskdm_jax.model.masking import num_pooled, num_visible
from maskdm_jax.model.sizes import dimensions, grid_shape

# Dense bf16 TFLOP/s from the vendors' datasheets; keys are parts of `device.device_kind`.
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}


def tokens_per_image(config) -> int:
    """L: visible patches, pooled tokens, the time, and the class if the model has classes."""
    grid = grid_shape(config.data.image_size, config.model.patch_size)
    extra = 2 if config.model.num_classes else 1
    return num_visible(config.mask, grid) + num_pooled(config.mask, grid) + extra


def coarse_tokens(config) -> dict[int, int]:
    """L of coarse tokens by their size, see `denoiser`: as many as cover the image, and the extra
    ones."""
    rows, cols = grid_shape(config.data.image_size, config.model.patch_size)
    extra = 2 if config.model.num_classes else 1
    return {size: rows * cols // size**2 + extra for size, _ in config.model.coarse}


def tokens_text(config) -> str:
    """The network's tokens for an image in training, and those of each size of coarse tokens."""
    every = config.diffusion.coarse_every
    often = f" / {every}" if every > 1 else ""
    coarse = [f"{length}{often}" for length in coarse_tokens(config).values()]
    return " + ".join([str(tokens_per_image(config)), *coarse])


def forward_flops(config, length: int | None = None) -> float:
    """FLOPs of one forward pass for one image, of `length` tokens; None: of `tokens_per_image`."""
    width, depth, _ = dimensions(config.model)
    length = length or tokens_per_image(config)
    patch_dim = patches.patch_dim(config.model.patch_size, config.data.channels)
    skips = depth // 2
    block = 2 * length * width**2 * (4 + 2 * config.model.mlp_ratio) + 4 * length**2 * width
    skip = 2 * length * 2 * width * width
    ends = 2 * 2 * length * patch_dim * width
    return (2 * skips + 1) * block + skips * skip + ends


def training_flops(config) -> float:
    """FLOPs of one forward and backward pass for one image of a batch, on average."""
    coarse = sum(forward_flops(config, length) for length in coarse_tokens(config).values())
    return 3 * (forward_flops(config) + coarse / config.diffusion.coarse_every)


class Work(NamedTuple):
    """What a run has done up to a step: images, the network's tokens, model FLOPs."""

    images: int
    tokens: int
    flops: float


def work(phases: Sequence, step: int) -> Work:
    """What the first `step` updates do of a run with these phases, see `phases`."""
    images = tokens = flops = 0
    for phase in phases:
        count = max(min(step, phase.last_step) - phase.first_step, 0)
        count *= phase.config.train.batch_size
        images += count
        tokens += count * tokens_per_image(phase.config)
        seen = count // phase.config.diffusion.coarse_every
        tokens += seen * sum(coarse_tokens(phase.config).values())
        flops += count * training_flops(phase.config)
    return Work(images, tokens, flops)


def table(phases: Sequence) -> str:
    """What each of a run's phases takes, as a table."""
    rows = [("phase", "steps", "tokens", "batch", "GFLOP per image", "peak lr", "share of FLOPs")]
    whole = work(phases, phases[-1].last_step).flops
    for phase in phases:
        config, first = phase.config, phase.first_step
        share = (work(phases, phase.last_step).flops - work(phases, first).flops) / whole
        rows.append(
            (
                f"{phase.index + 1}",
                f"{first + 1} to {phase.last_step}",
                tokens_text(config),
                f"{config.train.batch_size}",
                f"{training_flops(config) / 1e9:.4g}",
                f"{config.optim.lr_peak:g}",
                f"{share:.1%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def peak_tflops(device: jax.Device) -> float | None:
    """The device's dense bf16 peak in TFLOP/s; None if unknown, as for a CPU."""
    matches = [name for name in PEAK_TFLOPS if name in device.device_kind]
    return PEAK_TFLOPS[max(matches, key=len)] if matches else None
