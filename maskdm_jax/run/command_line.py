"""How the programs of this project start and end: flags, one-sentence errors, exit codes."""

import argparse
import contextlib
import errno
import faulthandler
import os
import re
import shlex
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence

from absl import logging

import maskdm_jax
from maskdm_jax import fields
from maskdm_jax.errors import BucketError, ConfigError, RunError, StartError
from maskdm_jax.run import bucket, faults, files

INTERRUPTED = 130  # what shells report after Ctrl-C
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start me again
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h: another attempt may succeed

_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)

_CONFIG = "--config."


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line raises ConfigError, in the words of the config's fields.

    Flags with a value are declared by `flag`; `parse` gives their values, and those of the config.
    """

    def __init__(
        self,
        about: str,
        example: str,
        table: dict[str, fields.Field] | None = None,
        common: Sequence[str] = (),
    ):
        """
        Args:
          about: the program's docstring, for --help.
          example: a command that works, for error messages.
          table: the config's fields, for a program that takes --config.FIELD=VALUE.
          common: those that --help lists, while --help_all lists all; none: --help lists all.
        """
        super().__init__(
            usage=f"{example} ...",
            description=about,
            epilog=table and _described(table, common),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if common:
            every = _described(table, ())
            self.add_argument(
                "--help_all", action=_HelpAll, epilog=every, help="list all fields, and exit"
            )
        self._example = example
        self._fields = [f"{_CONFIG}{name}" for name in table or ()]
        self._kinds = {}

    def flag(
        self,
        name: str,
        kind: fields.Kind,
        meaning: str,
        default=None,
        required: bool = False,
        many: bool = False,
    ) -> None:
        """Declares --NAME=VALUE; or, without the dashes in `name`, an argument without a flag.

        Args:
          name: with or without leading dashes.
          kind: which values it takes.
          meaning: for --help.
          default: the value if it is not given.
          required: whether it must be given.
          many: whether it takes several values, as a list.
        """
        self._kinds[name] = (kind, default, required)
        meaning += _takes(kind)
        if default not in (None, [], ""):
            meaning += f"; default: {' '.join(map(str, default)) if many else default}"
        number = "*" if many else None if name.startswith("-") else "?"
        shown = "VALUE" if name.startswith("-") else name.upper()
        self.add_argument(
            name,
            nargs=number,
            default=default,
            help=meaning.replace("%", "%%"),  # argparse formats this text with %, and no other
            metavar=shown,
        )

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The values of a command line, with --config.FIELD=VALUE as "FIELD=VALUE" in `changes`.

        Args:
          argv: the arguments; None for this process's.

        Raises:
          ConfigError: for the first thing that is wrong.
        """
        values, rest = self.parse_known_args(argv)
        values.changes = []
        while rest:
            argument = rest.pop(0)
            if not (self._fields and argument.startswith(_CONFIG)):
                self._refuse(argument)
            if "=" not in argument and rest and not rest[0].startswith("--"):
                argument += f"={rest.pop(0)}"
            values.changes.append(argument.removeprefix(_CONFIG))
        for name, (kind, default, required) in self._kinds.items():
            key = name.lstrip("-")
            given = getattr(values, key)
            if required and given in (None, "", []):
                raise ConfigError(f"{name} is missing; type: {self._example}")
            if isinstance(given, list) and given is not default:
                typed = [fields.typed(name, text, kind, (*default, None)[0]) for text in given]
                setattr(values, key, typed or default)
            elif isinstance(given, str):
                setattr(values, key, fields.typed(name, given, kind, default))
        return values

    def error(self, message):
        """argparse calls this for a flag without its value, and for one that takes none."""
        found = re.match(r"argument (\S+): expected", message)
        if not found:
            raise ConfigError(f"{message}; type: {self._example}")
        kind, default, _ = self._kinds[found[1]]
        value = "VALUE" if default is None else fields.quoted(kind.nearest("", default))
        raise ConfigError(
            f"{found[1]} has no value; expected {kind.expected}; type {found[1]}={value}"
        )

    def _refuse(self, argument):
        if not argument.startswith("-"):
            raise ConfigError(
                f"unexpected argument {argument!r}; expected --flag=value; type: {self._example}"
            )
        flag, has_value, value = argument.partition("=")
        near = fields.nearest_word(flag, [*self._option_string_actions, *self._fields])
        remedy = near + has_value + shlex.quote(value) * bool(has_value) if near else "--help"
        raise ConfigError(
            f"{flag} is not a flag of this program; expected one that --help lists; type {remedy}"
        )


