"""The page: which sections it has, and where it is written."""

import pathlib

from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import quoted
from maskdm_jax.report import commands, cost, curves, markup, pictures, runs, scores, summary
from maskdm_jax.run import files


def write(workdirs: list[str], out: str | pathlib.Path) -> pathlib.Path:
    """Writes the page on the runs in `workdirs` to the file `out`.

    Returns:
      The file's path.

    Raises:
      ConfigError: for a workdir that is none, a file in it that cannot be read, or an `out` that
        cannot be written.
    """
    out = files.local_path(out, "--out")
    if out.is_dir():
        raise ConfigError(
            f"--out {out} is a folder; expected an HTML file; type "
            f"--out={quoted(out / 'report.html')}"
        )
    text = make(runs.read(list(dict.fromkeys(workdirs))))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(out, text)
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written to: {error}; expected an HTML file in a folder that "
            "this user may write to; type --out=report.html"
        ) from error
    return out


def make(found: list[runs.Run]) -> str:
    """The page on these runs, as HTML."""
    configs = commands.shipped()
    sections = {
        "Runs": summary.section(found),
        "Samples": pictures.samples(found, configs),
        "Scores": scores.section(found, configs),
        "Loss": curves.losses(found, configs),
        "Held-out loss by noise level": curves.heldout(found, configs),
        "Previews during training": pictures.previews(found, configs),
        "Time and cost": cost.section(found),
        "Resume and reproduce": commands.section(found, configs),
    }
    shown = {name: parts for name, parts in sections.items() if parts}
    return markup.page(", ".join(run.name for run in found), shown)
