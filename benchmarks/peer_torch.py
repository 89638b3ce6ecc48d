"""The PyTorch peer: the same network, objective and update, as a careful PyTorch user writes them.

torch.compile over mask, noise, gather, forward pass and loss; scaled_dot_product_attention; bf16
autocast over float32 parameters; fused AdamW; foreach EMA and clipping. From maskdm_jax comes what
needs no JAX: schedules, the mask's count, patchify. On a CPU, a smoke test: float32, not compiled.

    python -m benchmarks.peer_torch --bench masked256 [--batch N] [--seconds 6]
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # maskdm_jax imports JAX, and the GPU belongs to PyTorch here

import contextlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402

from maskdm_jax.errors import ConfigError  # noqa: E402
from maskdm_jax.fields import COUNT, TEXT, one_of  # noqa: E402
from maskdm_jax.run import command_line  # noqa: E402

try:
    import torch  # noqa: E402
except ImportError:
    missing = ConfigError("the peer needs PyTorch; type: pip install 'maskdm_jax[peer]'")
    sys.exit(command_line.report(missing))
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks import cases  # noqa: E402
from maskdm_jax.diffusion import ddpm, make_process, samplers  # noqa: E402
from maskdm_jax.diffusion.process import invert  # noqa: E402
from maskdm_jax.model import (
    masking,  # noqa: E402
    patches,  # noqa: E402
)
from maskdm_jax.model.sizes import dimensions, grid_shape  # noqa: E402

# The one kernel that scaled_dot_product_attention may run; None: PyTorch's choice.
_FLASH, _CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
ATTENTION = {"default": None, "flash": _FLASH, "cudnn": _CUDNN, "math": SDPBackend.MATH}
_GROUPS, _WARMUP_STEPS = 3, 5
_ON_GPU = torch.cuda.is_available()
# A graph break would slow the peer silently; fullgraph makes it an error.
_COMPILE = dict(dynamic=False, fullgraph=True, disable=not _ON_GPU)


class Block(nn.Module):
    """Pre-LN transformer block; with `has_skip`, [x, skip] is projected to D first."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, has_skip: bool):
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.num_heads = num_heads
        self.skip = nn.Linear(2 * width, width) if has_skip else None
        self.norm_attention = nn.LayerNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-5)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def forward(self, x_BLD, skip_BLD=None):
        if self.skip is not None:
            x_BLD = self.skip(torch.cat([x_BLD, skip_BLD], dim=-1))
        qkv_BLD = self.qkv(self.norm_attention(x_BLD))
        # [3, B, K, L, H]: q, k and v are views of what qkv wrote.
        parts = qkv_BLD.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out_BKLH = nn.functional.scaled_dot_product_attention(*parts.unbind())
        x_BLD = x_BLD + self.proj(out_BKLH.transpose(1, 2).flatten(2))
        return x_BLD + self.mlp_out(nn.functional.gelu(self.mlp_in(self.norm_mlp(x_BLD))))


