"""`--mode=evaluate`: scores the checkpoints of a workdir, or an official file, one line of
scores.jsonl for each.

Images are drawn as by --mode=sample, into the same folders, so an interrupted evaluation resumes
with the missing images, and a score that is already there is not computed again.
"""

import contextlib
import hashlib
import itertools
import json
import pathlib
import re
import time

import jax
import numpy as np

from maskdm_jax import (
    averages,
    checkpoint,
    draw,
    draw_batches,
    evaluation,
    images,
    phases,
    sample,
    sharding,
)
from maskdm_jax.config import FIELDS, get, without_later
from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import reference
from maskdm_jax.run import distributed, files, progress, telemetry, wandb_mirror
from maskdm_jax.run.progress import say
from maskdm_jax.weights import saved


def evaluate(config, workdir: str | pathlib.Path) -> list[dict]:
    """Scores the checkpoints of `config.eval.checkpoints`.

    Returns:
      Their records, which are in <workdir>/scores.jsonl too; on process 0 alone.

    Raises:
      ConfigError: if there is no such checkpoint, or the sets or weights cannot give the scores.
    """
    workdir = files.as_place(workdir)
    config = config.copy_and_resolve_references()
    config.sample.num = config.eval.num
    wandb_mirror.check(config)
    if sample.start_image(config):
        raise ConfigError(
            f"sample.init_image is {config.sample.init_image}, but --mode=evaluate scores images "
            "that are drawn from noise; type --config.sample.init_image=''"
        )
    steps = _steps(config, workdir)
    groups = list(_by_network(config, workdir, steps))
    stds = _ema_stds(config)
    mesh = sharding.make_mesh(config)
    what, which = f"{len(steps)} checkpoint(s) of {workdir}", ", ".join(map(str, steps))
    if steps == [None]:
        what, which = "the official file", saved.at(config, workdir, None).where
    say(f"scoring {what} by {config.eval.num:,} images each: {which}")
    mirror = wandb_mirror.start(config, workdir, "evaluate")
    scorer, records = None, []
    with contextlib.ExitStack() as stack:
        if mirror is not None:
            stack.callback(mirror.close)
        for config, steps in groups:
            scorer = scorer.of_phase(config) if scorer else evaluation.Evaluation(config, mesh)
            pairs = list(itertools.product(steps, stds))
            drawing = _expected(config, workdir, pairs, mesh, scorer)
            scorer.measure_sets()
            for step, std in pairs:
                config.sample.ema_std = std
                key = _key(config, workdir, step, scorer) if distributed.is_main() else ""
                record = next((r for r in telemetry.read_scores(workdir) if r["key"] == key), None)
                (is_scored,) = distributed.agreed([record is not None])
                if is_scored:
                    where = saved.at(config, workdir, step).where
                    say(f"{where} is scored already, in scores.jsonl")
                    if distributed.is_main():
                        say(telemetry.described_scores(record))
                else:
                    record = _evaluate(config, workdir, step, mesh, scorer, drawing) | {"key": key}
                    if distributed.is_main():
                        telemetry.add_scores(workdir, record)
                if mirror is not None:
                    mirror.evaluated(*telemetry.plotted(record))
                distributed.agreed([0])  # the others wait while process 0 scores
                records.append(record)
    return records


def _by_network(config, workdir, steps):
    """(config, steps) for each phase of the run that some of the checkpoints are from."""
    if steps == [None]:
        yield saved.at(config, workdir, None).network(config), steps
        return
    stored = {step: checkpoint.load_config(workdir, step) for step in steps}
    for _, group in itertools.groupby(steps, lambda step: phases.at(stored[step], step).index):
        group = list(group)
        step = group[0]
        yield phases.of_checkpoint(config, stored[step], step, str(workdir)), group


def _expected(config, workdir, pairs, mesh, scorer):
    """Says how long the evaluation will take; returns the drawing, None if all is drawn.

    A record of the same images counts as what will be found scored.
    """
    num_to_draw = num_to_score = 0
    scored = {pathlib.Path(r.get("images", "")).name for r in telemetry.read_scores(workdir)}
    for step, std in pairs:
        config.sample.ema_std = std
        folder = sample.folder_of(config, workdir, step)
        num_to_draw += len(sample.missing(config, folder))
        num_to_score += folder.name not in scored
    num_to_draw, num_to_score = distributed.agreed([num_to_draw, num_to_score])
    say("compiling, and timing a batch of each kind of work ...")
    params = jax.tree.map(_zeros, draw.abstract_params(config, mesh))
    found, drawing = {}, None
    if num_to_draw:
        drawing = draw_batches.Drawing(config, mesh)
        size = drawing.batch_size
        for _ in range(2):  # the first compiles
            start = time.perf_counter()
            list(drawing.in_batches(params, range(size)))
        each = (time.perf_counter() - start) / size
        found[f"drawing {num_to_draw:,} images"] = num_to_draw * each
    found |= scorer.seconds(num_to_score, params)
    if found:
        parts = [f"{what} {progress.clock(seconds)}" for what, seconds in found.items()]
        say(f"about {progress.clock(sum(found.values()))}: {', '.join(parts)}")
    return drawing


