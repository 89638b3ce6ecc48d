"""Orbax's handlers of what a checkpoint holds: the state, arrays, and the config, JSON."""

import jax
import numpy as np
import orbax.checkpoint as ocp


def for_run() -> ocp.DefaultCheckpointHandlerRegistry:
    """The handlers of a run that saves and resumes."""
    # By default each device saves a part of every array of which all have a copy. That shares the
    # work among hosts; within one host it stops training for longer than saving a single copy does.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    handlers = ocp.DefaultCheckpointHandlerRegistry()  # which has JSON's
    handlers.add("state", ocp.args.PyTreeSave, state)
    handlers.add("state", ocp.args.PyTreeRestore, state)
    return handlers


def reader(alone: bool) -> ocp.Checkpointer:
    """Reads checkpoints of any run.

    Args:
      alone: True if only this process reads.
    """
    options = ocp.options.MultiprocessingOptions()
    if alone:  # otherwise Orbax waits for the other processes
        options = ocp.options.MultiprocessingOptions(
            active_processes={jax.process_index()}, barrier_sync_key_prefix="alone"
        )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
        config=ocp.JsonCheckpointHandler(multiprocessing_options=options),
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)
