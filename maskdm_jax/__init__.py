"""Masked diffusion models in JAX: pre-train on the visible patches, fine-tune on whole images."""

import os
import signal
import sys

__version__ = "0.1.0"


def stop_at_once(*_) -> None:
    """A handler for Ctrl-C: one line, and exit code 130."""
    os.write(2, b"stopped\n")
    os._exit(130)


# `python -m maskdm_jax.PROGRAM` imports for seconds before it runs. Native libraries turn Python's
# KeyboardInterrupt into errors of their own; `command_line.exit_code` ends this.
if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, stop_at_once)
