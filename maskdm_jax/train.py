"""Training: set-up and the loop, to be read from top to bottom. All stages take this path.

A run is a list of phases, one by default. Whatever depends on a config after the set-up uses that
of the current phase, whose step is compiled when the phase starts.
"""

import functools
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from clu import parameter_overview

from maskdm_jax import (
    averages,
    checkpoint,
    draw,
    dry_run,
    flops,
    images,
    phases,
    provenance,
    sharding,
    start_summary,
    transition,
)
from maskdm_jax.config import check_same_architecture, from_dict, to_json
from maskdm_jax.data import loader, sources
from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.fields import quoted
from maskdm_jax.run import distributed, faults, files, memory, preemption, wandb_mirror
from maskdm_jax.run.progress import say
from maskdm_jax.run.telemetry import Telemetry
from maskdm_jax.state import abstract_state, fresh_params, init_state
from maskdm_jax.step import jit_train_step, planned
from maskdm_jax.weights import start


def train(
    config,
    workdir: str | pathlib.Path,
    preempted: Callable[[int], bool] = lambda step: False,
    verbose: bool = False,
) -> None:
    """Trains to `config.train.num_steps` updates, from the newest checkpoint if there is one.

    Args:
      config: the run's.
      workdir: the folder for everything the run writes.
      preempted: step -> whether to save and stop after that many updates; called before each.
      verbose: whether to print the table of the parameters.

    Raises:
      ConfigError: for a data set, weights or a checkpoint that do not match the config.
      RunError: if too many updates in a row are not finite, or the disk is full.
      Preempted: after the save that follows `preempted` returning True.
    """
    workdir = files.as_place(workdir).expanduser()
    num_steps = config.train.num_steps
    wandb_mirror.check(config)

    # ------------------------------------------------------------------ what already exists
    every_phase = phases.phases(config)
    own_step, stored = _own_step(config, workdir)
    if own_step is not None and own_step >= num_steps:
        say(f"finished: {workdir} is at step {own_step} of {num_steps}; nothing to do")
        return
    source = sources.open_source(config)
    facts = provenance.current(config, source)
    for line in provenance.changes(facts, stored, own_step) if stored else []:
        say(line)
    if stored and (line := phases.going_back(config, from_dict(stored["config"]), own_step)):
        say(line)
    if config.train.dry_run:
        dry_run.dry_run(config, len(source))
        return

    # ------------------------------------- state: own checkpoint, else other weights, else fresh
    mesh = sharding.make_mesh(config)
    phase = phases.at(config, own_step or 0)
    params = None
    if own_step is None and not config.init.path:
        start.check_unused(config)
    elif own_step is None:
        params, table = start.load_params(phase.config, lambda: fresh_params(phase.config, mesh))
        say(table.text(verbose))
    _make_folder(workdir)
    mirror = wandb_mirror.start(config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, config, provenance.continued(facts, stored))
    if own_step is None:
        state = init_state(phase.config, mesh, params)
    else:
        state = checkpoints.restore(own_step, abstract_state(phase.config, mesh))
        say(f"resuming from step {own_step} of {workdir}")
    if distributed.is_main():
        # Of an earlier process of this run that was killed; evaluations write scores.jsonl too.
        files.remove_leftovers(workdir, "[!s]*.json*")
        files.remove_leftovers(workdir / "previews", "*.png")
        files.write_text(workdir / "config.json", to_json(config) + "\n")
    step = first_step = int(state.step)
    batches = loader.Loader(config, source, mesh)
    _say_start(config, source, mesh, state, workdir)
    feed = batches.batches(step)
    batch = next(feed)
    peak = flops.peak_tflops(jax.devices()[0])
    work = functools.partial(flops.work, every_phase)
    telemetry = Telemetry(workdir, config, step, work, peak and peak * jax.device_count(), mirror)
    skips = faults.SkipCounter(config.train.max_skipped_steps, checkpoints, telemetry.skipped)
    scorer = snapshots = compiled = None

    # ----------------------------------------------------------------------------- the loop
    pending = None  # (step, its metrics on the device), read once the next step is running
    while step < num_steps and not preempted(step):
        if step == phase.last_step:  # its checkpoint, if there is one, is saved
            before, phase = phase, every_phase[phase.index + 1]
            say(transition.described(phase, before, mesh))
            state, compiled = transition.enter(phase, before, state, mesh), None
            if snapshots is not None:
                snapshots.close()
        if compiled is None:
            for_next, compiled = _compile(phase, mesh, state, batches.arrays, batch, verbose)
            preview = _jit_preview(phase.config, mesh)
            if config.eval.every_steps:
                scorer = _make_scorer(phase.config, mesh, scorer)
            if config.optim.ema == "power":
                snapshots = averages.Snapshots(workdir, phase.config, step)
            telemetry.start_clock(step)

        state, metrics = compiled(state, batches.arrays, batch)
        step += 1
        if pending is not None:
            _log(telemetry, skips, config, *pending)
        pending = (step, metrics)
        batch = next(feed) if step < num_steps else None
        checkpoints.check()
        if snapshots is not None:
            snapshots.save(step, state.ema)

        every = config.train.sample_every_steps
        wants_preview = every and (step % every == 0 or step == num_steps)
        wants_scores = scorer and (step % config.eval.every_steps == 0 or step == num_steps)
        saves = step % config.checkpoint.every_steps == 0 or step == num_steps
        if saves or wants_preview or wants_scores or step == phase.last_step:
            _log(telemetry, skips, config, *pending)
            pending = None
            # Grid and scores first: a run killed in between makes them again after it resumes.
            if wants_preview:
                _draw_preview(telemetry, config, preview, averages.kept(state.ema, config), step)
            if wants_scores:
                _score(telemetry, scorer, averages.kept(state.ema, config), step)
            telemetry.flush()
            checkpoints.save(step, state, force=step == num_steps)
            telemetry.restart_clock(step)
    if pending is not None:
        _log(telemetry, skips, config, *pending)
    if first_step < step < num_steps:
        telemetry.flush()
        checkpoints.save(step, state, force=True)
    checkpoints.close()
    if snapshots is not None:
        snapshots.close()
    telemetry.close()
    if step < num_steps:
        raise preemption.Preempted(
            f"asked to stop at step {step} of {num_steps}; the newest checkpoint is "
            f"{checkpoints.latest_step() or 'none'}; the same command resumes"
        )
    say(f"finished: {workdir} is at step {step}")


