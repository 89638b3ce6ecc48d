"""A checkpoint as a file of the official PyTorch implementation.

    python -m maskdm_jax.weights.torch_io export WORKDIR --out=FILE.pt

The file has the names, shapes and dtypes with which the official code loads it strictly: `model`
(the weights and the noise schedule's tables), `ema` (the same twice: the weights, and their
average), `opt` (settings of AdamW, without moments), `step` and `scaler`. It holds the same numbers
bit for bit.
"""

import pathlib

import jax
import numpy as np

from maskdm_jax import averages, checkpoint, phases
from maskdm_jax.config import as_flags, default_config, differences, resolved
from maskdm_jax.diffusion import ddpm
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import COUNT_OR_0, FLAG, MEANING, SHAPE, TEXT, one_of
from maskdm_jax.run import command_line, faults, files
from maskdm_jax.run.progress import say
from maskdm_jax.weights import torch_file, torch_io

_EXAMPLE = "python -m maskdm_jax.weights.torch_io export WORKDIR --out=FILE.pt"
# Fields in which an official network may differ from our default; none of any other has a place
# in the file. Pooled tokens are left out.
_OFFICIAL = (
    "data.image_size", "data.channels", "model.size", "model.width", "model.depth",
    "model.num_heads", "model.patch_size", "model.mlp_ratio", "model.qkv_bias",
    "model.mlp_time_embed", "model.num_classes", "mask.hidden", "diffusion.schedule",
    "diffusion.num_timesteps", "optim.name", "optim.ema",
)  # fmt: skip


def export(
    workdir: str | pathlib.Path,
    out: str | pathlib.Path,
    step: int | None = None,
    weights: str = "both",
    loss_weight: bool = False,
) -> int:
    """Writes a checkpoint of `workdir` as an official `.pt` file.

    Args:
      workdir: the run.
      out: the file.
      step: of the checkpoint; None for the newest.
      weights: "both": the weights under `model`, their average under `ema`; "raw" or "ema": these
        in both places.
      loss_weight: whether to add the table of ones `loss_weight`, which the official code has had
        since it can weight its loss, and which its strict loading then needs.

    Returns:
      The checkpoint's step.

    Raises:
      ConfigError: if there is no such checkpoint, or one that the official code has no model for.
    """
    step = checkpoint.find_step(workdir, step, instead="the workdir of another run")
    config = phases.at(checkpoint.load_config(workdir, step), step).config
    _check(config, f"checkpoint {step} of {workdir}")
    raw = checkpoint.restore_item(workdir, step, "params")
    ema = averages.kept(checkpoint.restore_item(workdir, step, "ema"), config)
    raw, ema = {"both": (raw, ema), "raw": (raw, raw), "ema": (ema, ema)}[weights]
    ends = config.model.patch_size, config.data.channels
    raw, ema = (torch_io.to_official(params, *ends) for params in (raw, ema))
    tables = schedule_tables(config)
    if loss_weight:
        tables["loss_weight"] = np.ones_like(tables["betas"])
    model = tables | {f"model.{name}": x for name, x in raw.items()}
    average = tables | {f"model.{name}": x for name, x in ema.items()}
    tree = {
        "step": step,
        "model": model,
        "opt": _optimizer(config.optim, len(raw)),
        "ema": {
            **{f"online_model.{name}": x for name, x in model.items()},
            **{f"ema_model.{name}": x for name, x in average.items()},
            "initted": np.array([True]),
            "step": np.array([step], np.int64),
        },
        "scaler": None,
    }
    size = 4 * sum(x.nbytes for x in raw.values())
    remedy = "make room, then type the same command"
    with faults.explain_full_disk("the file", pathlib.Path(out).parent, remedy, lambda: size):
        torch_file.save(out, tree)
    return step


def schedule_tables(config) -> dict[str, np.ndarray]:
    """The noise schedule's tables as the official code names them, float32 [T]; computed in
    float64, as there (Ho et al. 2020, equations 4 to 7)."""
    diffusion = config.diffusion
    betas = ddpm.make_betas(diffusion.schedule, diffusion.num_timesteps, config.data.image_size)
    alphas = 1 - betas
    abar = np.cumprod(alphas)
    before = np.append(1.0, abar[:-1])
    variance = betas * (1 - before) / (1 - abar)
    tables = {
        "alphas": alphas,
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - abar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(alphas) / (1 - abar),
    }
    return {name: table.astype(np.float32) for name, table in tables.items()}


def _optimizer(optim, num_params):
    """AdamW's settings for that many parameters, without moments."""
    group = {
        "lr": optim.lr_peak,
        "betas": (optim.b1, optim.b2),
        "eps": 1e-8,
        "weight_decay": optim.weight_decay,
        "amsgrad": False,
        "params": list(range(num_params)),
    }
    return {"state": {}, "param_groups": [group]}


def _check(config, where):
    default = default_config()
    names = [n for n in differences(config, default, (SHAPE, MEANING)) if n not in _OFFICIAL]
    if names:
        given = ", ".join(f"{name} is {resolved(config, name)}" for name in names)
        raise ConfigError(
            f"{where} has no official counterpart: {given}; expected a run with "
            f"{as_flags(default, names)}; type the workdir of such a run"
        )
    height, width = config.data.image_size
    if height != width:
        raise ConfigError(
            f"{where} is for images of {height} x {width}, and the official code knows square ones "
            "only; type the workdir of a run with square images"
        )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = command_line.Parser(__doc__, _EXAMPLE)
    parser.flag("command", one_of("export"), "export: a checkpoint as an official file", "export")
    parser.flag("workdir", TEXT, "the run", required=True)
    parser.flag("--out", TEXT, "the file to write", required=True)
    parser.flag("--step", COUNT_OR_0, "the checkpoint's; the newest if not given")
    parser.flag(
        "--weights",
        one_of("both", "raw", "ema"),
        "both: the weights and their average, each in its place; raw or ema: these in both",
        "both",
    )
    parser.flag(
        "--loss_weight", FLAG, "add the table of ones that newer official code loads", False
    )

    def work():
        args = parser.parse(argv)
        jax.config.update("jax_platforms", "cpu")
        faults.mute_late_tracebacks()
        workdir = files.place(args.workdir, "workdir")
        out = files.local_path(args.out, "--out")
        if out.is_dir() or not out.parent.is_dir():
            what = "is a folder" if out.is_dir() else "is in no folder that exists"
            raise ConfigError(f"--out {out} {what}; expected a file; type --out=official.pt")
        step = export(workdir, out, args.step, args.weights, args.loss_weight)
        say(f"wrote step {step} of {workdir} to {out}")

    return command_line.exit_code(work)
