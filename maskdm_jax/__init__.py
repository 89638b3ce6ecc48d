"""Masked diffusion models in JAX: pre-train on the visible patches, fine-tune on whole images.

import maskdm_jax
model = maskdm_jax.load("W2")  # see maskdm_jax.api
"""

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskdm_jax.api import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "load"]


def __getattr__(name):
    # On first use: the programs import this package, and answer a wrong flag without JAX.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maskdm_jax import api

    return getattr(api, name)


def stop_at_once(*_) -> None:
    """A handler for Ctrl-C: one line, and exit code 130."""
    os.write(2, b"stopped\n")
    os._exit(130)


# `python -m maskdm_jax.PROGRAM` imports for seconds before it runs. Native libraries turn Python's
# KeyboardInterrupt into errors of their own; `command_line.exit_code` ends this.
if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, stop_at_once)