def typed_mode(mode: str, arguments: str) -> str:
    """How a user types a mode here: with main.py in a checkout, elsewhere with `maskdm`.

    Args:
      mode: "train", "sample" or "evaluate".
      arguments: what follows.
    """
    if not os.path.exists("main.py"):
        return f"maskdm {mode} {arguments}"
    return f"python main.py {arguments}" + f" --mode={mode}" * (mode != "train")


class _HelpAll(argparse.Action):
    """Prints the help with another epilog, and exits."""

    def __init__(self, epilog, **options):
        super().__init__(nargs=0, default=argparse.SUPPRESS, **options)
        self._epilog = epilog

    def __call__(self, parser, *_):
        parser.epilog = self._epilog
        parser.print_help()
        parser.exit()


def run(
    main: Callable[[], int | None], unexpected: int = UNEXPECTED, resumes: bool = False
) -> None:
    """Runs `main`, and exits.

    Ctrl-C ends the process at once, also during the imports of native libraries, which turn
    Python's KeyboardInterrupt into errors of their own, and so does SIGTERM for a program that
    resumes. `preemption.Watch` replaces these handlers. An error ends the process at once too: the
    threads of a save in progress could keep it alive for minutes.

    Args:
      main: what to run; returns the exit code, None for 0.
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
    faulthandler.enable()
    _print_any_name()
    # Silence library logs: warnings the user cannot act on, and stack traces of errors that are
    # raised anyway.
    logging.use_absl_handler()
    logging.set_verbosity(logging.FATAL)
    try:
        code = main()
    except Exception as error:
        _leave(report(error, unexpected))
    sys.exit(code)


def exit_code(work: Callable[[], object]) -> int:
    """Runs `work` and returns the program's exit code; prints an expected error as one sentence."""
    _print_any_name()
    if signal.getsignal(signal.SIGINT) is maskdm_jax.stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ConfigError, RunError, OSError, KeyboardInterrupt) as error:
        return report(error)
    except Exception as error:
        if not files.lost(error):
            raise
        return report(error)
    return 0


def report(error: BaseException, unexpected: int = UNEXPECTED) -> int:
    """Prints why the program ends, and returns its exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in _UNUSABLE:
        error = ConfigError(
            f"{error.filename} cannot be used: {error.strerror}; expected a path that this user "
            "may read and write; change its permissions, or type another"
        )
    if isinstance(error, OSError) and faults.disk_is_full(error):
        error = RunError(f"{error}; make room, then type the same command")
    if not isinstance(error, (ConfigError, RunError)) and files.lost(error):
        error = BucketError(bucket.described(error))
    if isinstance(error, (ConfigError, RunError, StartError)):
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return error.exit_code
    traceback.print_exception(error)
    return unexpected


def _print_any_name():
    """Lets names that a terminal cannot show be printed as escapes, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _leave(code):
    with contextlib.suppress(Exception):  # a signal may come in the middle of a write
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _printable(text):
    """`text` as one line: what a user typed may hold line breaks or a terminal's control codes."""
    return "".join(c if c.isprintable() else repr(c).strip("'") for c in text)


def _described(table, common):
    """The config's fields for --help; only those that are common, if any are named."""
    what = "common fields of the config" if common else "fields of the config"
    lines = [f"{what}, with the defaults that a file in configs/ starts from:", ""]
    for name in common or table:
        field = table[name]
        lines.append(f"  {_CONFIG}{name}={fields.quoted(field.default)}")
        lines += textwrap.wrap(
            field.meaning + _takes(field.kind),
            80,
            initial_indent=" " * 8,
            subsequent_indent=" " * 8,
        )
    if common:
        rest = len(table) - len(common)
        lines += ["", f"--help_all lists the other {rest} too. docs/running.md explains phases,"]
        lines += [
            "docs/training.md the objective and the optimizer, docs/sampling.md the",
            "sampler.",
        ]
    return "\n".join(lines)


def _takes(kind):
    return "" if kind is fields.TEXT else f" ({kind.expected})"
