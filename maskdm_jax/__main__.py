"""The programs of this project as one command.

maskdm prepare --images=FOLDER --name=faces --size=256    a data set of a folder of images
maskdm train --config=pretrain_celebahq --workdir=W1      trains; the same command resumes
maskdm sample --config=finetune_celebahq --workdir=W2     draws images from the trained model
maskdm evaluate --config=finetune_celebahq --workdir=W2   draws them, and scores them
maskdm score --images=FOLDER --reference=FOLDER           scores any set of images
maskdm compare --runs W1 W2                               the scores of several runs
maskdm report W1 W2 --out=report.html                     a page on them
maskdm digest W2                                          a checkpoint's step and SHA-256

Each has a --help of its own. `python -m maskdm_jax` is the same command.
"""

import importlib
import signal
import sys

import maskdm_jax
from maskdm_jax import fields
from maskdm_jax.errors import ConfigError
from maskdm_jax.main import MODES
from maskdm_jax.main import main as run_mode
from maskdm_jax.run import command_line

# The module of each program, and the arguments that come before the typed ones.
_PROGRAMS = {
    "prepare": ("maskdm_jax.data.prepare", []),
    "score": ("maskdm_jax.quality.score", []),
    "compare": ("maskdm_jax.compare", []),
    "report": ("maskdm_jax.report.__main__", []),
    "digest": ("maskdm_jax.checkpoint", ["digest"]),
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in MODES:
        command_line.run(lambda: run_mode(name, arguments), resumes=True)
    if name in _PROGRAMS:
        signal.signal(signal.SIGINT, maskdm_jax.stop_at_once)  # the imports take seconds
        module, first = _PROGRAMS[name]
        return importlib.import_module(module).main([*first, *arguments])
    return command_line.exit_code(lambda: _help(name))


def _help(name):
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return
    commands = [*MODES, *_PROGRAMS]
    near = fields.nearest_word(name, commands) or "--help"
    given = f"{name!r} is not a command of maskdm" if name else "the command is missing"
    raise ConfigError(f"{given}; expected one of {', '.join(commands)}; type maskdm {near}")


if __name__ == "__main__":
    sys.exit(main())
