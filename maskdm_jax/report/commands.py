"""The command lines that reproduce, resume, sample and score a run."""

import contextlib
import difflib
import pathlib
from xml.etree import ElementTree

from maskdm_jax import config_file
from maskdm_jax.config import as_flags, differences, is_used
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import quoted
from maskdm_jax.report import runs
from maskdm_jax.report.markup import element
from maskdm_jax.run import command_line


def shipped() -> dict:
    """{FILE or FILE:ARGUMENT: config} of the shipped files and those in ./configs.

    Broken ones are left out.
    """
    found = {}
    here = map(str, pathlib.Path("configs").glob("[a-z]*.py"))
    for path in sorted({*here, *config_file.shipped()}):
        with contextlib.suppress(ConfigError):
            found[path] = config_file.load(path)
        if path in found:
            for argument in config_file.arguments(path)[1:]:
                with contextlib.suppress(ConfigError):
                    found[f"{path}:{argument}"] = config_file.load(f"{path}:{argument}")
    return found


def command(config, workdir: str, configs: dict, mode: str = "train") -> str:
    """The command line that gives exactly this config.

    Args:
      config: a run's.
      workdir: the run's, or another for a copy of it.
      configs: as from `shipped`, of which the nearest is named; what differs becomes flags. Among
        equally near files, that with the name most like the workdir's is named.
      mode: "train", "sample" or "evaluate".
    """
    # What every phase sets itself has no effect, so a flag for it is refused.
    sets = [changes.keys() for _, changes in config.phases]
    ignored = set.intersection(*map(set, sets)) if sets else set()
    changed = {
        file: [n for n in differences(config, other) if n not in ignored and is_used(config, n)]
        for file, other in configs.items()
    }
    file = min(changed, key=lambda name: (len(changed[name]), -_likeness(name, workdir)))
    flags = [as_flags(config, [name]) for name in changed[file]]
    arguments = [f"--config={file} --workdir={quoted(workdir)}", *flags]
    return command_line.typed_mode(mode, " \\\n  ".join(arguments))


def _likeness(*paths):
    return difflib.SequenceMatcher(None, *(pathlib.Path(path).stem for path in paths)).ratio()


MASKED = (
    "it sees only the visible patches, so the run that is fine-tuned from it is drawn and scored "
    "instead."
)


def train(run: runs.Run, configs: dict) -> str:
    """The command that starts or resumes a run that has a config."""
    return command(run.config, run.workdir, configs)


def with_previews(run: runs.Run, configs: dict) -> str:
    """The command that trains with previews: from here on, or again if the run is finished."""
    config = run.config.copy_and_resolve_references()
    config.train.sample_every_steps = max(config.train.num_steps // 8, 1)
    finished = runs.steps(run) >= config.train.num_steps
    again = run.workdir.rstrip("/") + "_again"
    return command(config, again if finished else run.workdir, configs)


def mode(run: runs.Run, configs: dict, name: str) -> str | None:
    """The command that draws a run's samples, with the settings of its newest, or scores it.

    None for a run without a config.
    """
    if run.config is None:
        return None
    config = run.config.copy_and_resolve_references()
    if name == "sample" and run.samples:
        settings = run.samples[-1].settings
        config.sample.update({k: settings[k] for k in config.sample if k in settings})
    return command(config, run.workdir, configs, name)


def missing(problem: str, remedy: str | None) -> ElementTree.Element:
    """What a run lacks, and what to type to get it; None if no command is known."""
    if remedy is None:
        return element("p", f"{problem}.", class_="missing")
    head = element("p", f"{problem}; to get it, type:")
    return element("div", head, element("pre", remedy), class_="missing")


def section(found: list[runs.Run], configs: dict) -> list:
    """The command lines of each run that has a config, in the order in which they can be typed."""
    found = [run for run in found if run.config]
    if not found:
        return []
    parts = [
        element(
            "p",
            "The first command resumes a run from its newest checkpoint, or says that it is "
            "finished; a larger ",
            element("code", "--config.train.num_steps"),
            " continues it. With another ",
            element("code", "--workdir"),
            " the same command reproduces the run from its start. The others draw and score. ",
            element("code", "python -m maskdm_jax.checkpoint digest WORKDIR"),
            " prints the hash by which two runs are compared.",
            class_="soft",
        )
    ]
    for run in found:
        parts += [element("h3", run.name), element("pre", train(run, configs))]
        if not run.is_masked:
            others = [mode(run, configs, name) for name in ("sample", "evaluate")]
            head = element("summary", "Draw samples, and score them")
            typed = [element("pre", each) for each in others]
            parts.append(element("details", head, typed))
    return parts
