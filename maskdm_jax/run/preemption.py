"""Stopping on a signal: SIGTERM saves at the next step boundary, Ctrl-C stops at once.

A scheduler sends SIGTERM before it takes a machine away. The run then saves and exits with
TRY_AGAIN, which means "start me again"; a second SIGTERM changes nothing. With jax.distributed, JAX
catches the signal on whichever host receives it, and all hosts agree on one step.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from maskdm_jax.run.command_line import INTERRUPTED, TRY_AGAIN
from maskdm_jax.run.progress import say


class Preempted(Exception):
    """The run has saved and stopped after a signal."""


@contextlib.contextmanager
def watched(saved_steps: Callable[[], list[int]]) -> Iterator[Callable[[int], bool]]:
    """Yields `Watch.reached`; ends the process with TRY_AGAIN on Preempted, with 130 on Ctrl-C.

    Enter it after jax.distributed has started.

    Args:
      saved_steps: () -> steps of the run's checkpoints, ascending.
    """
    watch = Watch()
    try:
        yield watch.reached
    except Preempted as stop:
        # Another one, while Python ends and resets its handlers, would change the exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(str(stop))
        sys.exit(TRY_AGAIN)
    except KeyboardInterrupt:
        watch.interrupted(saved_steps)


class Watch:
    """Records whether a signal has asked this run to stop."""

    def __init__(self):
        self.step = None  # the last boundary reached
        self._noticed = False
        # Orbax saves through asyncio, which replaces Python's default handler (but no other) by its
        # own, and a Ctrl-C at the end of a save is lost.
        signal.signal(signal.SIGINT, self._interrupt)
        # JAX's own handler must stay: a Python handler would hide the signal from JAX.
        self._together = jax.distributed.is_initialized()
        if not self._together:
            signal.signal(signal.SIGTERM, self._notice)

    def reached(self, step: int) -> bool:
        """Whether to save and stop at the boundary after `step` updates.

        Several processes must each call it at every step; all get the same answer.
        """
        self.step = step
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noticed

    def interrupted(self, saved_steps: Callable[[], list[int]]) -> NoReturn:
        """Prints where the run stands, and ends the process whatever its threads are doing."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C
        where = f"at step {self.step}" if self.step is not None else "before the first step"
        kept = saved_steps()
        if kept:
            then = f"the newest checkpoint is step {kept[-1]}; the same command resumes"
        else:
            then = "there is no checkpoint; the same command starts again"
        say(f"stopped {where}; {then}")
        sys.stderr.flush()
        os._exit(INTERRUPTED)

    def _interrupt(self, signum, frame):
        raise KeyboardInterrupt

    def _notice(self, signum, frame):
        self._noticed = True
