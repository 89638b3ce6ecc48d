"""The command line: trains a config, or draws samples from the trained model.

python main.py --config=configs/pretrain_celebahq.py --workdir=W1
python main.py --config=configs/finetune_celebahq.py --workdir=W2 --config.init.path=W1
python main.py --config=configs/finetune_celebahq.py --workdir=W2 --mode=sample

On Slurm and TPU pods the processes of a run find each other; see maskdm_jax/run/distributed.py.
"""

import contextlib
import os
import pathlib

from absl import flags
from ml_collections import config_flags

from maskdm_jax.config import validate, validate_devices
from maskdm_jax.errors import RunError
from maskdm_jax.run import command_line, files

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all that the run writes.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample"], "Train, or draw samples.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes over all hosts.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")


def main(argv):
    config, mode = _CONFIG.value, _MODE.value
    validate(config)
    workdir = files.local_path(_WORKDIR.value, "--workdir")

    # Imported only now: a wrong value is reported without the second that these imports take.
    from maskdm_jax.run import distributed, memory

    memory.set_gpu_memory_fraction()
    distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    with distributed.errors_end_all_processes():
        _use_compilation_cache(workdir)
        _run(config, mode, workdir)


def _run(config, mode, workdir):
    import jax

    from maskdm_jax import checkpoint, sample, train
    from maskdm_jax.run import distributed, faults, lock, memory, preemption

    faults.mute_late_tracebacks()
    validate_devices(config, jax.device_count(), mode)
    try:
        with memory.explained(config, mode):
            if mode == "sample":
                sample.write_samples(config, workdir)
                return
            with contextlib.ExitStack() as stack:
                if distributed.is_main() and not config.train.dry_run:
                    stack.enter_context(lock.one_run(checkpoint.directory(workdir).parent))
                watched = preemption.watched(lambda: checkpoint.steps(workdir))
                train.train(config, workdir, stack.enter_context(watched))
    except OSError as error:
        if not faults.disk_is_full(error):
            raise
        raise RunError(f"{error}; make room, then the same command resumes") from error


def _use_compilation_cache(workdir):
    """Keeps compiled programs for the next start; JAX_COMPILATION_CACHE_DIR sets another folder."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache = pathlib.Path(home) / "maskdm_jax" / "xla"
        if jax.process_count() > 1 or home.startswith("~"):  # a user without a home folder
            # In the workdir, which every process sees. Only process 0 writes to the cache, and GPU
            # compilers on several hosts tune kernels together: a host that found the program in its
            # own cache would leave the others waiting.
            cache = workdir / "xla_cache"
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    command_line.run(
        main,
        required=("config", "workdir"),
        example="python main.py --config=configs/pretrain_digits.py --workdir=/tmp/digits",
        resumes=True,
    )
