"""The command line: trains a config, draws samples from the trained model, or scores it.

modes:
  train     trains to train.num_steps, from the workdir's newest checkpoint if there is one
  sample    draws sample.num images from the newest checkpoint, into WORKDIR/samples
  evaluate  scores checkpoints of the workdir, into WORKDIR/scores.jsonl

python main.py --config=configs/pretrain_celebahq.py --workdir=W1
python main.py --config=configs/finetune_celebahq.py --workdir=W2 --config.init.path=W1
python main.py --config=configs/finetune_celebahq.py --workdir=W2 --mode=sample
python main.py --config=configs/finetune_celebahq.py --workdir=W2 --mode=evaluate

On Slurm and TPU pods the processes of a run find each other; see maskdm_jax/run/distributed.py.
"""

import contextlib
import os
import pathlib

from maskdm_jax import config_file, phases
from maskdm_jax.config import FIELDS
from maskdm_jax.errors import RunError
from maskdm_jax.field_table import COMMON
from maskdm_jax.fields import TEXT, one_of, whole
from maskdm_jax.run import command_line, files

_EXAMPLE = "python main.py --config=configs/pretrain_digits.py --workdir=/tmp/digits"
MODES = {
    "train": "Trains a config. The same command resumes.",
    "sample": "Draws images from the trained model.",
    "evaluate": "Draws images from the trained model, and scores them.",
}


def main(mode: str | None = None, argv: list[str] | None = None) -> None:
    """The command line of main.py; or of `maskdm MODE`, which has no flag --mode.

    Args:
      mode: "train", "sample" or "evaluate"; None for main.py.
      argv: the arguments; None for this process's.
    """
    typed = f"maskdm {mode} --config=pretrain_digits --workdir=/tmp/digits"
    about, example = (__doc__, _EXAMPLE) if mode is None else (MODES[mode], typed)
    parser = command_line.Parser(about, example, FIELDS, COMMON)
    parser.flag("--config", TEXT, "a file in configs/, or FILE:ARGUMENT", required=True)
    parser.flag(
        "--workdir",
        TEXT,
        "folder for all that the run writes, or gs://BUCKET/FOLDER",
        required=True,
    )
    if mode is None:
        parser.flag("--mode", one_of(*MODES), "train, draw samples, or score them", "train")
    if mode in (None, "train"):
        parser.add_argument(
            "--verbose", action="store_true", help="train: list all parameters of the network"
        )
    parser.flag("--coordinator", TEXT, "host:port of process 0; only if started by hand")
    parser.flag("--num_processes", whole(1), "processes over all hosts; only if started by hand")
    parser.flag("--process_id", whole(0), "index of this process, from 0; only if started by hand")
    args = parser.parse(argv)
    mode = mode or args.mode
    config = config_file.load(args.config, args.changes)
    workdir = files.place(args.workdir, "--workdir")

    # Imported only now: a wrong value is reported without the second that these imports take.
    from maskdm_jax.run import distributed, memory

    memory.set_gpu_memory_fraction()
    distributed.mute_libtpu()
    with distributed.errors_end_all_processes(args.process_id):
        distributed.start(args.coordinator, args.num_processes, args.process_id)
        phases.validate_devices(config, distributed.num_devices(), mode)
        _use_compilation_cache(workdir)
        _run(config, mode, workdir, getattr(args, "verbose", False))


def _run(config, mode, workdir, verbose):
    import jax

    from maskdm_jax import checkpoint, evaluate, sample, sharding, train
    from maskdm_jax.run import distributed, faults, lock, memory, preemption, progress

    faults.mute_late_tracebacks()
    if advice := sharding.bfloat16_advice(jax.devices()[0], config.model.dtype):
        progress.remark(f"{advice}; --config.model.dtype=float32 saves that")
    try:
        with memory.explained(config, mode):
            if mode == "sample":
                sample.write_samples(config, workdir)
                return
            if mode == "evaluate":
                evaluate.evaluate(config, workdir)
                return
            with contextlib.ExitStack() as stack:
                if distributed.is_main() and not config.train.dry_run:
                    stack.enter_context(lock.one_run(checkpoint.directory(workdir).parent))
                watched = preemption.watched(lambda: checkpoint.steps(workdir))
                train.train(config, workdir, stack.enter_context(watched), verbose)
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
