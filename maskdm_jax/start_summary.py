"""What a person wants to know before the first step: data, model, work, device, time and place."""

import pathlib
import statistics
import textwrap
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from maskdm_jax import flops, phases
from maskdm_jax.model.sizes import dimensions
from maskdm_jax.run import files, progress, telemetry

_COLUMNS, _KEY = 80, 9
_CACHES = {
    "none": "decoded again in each epoch",
    "host": "kept decoded in a file of this host",
    "device": "kept decoded on the device",
}
_OPTIMIZERS = {
    "adamw": "AdamW",
    "muon": "Muon on the matrices of the blocks, AdamW on all else",
}
# Records of metrics.jsonl that say how fast the run was.
_NEWEST = 10


def described(
    config, source: Sequence, mesh: Mesh, params, workdir: pathlib.Path, step: int
) -> str:
    """The summary, in lines of at most 80 columns.

    Args:
      config: the run's.
      source: the data set.
      mesh: all devices.
      params: of the network, as they start.
      workdir: the run's folder.
      step: completed updates.
    """
    every = phases.phases(config)
    rows = {
        "data": _data(config, len(source)),
        "model": _model(phases.at(config, step).config, params),
        "noise": _noise(config.diffusion),
        "optim": _OPTIMIZERS[config.optim.name],
        "image": _image(config),
        "steps": _steps(every, len(source), step),
        "scores": _scores(config.eval),
        "device": _device(mesh),
        "time": _time(every, workdir, step),
        "writes": _writes(config, workdir),
    }
    lines = [row(key, text) for key, text in rows.items() if text]
    if config.phases:
        lines.append(flops.table(every))
    return "\n".join(lines)


def row(key: str, text: str) -> str:
    """A line of the summary; several if it is long."""
    return textwrap.fill(
        text,
        _COLUMNS,
        initial_indent=key.ljust(_KEY),
        subsequent_indent=" " * _KEY,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _data(config, num_examples):
    size = " x ".join(map(str, (*config.data.image_size, config.data.channels)))
    return f"{num_examples:,} images of {config.data.name}, {size}, {_CACHES[config.data.cache]}"


def _model(config, params):
    width, depth, heads = dimensions(config.model)
    count = sum(x.size for x in jax.tree.leaves(params))
    classes = f", {config.model.num_classes} classes" if config.model.num_classes else ""
    return (
        f"U-ViT of {count:,} parameters: width {width}, {2 * (depth // 2) + 1} blocks, {heads} "
        f"heads, patches of {config.model.patch_size} x {config.model.patch_size}{classes}; "
        f"computes in {config.model.dtype}"
    )


def _noise(diffusion):
    if diffusion.framework == "edm":
        return f"edm, sigma_data {diffusion.sigma_data:g}"
    return f"ddpm, {diffusion.schedule} schedule; the network predicts {diffusion.prediction}"


def _image(config):
    if config.phases:
        return ""  # the table of the phases has it
    hidden = "" if config.mask.kind == "none" else f" (mask.kind {config.mask.kind})"
    return (
        f"{flops.tokens_text(config)} tokens{hidden}, "
        f"{flops.training_flops(config) / 1e9:.4g} GFLOP of training"
    )


def _steps(every, num_examples, step):
    config, num_steps = every[-1].config, every[-1].last_step
    work = flops.work(every, num_steps)
    batch = " / ".join(str(phase.config.train.batch_size) for phase in every)
    pieces = config.optim.accumulate_steps
    split = f" (in {pieces} pieces)" if pieces > 1 else ""
    left = f", of which {num_steps - step:,} are left" if step else ""
    return (
        f"{num_steps:,}{left}; batch {batch}{split}; {work.images:,} images in all, "
        f"{work.images / num_examples:,.3g} epochs, {_amount(work.flops)}"
    )


def _scores(evaluation):
    if not evaluation.every_steps:
        return "none in training (eval.every_steps is 0); --mode=evaluate measures them"
    return (
        f"every {evaluation.every_steps:,} steps: {', '.join(evaluation.metrics)} of "
        f"{evaluation.num_in_training:,} samples, and the loss on held-out images if there are any"
    )


def _amount(flop):
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        flop /= 1e3 if unit != "GFLOP" else 1e9
        if flop < 1000:
            return f"{flop:.3g} {unit}"
    return f"{flop / 1e3:.3g} EFLOP"


def _device(mesh):
    shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    peak = flops.peak_tflops(jax.devices()[0])
    mfu = (
        f"; MFU is relative to the datasheet's dense bf16 peak, {peak:g} TFLOP/s a device"
        if peak
        else ""
    )
    return f"{_devices()} ({shape}){mfu}"


def _devices():
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _time(every, workdir, step):
    """By what this run has recorded on as many devices of the same kind, else unknown."""
    records = [r for r in telemetry.read_metrics(workdir) if 1 < r["step"] <= step]
    alike = [r for r in records if r.get("device") == _devices() and r.get("model_tflops")]
    speeds = [r["model_tflops"] for r in alike[-_NEWEST:]]
    if not speeds:
        return "unknown on this device until a few steps were timed"
    work = flops.work(every, every[-1].last_step).flops - flops.work(every, step).flops
    seconds = work / (statistics.median(speeds) * 1e12)
    return (
        f"about {progress.clock(seconds)} to the end at the speed of this run's last "
        f"{len(speeds)} records, plus saves, previews and scores"
    )


def _writes(config, workdir):
    saves = f"checkpoints every {config.checkpoint.every_steps:,} steps"
    every = config.train.sample_every_steps
    previews = f", previews every {every:,}" if every else ""
    metrics = f"metrics every {config.train.log_every_steps:,}"
    return f"{files.place(workdir, '--workdir')}: {saves}{previews}, {metrics}"