class UViT(nn.Module):
    """U-ViT over tokens [time, patches]; the submodules are named as in model.uvit."""

    def __init__(self, num_patches, patch_dim, width, depth, num_heads, mlp_ratio=4.0):
        super().__init__()
        shape, half = (width, num_heads, mlp_ratio), range(depth // 2)
        self.patch_embed = nn.Linear(patch_dim, width)
        self.position = nn.Parameter(torch.empty(1 + num_patches, width))
        self.in_blocks = nn.ModuleList(Block(*shape, has_skip=False) for _ in half)
        self.mid_block = Block(*shape, has_skip=False)
        self.out_blocks = nn.ModuleList(Block(*shape, has_skip=True) for _ in half)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.output = nn.Linear(width, patch_dim)
        for param in self.parameters():
            if param.ndim == 2:
                nn.init.trunc_normal_(param, std=0.02)

    def forward(self, x_BVP, t_B, visible_BV=None):
        """Predicts float32 [B, V, P] from noisy patches, timesteps [B] and the patches' ids."""
        x_BVD = self.patch_embed(x_BVP.to(self.patch_embed.weight.dtype))
        dtype = x_BVD.dtype  # of all tokens and the residual stream: bf16 under autocast
        # Gathered in the table's own dtype, so its gradient is summed in float32.
        position = self.position[1:] if visible_BV is None else self.position[1 + visible_BV]
        time_BD = timestep_embedding(t_B, self.position.shape[1]) + self.position[0]
        x_BLD = torch.cat([time_BD[:, None].to(dtype), (x_BVD + position).to(dtype)], dim=1)
        skips = []
        for block in self.in_blocks:
            x_BLD = block(x_BLD)
            skips.append(x_BLD)
        x_BLD = self.mid_block(x_BLD)
        for block in self.out_blocks:
            x_BLD = block(x_BLD, skips.pop())
        return self.output(self.norm(x_BLD[:, 1:])).float()


def timestep_embedding(t_B, width):
    """Sinusoids of the timestep, cosines first, float32 [B, width] for an even width."""
    half = width // 2
    steps = torch.arange(half, device=t_B.device, dtype=torch.float32)
    angles = t_B[:, None].float() * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def make_model(config) -> UViT:
    """The network of a config; ValueError for a field that this peer does not implement."""
    extras = ("qkv_bias", "mlp_time_embed", "num_classes", "dropout")
    refused = [f"model.{name}" for name in extras if config.model[name]]
    refused += ["model.remat"] * (config.model.remat != "none")
    refused += ["data.flip"] * config.data.flip + ["crop masks"] * (config.mask.kind == "crop")
    refused += ["mask.hidden=pool"] * (config.mask.hidden == "pool")
    refused += ["optim.accumulate_steps"] * (config.optim.accumulate_steps > 1)
    if refused:
        raise ValueError(f"the PyTorch peer does not have {', '.join(refused)}; unset them")
    rows, cols = grid_shape(config.data.image_size, config.model.patch_size)
    patch_dim = patches.patch_dim(config.model.patch_size, config.data.channels)
    return UViT(rows * cols, patch_dim, *dimensions(config.model), mlp_ratio=config.model.mlp_ratio)


def draw_visible_ids(batch, mask, grid, device):
    """Ids of the visible patches [B, V], in any order; None if nothing is hidden."""
    if mask.kind == "none":
        return None
    size = mask.block_size if mask.kind == "block" else 1
    rows, cols = grid[0] // size, grid[1] // size
    keep = masking.num_visible(mask, grid) // size**2
    ids = torch.rand(batch, rows * cols, device=device).topk(keep, dim=-1).indices
    corner = (ids // cols) * size * grid[1] + (ids % cols) * size
    side = torch.arange(size, device=device)
    within = (side[:, None] * grid[1] + side).flatten()
    return (corner[:, :, None] + within).flatten(1)


def make_loss(config, model: UViT, device: torch.device, low_precision: bool):
    """(uint8 images [B, H, W, C]) -> the loss, with t, masks and noise drawn on the device."""
    abar = ddpm.make_alphas_cumprod(config.diffusion, config.data.image_size)
    signal_T = torch.tensor(np.sqrt(abar), dtype=torch.float32, device=device)
    noise_T = torch.tensor(np.sqrt(1 - abar), dtype=torch.float32, device=device)
    mask, size = config.mask, config.model.patch_size
    grid = grid_shape(config.data.image_size, size)
    norm = nn.MSELoss() if config.diffusion.loss == "l2" else nn.L1Loss()

    def loss(image_BHWC):
        batch = image_BHWC.shape[0]
        patch_BVP = patches.patchify(image_BHWC, size)
        visible_BV = draw_visible_ids(batch, mask, grid, device)
        if visible_BV is not None:
            patch_BVP = torch.take_along_dim(patch_BVP, visible_BV[:, :, None], dim=1)
        x0_BVP = patch_BVP.float() / 127.5 - 1
        eps_BVP = torch.randn_like(x0_BVP)
        t_B = torch.randint(len(signal_T), (batch,), device=device)
        signal, noise = signal_T[t_B, None, None], noise_T[t_B, None, None]
        x_t = signal * x0_BVP + noise * eps_BVP
        targets = {"eps": eps_BVP, "x0": x0_BVP, "v": signal * eps_BVP - noise * x0_BVP}
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            output = model(x_t, t_B, visible_BV)
        return norm(output, targets[config.diffusion.prediction])

    return loss


def measure(config, images_uint8_NHWC: np.ndarray, seconds: float, attention="default") -> dict:
    """Times training steps at the config's batch size.

    All images go to the device. `seconds` is for all timed steps together; `attention`, a key of
    ATTENTION, is the kernel that scaled_dot_product_attention runs.

    Returns:
      "images_per_s" (the median of three groups of steps), "compile_s" (the first step),
      "memory_gib" (the timed steps' peak, images included; 0 on a CPU), "versions".
    """
    device, model, low_precision = _setup(config)
    images = torch.tensor(images_uint8_NHWC, device=device)
    optim, batch = config.optim, config.train.batch_size
    params = list(model.parameters())
    ema = [param.detach().clone() for param in params]
    settings = dict(betas=(optim.b1, optim.b2), weight_decay=optim.weight_decay)
    optimizer = torch.optim.AdamW(params, optim.lr_peak, fused=_ON_GPU, **settings)
    loss = torch.compile(make_loss(config, model, device, low_precision), **_COMPILE)

    def step():
        optimizer.zero_grad(set_to_none=True)
        value = loss(images[torch.randint(len(images), (batch,), device=device)])
        value.backward()
        if optim.clip_norm:
            nn.utils.clip_grad_norm_(params, optim.clip_norm, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - optim.ema_decay)
        return value

    rate, others = _time(step, seconds, attention)
    return {"images_per_s": batch * rate, **others}


@torch.inference_mode()
def measure_sampling(config, batch: int, seconds: float, attention="default") -> dict:
    """As `measure`, for DDIM at eta 1; "evaluations_per_s" is images x network evaluations."""
    device, model, low_precision = _setup(config)
    if low_precision:
        model = model.bfloat16()
    # DDIM acts on each pixel alone, so the walk can stay in patches.
    x_BNP = torch.randn(batch, len(model.position) - 1, model.output.out_features, device=device)

    def update(x_BNP, now):
        t, x0_x, x0_out, eps_x, eps_out, to_x0, to_eps, sigma = now.unbind()
        output = model(x_BNP, t.expand(len(x_BNP)))
        x0 = (x0_x * x_BNP + x0_out * output).clamp(-1, 1)
        eps = eps_x * x_BNP + eps_out * output
        return to_x0 * x0 + to_eps * eps + sigma * torch.randn_like(x_BNP)

    rows = itertools.cycle([torch.tensor(row, device=device) for row in ddim_table(config)])
    update = torch.compile(update, **_COMPILE)

    def step():
        nonlocal x_BNP
        x_BNP = update(x_BNP, next(rows))
        return x_BNP.mean()

    rate, others = _time(step, seconds, attention)
    return {"evaluations_per_s": batch * rate, **others}


def ddim_table(config) -> np.ndarray:
    """Coefficients of each DDIM step at eta 1, float32 [steps, 8] (Song et al. 2021, equation 12).

    Columns: t; x0 = a x_t + b output; eps = a x_t + b output; x_s = a x0 + b eps + c z.
    """
    process = make_process(config.diffusion, config.data.image_size)
    levels = process.ladder(config.sample.steps, "timestep")
    inverse, table = invert(levels), samplers.ddim(levels, eta=1.0)
    columns = [levels.time, *inverse.x0, *inverse.eps, *(table[k] for k in ("x0", "eps", "noise"))]
    return np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.float32)


def _setup(config):
    """(device, fresh model, whether it computes in bf16)."""
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device("cuda" if _ON_GPU else "cpu")
    with device:
        return device, make_model(config), _ON_GPU and config.model.dtype == "bfloat16"


def _time(step, seconds, attention):
    """(steps per second, fields that both measurements share) of `step`, which returns a scalar."""

    def timed(count):
        start = time.perf_counter()
        for _ in range(count):
            value = step()
        if _ON_GPU:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        if not math.isfinite(value.item()):
            raise RuntimeError(f"the measured step gave {value.item()}, not a finite number")
        return elapsed

    kernel = ATTENTION[attention]
    with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
        compile_s = timed(1)
        timed(_WARMUP_STEPS)
        pace = timed(_WARMUP_STEPS) / _WARMUP_STEPS  # sets how many steps to time
        if _ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        count = max(1, round(seconds / _GROUPS / pace))
        rate = statistics.median(count / timed(count) for _ in range(_GROUPS))
    memory = torch.cuda.max_memory_allocated() / 2**30 if _ON_GPU else 0.0
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return rate, {"compile_s": compile_s, "memory_gib": memory, "versions": versions}


def main():
    """The command line; prints one line of JSON."""
    example = "python -m benchmarks.peer_torch --bench=masked256 --data_dir=DIR"
    parser = command_line.Parser(__doc__, example)
    parser.flag("--bench", one_of(*cases.NAMES), "the case", required=True)
    parser.flag("--batch", COUNT, "images; the case's if not given")
    parser.flag("--seconds", cases.SECONDS, "of all timed steps together", 6.0)
    parser.flag("--attention", one_of(*ATTENTION), "the kernel", "default")
    parser.flag("--data_dir", TEXT, "folder of the sets", "~/tensorflow_datasets")
    args = parser.parse()
    config = cases.config(args.bench, args.data_dir, args.batch)
    batch = config.train.batch_size
    if args.bench == "sample256":
        result = measure_sampling(config, batch, args.seconds, args.attention)
    else:
        result = measure(config, cases.load_images(config), args.seconds, args.attention)
    print(json.dumps({"bench": args.bench, "batch": batch, **result}))


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
