"""How the programs of this project start and end: flags, one-sentence errors, exit codes."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from maskdm_jax.errors import ConfigError, RunError, StartError

INTERRUPTED = 130  # what shells report after Ctrl-C
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start me again
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h: another attempt may succeed


def run(
    main: Callable[[list[str]], int | None],
    required: tuple[str, ...],
    example: str,
    unexpected: int = UNEXPECTED,
    resumes: bool = False,
) -> None:
    """Parses the absl flags, which include `--config`, runs `main`, and exits.

    Ctrl-C ends the process at once, also during the imports of native libraries, which turn
    Python's KeyboardInterrupt into errors of their own, and so does SIGTERM for a program that
    resumes. `preemption.Watch` replaces these handlers. An error ends the process at once too: the
    threads of a save in progress could keep it alive for minutes.

    Args:
      main: what to run, given the positional arguments; returns the exit code, None for 0.
      required: flags that must be given.
      example: a command that gives them, for the error message.
      unexpected: the exit code of an unexpected error.
      resumes: whether the same command continues what was stopped.
    """
    hint = "; the same command resumes" if resumes else ""

    def stop(signum, frame):
        os.write(2, f"stopped{hint}\n".encode())
        _leave(INTERRUPTED if signum == signal.SIGINT else TRY_AGAIN)

    signal.signal(signal.SIGINT, stop)
    if resumes:
        signal.signal(signal.SIGTERM, stop)
    # Silence library logs: warnings the user cannot act on, and stack traces of errors that are
    # raised anyway.
    logging.set_verbosity(logging.FATAL)
    try:
        app.run(main, flags_parser=lambda argv: _parse(argv, required, example))
    except Exception as error:
        _leave(report(error, unexpected))


def exit_code(work: Callable[[], object]) -> int:
    """Runs `work` and returns the program's exit code; prints an expected error as one sentence."""
    try:
        work()
    except (ConfigError, RunError, KeyboardInterrupt) as error:
        return report(error)
    return 0


def report(error: BaseException, unexpected: int = UNEXPECTED) -> int:
    """Prints why the program ends, and returns its exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, (ConfigError, RunError, StartError)):
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    traceback.print_exception(error)
    return unexpected


def _leave(code):
    with contextlib.suppress(Exception):  # a signal may come in the middle of a write
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _parse(argv, required, example):
    try:
        left = flags.FLAGS(argv)
        if flags.FLAGS.config is not None:
            flags.FLAGS.config["seed"]  # loads the file, or raises its error
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except (OSError, SyntaxError, ImportError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"--config cannot be loaded: {reason}; type --config=configs/NAME.py"
        ) from error
    except (AttributeError, KeyError) as error:
        # ml-collections quotes its message twice, so its line break is a backslash and an n.
        hint = str(error.args[0]).replace("\\n", ". ").replace("\\'", "").strip("'")
        hint = ". ".join(line.strip("' ") for line in hint.splitlines())
        raise ConfigError(
            f"unknown config field {hint}; maskdm_jax/config.py documents every field"
        ) from error
    for flag in required:
        if not flags.FLAGS[flag].value:
            raise ConfigError(f"--{flag} is missing; type: {example}")
    if len(left) > 1:
        raise ConfigError(f"unexpected argument {left[1]!r}; expected --flag=value")
    return left
