"""Weights & Biases (W&B): a copy of what a run writes into its workdir, if `log.wandb` is not off.

The workdir holds the original, and the id of its W&B run. Each start continues that run, and first
sends what W&B lacks up to the checkpoint: online its server names the newest step it has, offline
`wandb.json` does. So a point is neither doubled nor lost, even if W&B failed in between.

After the start, a failure of W&B is a remark; the run continues.
"""

import io
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable

from PIL import Image

from maskdm_jax.errors import ConfigError
from maskdm_jax.run import distributed, files, progress

_CONNECT_S = 20  # a server that is silent for this long counts as unreachable
_FINISH_S = 15  # schedulers leave a preempted run half a minute; unsent data stays in the workdir
_RECORD = "wandb.json"
_SCORED = "scores/step"  # x axis of scores: an evaluation may score earlier checkpoints


def check(config) -> None:
    """Raises ConfigError if `log.wandb` is not off, but W&B's package cannot be imported."""
    if config.log.wandb == "off" or not distributed.is_main():
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"log.wandb is {config.log.wandb!r}, but W&B's package cannot be imported: {error}; "
            "expected it to be installed; type pip install '.[wandb]', or --config.log.wandb=off"
        ) from error


class Mirror:
    """One start of a W&B run."""

    def __init__(self, run, first_step: int, closed: Callable[[int], None]):
        """
        Args:
          run: what `wandb.init` returned.
          first_step: W&B has the steps below.
          closed: gets the newest step once W&B has everything.
        """
        self._run, self._closed = run, closed
        self._first_step = first_step
        self._last_step = first_step - 1
        self._failed = False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds the metrics of a step, as `Telemetry` records them."""
        self._log(step, lambda: values)

    def preview(self, step: int, path: pathlib.Path) -> None:
        """Adds a PNG file to a step."""
        import wandb

        def picture():
            content = path.read_bytes() if files.is_remote(path) else None
            return wandb.Image(str(path) if content is None else Image.open(io.BytesIO(content)))

        self._log(step, lambda: {"preview": picture()})

    def scores(self, step: int, values: dict[str, float], definition: str) -> None:
        """Adds scores to a step; steps ascend, so this is for scores in training."""
        self._log(step, lambda: _scores(step, values, definition))

    def evaluated(self, step: int, values: dict[str, float], definition: str) -> None:
        """Adds the scores of a checkpoint, in any order of steps."""
        self._attempt(lambda: self._run.log(_scores(step, values, definition)))

    def close(self) -> None:
        """Waits a short time for what is not sent yet; that stays in the workdir."""

        def finish():
            self._run.finish()
            self._closed(self._last_step)

        self._attempt(finish)

    def _log(self, step, values):
        """Adds to a step what `values` returns. W&B closes a step when a later one comes."""
        if step >= self._first_step:
            self._last_step = step
            self._attempt(lambda: self._run.log(values(), step=step))

    def _attempt(self, action):
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # of any kind: none may end a training run
            self._failed = True
            progress.remark(
                f"W&B failed: {_one_line(error)}; the run does without it, and what is missing "
                "there is sent when the run resumes"
            )


def start(config, workdir: pathlib.Path, job: str = "train") -> Mirror | None:
    """Starts or continues the W&B run of a workdir; None with `log.wandb` off, or off process 0.

    W&B gets the config, and what is handed to the mirror; no code, no console output, no machine
    name or load. Of itself it adds its version, Python's, the platform, and which libraries it
    knows are imported. It cannot stop the run.

    Args:
      config: the run's.
      workdir: where W&B's own files go.
      job: "train" continues the workdir's run; with "evaluate" each start is a run of its own in
        the same group.

    Raises:
      ConfigError: if W&B does not start and, in training, never has: a run that a scheduler
        restarts does without it.
    """
    if config.log.wandb == "off" or not distributed.is_main():
        return None
    if files.is_remote(workdir) and config.log.wandb == "offline":
        raise ConfigError(
            f"log.wandb is 'offline', which writes below --workdir {workdir}, a bucket; expected "
            "a local --workdir for it; type --config.log.wandb=online, or off"
        )
    path = workdir / _RECORD
    known = json.loads(path.read_text()) if path.exists() else None
    record = known or {"id": uuid.uuid4().hex, "last_step": -1, "open": ""}
    trains = job == "train"
    try:
        run = _init(config, workdir, job, record["id"], record["id"] if trains else None)
    except Exception as error:  # of any kind, such as a damaged configuration of W&B's own
        problem = f"log.wandb is {config.log.wandb!r}, but W&B does not start: {_one_line(error)}"
        if trains and known:
            progress.remark(f"{problem}; the run does without it")
            return None
        remedy = "--config.log.wandb=off"
        if config.log.wandb == "online":
            remedy = "wandb login, or --config.log.wandb=offline"
        raise ConfigError(
            f"{problem}; expected a start within {_CONNECT_S} s; type {remedy}"
        ) from error
    if not trains:
        return Mirror(run, 0, lambda last_step: None)
    if config.log.wandb == "online":
        first_step = run.starting_step
    else:
        first_step = record["last_step"] + 1
        _remove_unfinished(workdir / "wandb", record["open"])

    def write(last_step, folder):
        record.update(last_step=last_step, open=folder)
        files.write_text(path, json.dumps(record) + "\n")

    write(record["last_step"], pathlib.Path(run.dir).parent.name)
    return Mirror(run, first_step, lambda last_step: write(last_step, ""))


def _init(config, workdir, job, group, run_id):
    import wandb

    # Else W&B's own processes report their errors and timings to it.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    settings = wandb.Settings(
        console="off",
        disable_git=True,
        finish_timeout=_FINISH_S,
        finish_timeout_raises=True,
        host="",  # else the name of this machine
        init_timeout=_CONNECT_S,
        reinit="create_new",
        save_code=False,
        silent=True,
        stop_fn=lambda: None,  # else the web page's stop button sends this process SIGINT
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    wandb.setup(settings=wandb.Settings(silent=True))
    online = config.log.wandb == "online"
    if online and not wandb.login(prompt=False, verify=False):
        raise PermissionError("no login is known here")
    run = wandb.init(
        project=config.log.wandb_project,
        name=workdir.name,
        id=run_id,
        group=group,
        job_type=job,
        resume="allow" if online else None,
        mode=config.log.wandb,
        dir=tempfile.mkdtemp() if files.is_remote(workdir) else str(workdir),
        config=config.to_dict(),
        settings=settings,
    )
    run.define_metric(_SCORED, hidden=True)
    run.define_metric("scores/*", step_metric=_SCORED)
    if online:
        progress.say(f"W&B: {run.url}")
    else:
        progress.say(f"W&B: offline; after the run, wandb sync {workdir}/wandb uploads it")
    return run


def _remove_unfinished(folder, name):
    """Removes what a killed process wrote offline: it lacks the last steps, which come again."""
    if name.startswith("offline-"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _scores(step, values, definition):
    return {_SCORED: step, **values, "scores/definition": definition}


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__
