"""The command lines that reproduce, resume, sample and score a run."""

import difflib
import pathlib
from collections.abc import Iterable
from xml.etree import ElementTree

from maskdm_jax import config_file
from maskdm_jax.config import as_flags, default_config, differences, is_used
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import quoted
from maskdm_jax.report import runs
from maskdm_jax.report.markup import element

# A config file of which every field is the default.
DEFAULTS = "defaults.py"
MAKE_DEFAULTS = f"echo 'from maskdm_jax.config import default_config as get_config' > {DEFAULTS}"


def shipped() -> dict:
    """{file: config} of the files in configs/ of the current folder; broken ones are left out."""
    found = {}
    for path in sorted(pathlib.Path("configs").glob("[a-z]*.py")):
        try:
            found[str(path)] = config_file.load(str(path))
        except ConfigError:
            continue
    return found


def command(config, workdir: str, configs: dict, flags: Iterable[str] = ()) -> str:
    """The command line of main.py that gives exactly this config.

    Args:
      config: a run's.
      workdir: the run's, or another for a copy of it.
      configs: {file: its config}, of which the nearest is named; what differs becomes flags. Among
        equally near files, that with the name most like the workdir's is named.
      flags: more of them.
    """
    choices = {**configs, DEFAULTS: default_config()}
    # What every phase sets itself has no effect, so main.py refuses a flag for it.
    sets = [changes.keys() for _, changes in config.phases]
    ignored = set.intersection(*map(set, sets)) if sets else set()
    changed = {
        file: [n for n in differences(config, other) if n not in ignored and is_used(config, n)]
        for file, other in choices.items()
    }
    file = min(changed, key=lambda name: (len(changed[name]), -_likeness(name, workdir)))
    first = f"python main.py --config={file} --workdir={quoted(workdir)}"
    return " \\\n  ".join([first, *[as_flags(config, [name]) for name in changed[file]], *flags])


def _likeness(*paths):
    return difflib.SequenceMatcher(None, *(pathlib.Path(path).stem for path in paths)).ratio()


MASKED = (
    "it sees only the visible patches, so the run that is fine-tuned from it is drawn and scored "
    "instead."
)


def train(run: runs.Run, configs: dict) -> str:
    """The command that starts or resumes a run."""
    return command(run.config, run.workdir, configs)


def with_previews(run: runs.Run, configs: dict) -> str:
    """The command that trains with previews: from here on, or again if the run is finished."""
    config = run.config.copy_and_resolve_references()
    config.train.sample_every_steps = max(config.train.num_steps // 8, 1)
    finished = runs.steps(run) >= config.train.num_steps
    again = run.workdir.rstrip("/") + "_again"
    return command(config, again if finished else run.workdir, configs)


def mode(run: runs.Run, configs: dict, name: str) -> str:
    """The command that draws a run's samples, with the settings of its newest, or scores it."""
    config = run.config.copy_and_resolve_references()
    if name == "sample" and run.samples:
        settings = run.samples[-1].settings
        config.sample.update({k: settings[k] for k in config.sample if k in settings})
    return command(config, run.workdir, configs, [f"--mode={name}"])


def missing(problem: str, remedy: str) -> ElementTree.Element:
    """What a run lacks, and what to type to get it."""
    head = element("p", f"{problem}; to get it, type:")
    return element("div", head, _typed([remedy]), class_="missing")


def section(found: list[runs.Run], configs: dict) -> list:
    """The command lines of each run, in the order in which they can be typed."""
    parts = [
        element(
            "p",
            "In a checkout of maskdm_jax. The first command resumes a run from its newest "
            "checkpoint, or says that it is finished; a larger --config.train.num_steps continues "
            "it. With another --workdir the same command reproduces the run from its start. "
            "--mode=sample and --mode=evaluate draw and score. python -m maskdm_jax.checkpoint "
            "digest WORKDIR prints the hash by which two runs are compared.",
            class_="soft",
        )
    ]
    for run in found:
        parts += [element("h3", run.name), _typed([train(run, configs)])]
        if not run.is_masked:
            others = [mode(run, configs, name) for name in ("sample", "evaluate")]
            head = element("summary", "Draw samples, and score them")
            parts.append(element("details", head, _typed(others)))
    return parts


def _typed(lines):
    """Commands to copy, after the one that makes the file of defaults if they name it."""
    if any(f"--config={DEFAULTS} " in line for line in lines):
        lines = [MAKE_DEFAULTS, *lines]
    return [element("pre", line) for line in lines]
