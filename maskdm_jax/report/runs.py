"""What a workdir holds, and what its run has cost so far."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from ml_collections import config_dict
from PIL import Image

from maskdm_jax import phases
from maskdm_jax.config import load_json
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import files
from maskdm_jax.run.telemetry import read_metrics, read_scores

_LARGE = 200_000  # bytes; larger pictures are embedded as JPEG
_SIDE = 1024


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images that --mode=sample or --mode=evaluate drew: a folder, its settings, their number."""

    folder: pathlib.Path
    settings: dict
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a workdir holds.

    Fields:
      name: how the page calls the run.
      workdir: as typed.
      config: from config.json.
      metrics, scores: the records of metrics.jsonl and scores.jsonl.
      previews: (step, picture), ascending.
      samples: by step, and by time of drawing.
    """

    name: str
    workdir: str
    config: config_dict.ConfigDict
    metrics: list[dict]
    scores: list[dict]
    previews: list[tuple[int, pathlib.Path]]
    samples: list[Samples]

    @property
    def is_masked(self) -> bool:
        """Whether training hides patches to the end: it is to be fine-tuned, not sampled."""
        return phases.phases(self.config)[-1].config.mask.kind != "none"


@dataclasses.dataclass(frozen=True)
class Progress:
    """A run's totals at each of its N records of metrics: float64 [N] each.

    Training alone counts: no compilation, and no saves, previews or scores between the steps.
    """

    step: np.ndarray
    images: np.ndarray
    seconds: np.ndarray
    device_seconds: np.ndarray
    flops: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cost:
    """Totals of a run, or of several; nan for what was not recorded."""

    images: float = 0.0
    seconds: float = 0.0
    device_seconds: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            *map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


def read(workdirs: list[str]) -> list[Run]:
    """Reads workdirs; the runs are called by the folders' names, or whole paths if these repeat.

    Raises:
      ConfigError: for a folder without config.json, or with a file that cannot be read.
    """
    paths = {workdir: files.place(workdir, "workdirs") for workdir in workdirs}
    names = [path.name for path in paths.values()]
    return [
        _read(path.name if names.count(path.name) == 1 else str(path), workdir, path)
        for workdir, path in paths.items()
    ]


def _read(name, workdir, path):
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{workdir} holds no config.json; expected the --workdir of a run; type another one"
        )
    with _damage_explained(path / "config.json"):
        config = load_json(path / "config.json")
    previews = (path / "previews").glob("step_*.png")
    numbered = [(int(match[1]), p) for p in previews if (match := re.search(r"_(\d+)$", p.stem))]
    grids = (path / "samples").glob("*/grid.png")
    samples = [_samples(grid.parent) for grid in sorted(grids, key=files.modified)]
    return Run(
        name,
        workdir,
        config,
        read_metrics(path),
        read_scores(path),
        sorted(numbered),
        sorted(samples, key=lambda found: found.settings["step"]),
    )


def _samples(folder):
    with _damage_explained(folder / "settings.json"):
        settings = json.loads((folder / "settings.json").read_text())
        settings["step"] + 0  # a number, by which samples are sorted
        return Samples(folder, settings, len(list(folder.glob("[0-9]*.png"))))


def progress(run: Run) -> Progress:
    """The totals of a run at each record."""
    step, step_s, tflops, loss = (
        np.array([record.get(key, np.nan) for record in run.metrics], np.float64)
        for key in ("step", "step_s", "model_tflops", "loss")
    )
    span = np.diff(step, prepend=0) * step_s  # step_s is the mean since the record before
    return Progress(
        step,
        _images(run),
        np.cumsum(span),
        np.cumsum(span * [_num_devices(record) for record in run.metrics]),
        np.cumsum(span * tflops) * 1e12,
        loss,
    )


def _images(run):
    """The images seen up to each record: its own count, if it has one."""
    batch = run.config.train.batch_size
    counts = [record.get("images", record["step"] * batch) for record in run.metrics]
    return np.array(counts, np.float64)


def _num_devices(record):
    match = re.match(r"(\d+) x ", str(record.get("device")))
    return int(match[1]) if match else np.nan


def devices(run: Run) -> str:
    """The devices that a run was trained on, such as "8 x NVIDIA H200"; empty if unknown."""
    return ", then ".join(dict.fromkeys(r["device"] for r in run.metrics if r.get("device")))


def steps(run: Run) -> int:
    """The updates that a run has made, by its records."""
    return run.metrics[-1]["step"] if run.metrics else 0


def cost(run: Run) -> Cost:
    """What a run has cost up to its last record, without the runs that it starts from."""
    if not run.metrics:
        return Cost()
    totals = progress(run)
    return Cost(*(getattr(totals, f.name)[-1] for f in dataclasses.fields(Cost)))


def before(run: Run, others: list[Run]) -> list[Run]:
    """Those of `others` that a run's weights come from: its `init.path`, and theirs in turn."""
    chain = [run]
    while source := next((r for r in others if _starts_from(chain[0], r) and r not in chain), None):
        chain.insert(0, source)
    return chain[:-1]


def _starts_from(run, other):
    if not run.config.init.path or run.workdir == other.workdir:
        return False
    start, folder = (
        pathlib.Path(path).expanduser().absolute() for path in (run.config.init.path, other.workdir)
    )
    return start == folder or folder in start.parents


def picture(path: pathlib.Path) -> tuple[str, bytes]:
    """A picture to embed: (its MIME type, the file), large ones reduced.

    Raises:
      ConfigError: if it is not a whole picture.
    """
    with _damage_explained(path):
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if len(content) <= _LARGE:
                return "image/png", content
            small = image.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=85)
        return "image/jpeg", out.getvalue()


@contextlib.contextmanager
def _damage_explained(path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SyntaxError) as error:
        raise ConfigError(
            f"{path} cannot be read: {' '.join(str(error).split())[:200]}; expected the file that "
            "training or sampling wrote; type the command that wrote it again"
        ) from error