def _zeros(x):
    zeros = np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return jax.make_array_from_callback(x.shape, x.sharding, zeros.__getitem__)


def _evaluate(config, workdir, step, mesh, scorer, drawing):
    start = time.perf_counter()
    losses, network = {}, saved.at(config, workdir, step)
    for kind in network.kinds:
        draws = kind == config.sample.weights
        if not draws and not scorer.has_heldout:
            continue
        weights = sample.restore(config, workdir, step, mesh, kind)
        if draws:
            folder = sample.write_samples(config, workdir, step, weights, drawing)
        if scorer.has_heldout:
            losses[kind] = scorer.heldout_loss(weights)
        del weights  # before the others take its place
    distributed.check_shared(folder)
    shape = (*config.data.image_size, config.data.channels)
    drawn = reference.Images(
        "the samples",
        shape,
        config.sample.num,
        lambda index: images.read_png(sample.image_path(folder, index), shape[-1]),
    )
    found = scorer.image_scores(drawn)
    if not distributed.is_main():
        return {}
    return {
        "step": network.step,
        **found,
        "evaluations": draw.evaluations(config),
        "heldout_loss": losses,
        "images": str(folder),
        "checkpoint_sha256": network.fingerprint(),
        "config_sha256": hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest(),
        "seconds": round(time.perf_counter() - start, 1),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _key(config, workdir, step, scorer):
    """A hash of all that a record depends on."""
    parts = [
        saved.at(config, workdir, step).fingerprint(),
        _meaning(config),
        scorer.definition(config.eval.num),
        list(config.eval.metrics),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _meaning(config):
    """The fields of model and diffusion, by group."""
    found = {"model": {}, "diffusion": {}}
    names = [name for name in FIELDS if name.partition(".")[0] in found]
    for name, value in without_later({name: get(config, name) for name in names}).items():
        group, _, leaf = name.partition(".")
        found[group][leaf] = value
    return found


def _ema_stds(config):
    """The lengths of `eval.ema_stds`; that of `sample.ema_std` if there are none."""
    texts = [text for text in config.eval.ema_stds.split(",") if text.strip()]
    try:
        stds = list(dict.fromkeys(map(float, texts))) or [config.sample.ema_std]
    except ValueError:
        stds = [-1.0]
    if not all(0 <= std <= 0.28 for std in stds):
        raise ConfigError(
            f"eval.ema_stds is {config.eval.ema_stds!r}; expected numbers between 0 and 0.28; type "
            "--config.eval.ema_stds=0.02,0.05,0.1"
        )
    if texts and config.sample.weights == "raw":
        raise ConfigError(
            f"eval.ema_stds is {config.eval.ema_stds!r}, but sample.weights is 'raw', of which "
            "there is no average; type --config.sample.weights=ema"
        )
    for std in stds:
        averages.check_std(config, std, "eval.ema_stds" if texts else "sample.ema_std")
    return stds


def _steps(config, workdir):
    """The steps of `eval.checkpoints`, ascending; all exist, and are undamaged. [None] for the
    official file of `init.path`."""
    which = config.eval.checkpoints
    found = distributed.agreed(checkpoint.steps(workdir))
    if which == "newest" or (which == "all" and not found):
        return [saved.find_step(config, workdir)]
    match = re.fullmatch(r"(\d*):(\d*)", which)
    if which == "all":
        wanted = found
    elif which.isdecimal():
        wanted = [int(which)]
    elif match:
        low, high = (int(text) if text else default for text, default in
                     zip(match.groups(), (0, 2**31), strict=True))  # fmt: skip
        wanted = [step for step in found if low <= step <= high]
    else:
        raise ConfigError(
            f"eval.checkpoints is {which!r}; expected newest, all, a step or a range; type "
            "--config.eval.checkpoints=newest, or 1000:9000"
        )
    if not wanted or not set(wanted) <= set(found):
        raise ConfigError(
            f"eval.checkpoints is {which!r}, but {workdir} holds the steps {found}; type "
            "--config.eval.checkpoints=all"
        )
    return [checkpoint.find_step(workdir, step) for step in wanted]
