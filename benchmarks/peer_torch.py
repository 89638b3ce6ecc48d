"""The PyTorch peer: the same network, objective and update, as a careful PyTorch user writes them.

torch.compile over mask, noise, gather, forward pass and loss; scaled_dot_product_attention; bf16
autocast over float32 parameters; fused AdamW; foreach EMA and clipping. From maskdm_jax comes what
needs no JAX: schedules, the mask's count, patchify. On a CPU, a smoke test: float32, not compiled.

    python -m benchmarks.peer_torch --bench masked256 --data_dir DIR [--batch N] [--seconds 6]
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
from maskdm_jax.fields import one_of  # noqa: E402
from maskdm_jax.run import command_line  # noqa: E402

try:
    import torch  # noqa: E402
except ImportError:
    missing = ConfigError("the peer needs PyTorch; type: pip install 'maskdm_jax[peer]'")
    sys.exit(command_line.report(missing))
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks import cases  # noqa: E402
from benchmarks.peer_model import UViT, make_model  # noqa: E402
from maskdm_jax.diffusion import ddpm, make_process, samplers  # noqa: E402
from maskdm_jax.diffusion.process import invert  # noqa: E402
from maskdm_jax.model import masking, patches  # noqa: E402
from maskdm_jax.model.sizes import grid_shape  # noqa: E402

# The one kernel that scaled_dot_product_attention may run; None: PyTorch's choice.
_FLASH, _CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
ATTENTION = {"default": None, "flash": _FLASH, "cudnn": _CUDNN, "math": SDPBackend.MATH}
_GROUPS, _WARMUP_STEPS = 3, 5
_ON_GPU = torch.cuda.is_available()
# A graph break would slow the peer silently; fullgraph makes it an error.
_COMPILE = dict(dynamic=False, fullgraph=True, disable=not _ON_GPU)


def draw_ids(batch, mask, grid, device):
    """Ids of the visible patches [B, V] and of the pooled tokens [B, G], in any order.

    The first is None if nothing is hidden, the second if there are no pooled tokens.
    """
    if mask.kind == "none":
        return None, None
    size = mask.block_size if mask.kind == "block" else 1
    blocks = (grid[0] // size) * (grid[1] // size)
    keep = masking.num_visible(mask, grid) // size**2
    num_pooled = masking.num_pooled(mask, grid)
    # Pooled tokens are the blocks after the visible ones, in the same random order.
    count = blocks if num_pooled else keep
    order = torch.rand(batch, blocks, device=device).topk(count, dim=-1).indices
    visible_BV = _members(order[:, :keep], size, grid[1])
    if not num_pooled:
        return visible_BV, None
    return visible_BV, _members(order[:, keep:], size // mask.pool_size, grid[1] // mask.pool_size)


def _members(blocks, size, grid_cols):
    """Ids of all places of a grid in blocks of size x size: [B, blocks * size^2]."""
    cols = grid_cols // size
    corner = (blocks // cols) * size * grid_cols + (blocks % cols) * size
    side = torch.arange(size, device=blocks.device)
    within = (side[:, None] * grid_cols + side).flatten()
    return (corner[:, :, None] + within).flatten(1)


def make_draw(config, device: torch.device):
    """(uint8 images [B, H, W, C]) -> the examples of a batch, drawn on the device.

    They are "t" [B], "x0" and "eps" [B, V, P], and "visible" [B, V], None if nothing is hidden;
    with pooled tokens, "pooled" [B, G], "x0_pooled" and "eps_pooled" [B, G, P] too.
    """
    mask, patch, q = config.mask, config.model.patch_size, config.mask.pool_size
    grid = grid_shape(config.data.image_size, patch)

    def draw(image_BHWC):
        batch = len(image_BHWC)
        visible_BV, pooled_BG = draw_ids(batch, mask, grid, device)
        t_B = torch.randint(config.diffusion.num_timesteps, (batch,), device=device)
        x0_BVP = _gather(patches.patchify(image_BHWC, patch), visible_BV).float() / 127.5 - 1
        eps_BVP = torch.randn_like(x0_BVP)
        examples = {"t": t_B, "visible": visible_BV, "x0": x0_BVP, "eps": eps_BVP}
        if pooled_BG is None:
            return examples
        mean_BHWC = image_BHWC.float().unflatten(2, (-1, q)).unflatten(1, (-1, q)).mean((2, 4))
        x0_BGP = _gather(patches.patchify(mean_BHWC, patch), pooled_BG) / 127.5 - 1
        eps_BGP = torch.randn_like(x0_BGP) / q  # averages of q^2 unit normals
        return examples | {"pooled": pooled_BG, "x0_pooled": x0_BGP, "eps_pooled": eps_BGP}

    return draw


def _gather(x_BNP, ids):
    return x_BNP if ids is None else torch.take_along_dim(x_BNP, ids[:, :, None], dim=1)


def make_loss(config, model: UViT, device: torch.device, low_precision: bool):
    """(examples of `make_draw`) -> the loss, a float32 scalar."""
    abar = ddpm.make_alphas_cumprod(config.diffusion, config.data.image_size)
    signal_T = torch.tensor(np.sqrt(abar), dtype=torch.float32, device=device)
    noise_T = torch.tensor(np.sqrt(1 - abar), dtype=torch.float32, device=device)
    norm = nn.MSELoss() if config.diffusion.loss == "l2" else nn.L1Loss()

    def loss(examples):
        t_B = examples["t"]
        signal, noise = signal_T[t_B, None, None], noise_T[t_B, None, None]

        def pair(x0, eps):
            """The noisy values, and the target."""
            targets = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}
            return signal * x0 + noise * eps, targets[config.diffusion.prediction]

        x_BVP, target_BVP = pair(examples["x0"], examples["eps"])
        pooled = ()
        if "pooled" in examples:
            x_BGP, target_BGP = pair(examples["x0_pooled"], examples["eps_pooled"])
            pooled = x_BGP, examples["pooled"]
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            out_BVP, out_BGP = model(x_BVP, t_B, examples["visible"], *pooled)
        value = norm(out_BVP, target_BVP)
        if out_BGP is None:
            return value
        share = config.mask.pool_weight * out_BGP.shape[1] / out_BVP.shape[1]
        return value + share * norm(out_BGP, target_BGP)

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
    draw, loss = make_draw(config, device), make_loss(config, model, device, low_precision)
    compiled = torch.compile(lambda image_BHWC: loss(draw(image_BHWC)), **_COMPILE)

    def step():
        optimizer.zero_grad(set_to_none=True)
        value = compiled(images[torch.randint(len(images), (batch,), device=device)])
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
        output, _ = model(x_BNP, t.expand(len(x_BNP)))
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
    parser = cases.parser(__doc__, "peer_torch", (*cases.NAMES, *cases.POOLED))
    parser.flag("--attention", one_of(*ATTENTION), "the kernel", "default")
    args = parser.parse()
    sampling = args.bench == "sample256"
    config = cases.chosen(args, "sample" if sampling else "train")
    batch = config.train.batch_size
    if sampling:
        result = measure_sampling(config, batch, args.seconds, args.attention)
    else:
        result = measure(config, cases.load_images(config), args.seconds, args.attention)
    print(json.dumps({"bench": args.bench, "batch": batch, **result}))


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
