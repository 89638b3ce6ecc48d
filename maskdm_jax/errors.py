"""Errors that end a program with one sentence instead of a stack trace, and their exit codes."""


class ConfigError(ValueError):
    """Bad input, found before any work: what was given, what is expected, what to type."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that started well must stop: one sentence, with what the user can do about it."""

    exit_code = 1


class BucketError(RunError):
    """A bucket stopped answering; what is in it is whole, and the next attempt may succeed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class StartError(RuntimeError):
    """The processes of a run cannot find each other; the next attempt may succeed."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h