def _compile(phase, mesh, state, arrays, batch, verbose):
    """Compiles the update of a phase, and prints its memory.

    Returns:
      (the jitted step, to be held until the next phase, which reuses it if it has the same
      program; (state, arrays, batch) -> (state, metrics)).
    """
    if verbose:
        say(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    say("compiling the step ...")
    start, plan = time.perf_counter(), planned(phase, mesh)
    jitted = jit_train_step(phase, mesh)
    compiled = jitted.lower(state, arrays, batch, plan).compile()
    seconds = time.perf_counter() - start
    say(start_summary.row("memory", f"{memory.described(compiled)} (compiled in {seconds:.0f} s)"))
    return jitted, lambda state, arrays, batch: compiled(state, arrays, batch, plan)


def _log(telemetry, skips, config, step, metrics):
    """Waits for a step's metrics, and records them if they are due or the step was skipped."""
    values = {name: float(value) for name, value in metrics.items()}
    skipped = values.pop("skipped") > 0
    total = skips.total + skipped
    telemetry.progress(step, values["loss"])
    due = step % config.train.log_every_steps == 0 or step in (1, config.train.num_steps)
    if due or skipped:
        telemetry.log(step, values | {"skipped": total})
    try:
        skips.count(step, skipped)
    except RunError:
        telemetry.close()  # W&B would lose the last steps
        raise


def _draw_preview(telemetry, config, preview, ema, step):
    drawn = np.asarray(preview(ema, np.arange(config.sample.preview_num, dtype=np.int32)))
    if not distributed.is_main():
        return
    path = telemetry.previews / f"step_{step:07d}.png"
    scale = images.shown_scale(config.data.image_size)
    picture = images.grid(drawn, scale, draw.classes_in_turn(config))
    remedy = "make room, then the same command resumes"
    with faults.explain_full_disk("the preview", path.parents[1], remedy, lambda: picture.nbytes):
        path.parent.mkdir(exist_ok=True)
        images.save_png(path, picture)
    telemetry.preview(step, path)
    say(f"samples of step {step} in {path.parent}")


def _jit_preview(config, mesh):
    return draw.jit_draw(config, mesh, sharding.replicated(mesh), config.sample.preview_steps)


def _make_scorer(config, mesh, earlier):
    """What scores the network of `config`; the sets that an `earlier` one has measured are kept."""
    from maskdm_jax import evaluation  # imports slowly, and few runs need it

    config = evaluation.for_training(config)
    if earlier:
        return earlier.of_phase(config)
    scorer = evaluation.Evaluation(config, mesh)
    scorer.measure_sets()
    return scorer


def _score(telemetry, scorer, ema, step):
    record = scorer.in_training(step, ema)
    if distributed.is_main():
        telemetry.scores(record)
    distributed.agreed([0])  # the others wait while process 0 scores


def _say_start(config, source, mesh, state, workdir):
    say(start_summary.described(config, source, mesh, state.params, workdir, int(state.step)))
    if config.optim.ema == "power":
        gib = averages.snapshot_bytes(state.ema, phases.phases(config)) / 2**30
        say(f"snapshots of the averages will take {gib:,.2f} GiB by step {config.train.num_steps}")


def _own_step(config, workdir):
    """The step that the run resumes from, and what that checkpoint stores beside its state.

    (None, None) for a new run.
    """
    if not distributed.agreed(checkpoint.steps(workdir)):
        return None, None
    # A dry run may look at a workdir in which another run is saving.
    step = checkpoint.find_step(workdir, set_aside=not config.train.dry_run)
    stored = checkpoint.load_record(workdir, step)
    before = from_dict(stored["config"])
    # Fine-tuning must not resume pre-training's own workdir, with its optimizer and step count.
    kind = phases.at(before, step).config.mask.kind
    if not config.phases and (config.mask.kind == "none") != (kind == "none"):
        raise ConfigError(
            f"mask.kind is {config.mask.kind!r}, but {workdir} holds a run with {kind!r}; to start "
            f"from its weights, type another --workdir and --config.init.path={quoted(workdir)}"
        )
    if config.phases or before.phases:
        phases.check_resumes(config, before, step, str(workdir))
    else:
        check_same_architecture(config, before, str(workdir))
    return step, stored


def _make_folder(workdir):
    try:
        files.make_folder(workdir)
    except OSError as error:
        raise ConfigError(
            f"--workdir {workdir} cannot be written to: {error}; type another --workdir"
        ) from error
    distributed.check_shared(workdir)
