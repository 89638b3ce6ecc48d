"""The command line: train a config, or draw samples from what it trained.

python main.py --config=configs/pretrain_celebahq.py --workdir=W1
python main.py --config=configs/finetune_celebahq.py --workdir=W2 --config.init.path=W1
python main.py --config=configs/finetune_celebahq.py --workdir=W2 --mode=sample

Several processes start by themselves on Slurm and TPU pods; see maskdm_jax/distributed.py.
"""

import os
import pathlib
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from maskdm_jax import command_line, distributed
from maskdm_jax.config import ConfigError, RunError, validate, validate_devices

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps all it writes.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample"], "What to do.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, of several.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are, on all hosts.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")


def main(argv):
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}; expected --flag=value")
    config = _CONFIG.value
    validate(config)

    import jax  # after the checks, which need no device

    from maskdm_jax import checkpoint, faults, memory, sample

    memory.set_gpu_memory_fraction()
    checkpoint.mute_late_tracebacks()
    distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    _use_compilation_cache(jax)
    validate_devices(config, jax.device_count(), _MODE.value)
    try:
        with memory.explained(config, _MODE.value):
            if _MODE.value == "sample":
                sample.sample(config, _WORKDIR.value)
            else:
                _train(config, _WORKDIR.value)
    except OSError as error:
        if not faults.disk_is_full(error):
            raise
        raise RunError(f"{error}; make room, then the same command goes on") from error


def _train(config, workdir):
    from maskdm_jax import preemption, progress, train

    watch = preemption.Watch()
    try:
        train.train(config, workdir, watch.reached)
    except preemption.Preempted as stop:
        progress.say(str(stop))
        sys.exit(preemption.EXIT_CODE)
    except KeyboardInterrupt:
        watch.interrupted(workdir)


def _use_compilation_cache(jax):
    """A second start compiles nothing; JAX_COMPILATION_CACHE_DIR names another folder."""
    if not jax.config.jax_compilation_cache_dir:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "maskdm_jax" / "xla"
        if jax.process_count() > 1:
            # Where all see it. Process 0 alone writes to it, and GPU compilers on several hosts
            # tune kernels together: one that finds its program would leave the rest waiting.
            cache = pathlib.Path(_WORKDIR.value) / "xla_cache"
        jax.config.update("jax_compilation_cache_dir", str(cache.expanduser()))


def _parse(argv):
    example = "python main.py --config=configs/pretrain_digits.py --workdir=/tmp/digits"
    return command_line.parse(argv, required=("config", "workdir"), example=example)


if __name__ == "__main__":
    # Libraries remark on what a user cannot change, and log with a stack trace what they raise too.
    logging.set_verbosity(logging.FATAL)
    try:
        app.run(main, flags_parser=_parse)
    except ConfigError as problem:
        print(f"error: {problem}", file=sys.stderr)
        distributed.leave(2)
        sys.exit(2)
    except RunError as problem:
        print(f"error: {problem}", file=sys.stderr)
        distributed.leave(1)
        sys.exit(1)
    except distributed.StartError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(distributed.EXIT_CODE)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        distributed.leave(distributed.EXIT_CODE)
        sys.exit(distributed.EXIT_CODE)
