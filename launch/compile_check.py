"""Compiles a run for a TPU slice without the TPU; predicts whether it fits, and its speed.

    python launch/compile_check.py --config=configs/pretrain_celebahq.py --topology=v5e:16x16
    python launch/compile_check.py --config=configs/finetune_celebahq.py --topology=v5e-16 \
        --mode=sample --config.sample.batch_size=64

It compiles the program that main.py runs (one for each phase), from shapes alone, with a CPU and
the `libtpu` wheel (pip install '.[tpu-compile]'), but no TPU and no data set. Exit status: 0 if
every program fits the chips' memory, 1 if not, 2 for bad input, 3 for any other error, with its
stack trace. docs/tpu.md explains the figures and their limits.
"""

import importlib.util
import os
import pathlib
import sys
import time

# Before JAX is imported: this machine computes nothing, and libtpu must not look for a TPU, must
# let other processes compile too, and must write no logs.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="true",
    TPU_LOG_DIR="disabled",
)
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax  # noqa: E402

from launch import collectives, tpu_slices  # noqa: E402
from maskdm_jax import config_file, draw, flops, phases, sharding, step  # noqa: E402
from maskdm_jax.config import FIELDS, validate_devices, whole_images  # noqa: E402
from maskdm_jax.diffusion import samplers  # noqa: E402
from maskdm_jax.errors import ConfigError  # noqa: E402
from maskdm_jax.fields import COUNT, TEXT, one_of  # noqa: E402
from maskdm_jax.model import attention  # noqa: E402
from maskdm_jax.model.kernels import splash_attention  # noqa: E402
from maskdm_jax.model.sizes import batch_multiple, dimensions  # noqa: E402
from maskdm_jax.run import command_line, memory  # noqa: E402

_EXAMPLE = (
    "python launch/compile_check.py --config=configs/pretrain_celebahq.py --topology=v5e:16x16"
)

# Images in the sets that the shipped configs keep on the device.
_NUM_EXAMPLES_OF = {"digits": 1_797, "swiss_roll": 50_000, "cifar10": 50_000, "celeba64": 202_599}


def main():
    args = _parser().parse()
    config, mode = config_file.load(args.config, args.changes), args.mode
    tpu = tpu_slices.parse(args.topology)
    # Images are drawn from the last phase's weights.
    every_phase = phases.phases(config)
    if mode == "sample":
        every_phase = [every_phase[-1]._replace(config=whole_images(every_phase[-1].config))]
    if args.row:
        for phase in every_phase:
            _round_batch_up(phase.config, mode, tpu.num_chips)
            validate_devices(phase.config, tpu.num_chips, mode)
    else:
        phases.validate_devices(config, tpu.num_chips, mode)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("the libtpu wheel is missing; type pip install '.[tpu-compile]'")
    return max(_check(args, phase, tpu) for phase in every_phase)


def _check(args, phase, tpu):
    """Compiles one phase, and prints its figures; 0 if it fits, 1 if not."""
    config, mode = phase.config, args.mode
    mesh = sharding.make_mesh(config, tpu.devices())
    if not args.row:
        what = f"{mode}{_named(phase, mode)} on {tpu.name}, {tpu.num_chips} chips"
        print(f"{what}: compiling ...", flush=True)
    start = time.perf_counter()
    try:
        compiled = _lower(phase, mode, mesh, args.num_examples).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in reason or "hbm" not in str(error).lower():
            raise
        if args.row:
            print(_row_of(args, phase, tpu, [""] * 7 + ["no"]))
        else:
            print(_too_large(config, mode, tpu, reason))
        return 1
    figures = _figures(config, mode, mesh, tpu, compiled)
    figures["compile_s"] = time.perf_counter() - start
    if args.row:
        print(_row(args, phase, tpu, figures))
    else:
        print(_report(config, mode, tpu, figures))
    return 0 if figures["fits"] else 1


def _parser():
    parser = command_line.Parser(__doc__, _EXAMPLE, FIELDS)
    parser.flag("--config", TEXT, "a file in configs/, or FILE:ARGUMENT", required=True)
    parser.flag("--topology", TEXT, "the slice: v5e:16x16, v5e-256, v5p-128, ...", required=True)
    parser.flag("--mode", one_of("train", "sample"), "what to compile", "train")
    parser.flag(
        "--num_examples", COUNT, "images in the data set, if data.cache=device keeps it on chips"
    )
    parser.add_argument(
        "--row",
        action="store_true",
        help="print a row of docs/tpu.md's table; a batch that does not divide is rounded up",
    )
    return parser


def _batch(config, mode):
    return config.sample.batch_size if mode == "sample" else config.train.batch_size


def _round_batch_up(config, mode, num_chips):
    settings = config.sample if mode == "sample" else config.train
    multiple = batch_multiple(config, num_chips) if mode == "train" else num_chips
    settings.batch_size = -(-settings.batch_size // multiple) * multiple


def _lower(phase, mode, mesh, known_examples):
    """The program that main.py would compile, from shapes alone."""
    config = phase.config
    if mode == "sample":
        # In one program: main.py does the same steps in stretches, one after another.
        return draw.lower_draw(config, mesh)
    num_examples = 0
    if config.data.cache == "device":
        num_examples = known_examples or _NUM_EXAMPLES_OF.get(config.data.name)
        if not num_examples:
            raise ConfigError(
                f"data.cache is 'device', and the number of images in {config.data.name!r} is not "
                "known here; type --num_examples=N, or --config.data.cache=host"
            )
    return step.lower_train_step(phase, mesh, num_examples)


def _figures(config, mode, mesh, tpu, compiled):
    """The compiler's figures per chip, and what follows from them. Times are for one train step, or
    for drawing one batch."""
    analysis, cost = compiled.memory_analysis(), compiled.cost_analysis()
    # The compiler counts a loop's body once, and of a switch (`model.coarse`) the dearest branch.
    # The sampler is one loop. So is an accumulating step,
    # except for the optimizer, which reads and writes the state.
    loops, outside = samplers.evaluations(config.sample.sampler, config.sample.steps), 0
    if mode == "train":
        loops = config.optim.accumulate_steps
        outside = 2 * analysis.alias_size_in_bytes
    sizes = collectives.sizes(compiled.as_text(), loops)
    executed = loops * cost["flops"] + _splash_flops(config, mode, mesh)
    hbm_bytes = outside + loops * max(cost["bytes accessed"] - outside, 0)
    peak = flops.peak_tflops(mesh.devices.flat[0]) * 1e12
    chip = tpu.chip
    seconds = {
        "matmuls": executed / peak,
        "memory": hbm_bytes / (chip.hbm_gbps * 1e9),
        "links": collectives.traffic(sizes) / (chip.ici_gbps * 1e9),
    }
    model_flops = _model_flops(config, mode) / tpu.num_chips
    needed = analysis.peak_memory_in_bytes
    return {
        "argument": analysis.argument_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
        "peak": needed,
        "fits": needed <= chip.hbm_gib * 2**30,
        "model_flops": model_flops,
        "executed_flops": executed,
        "hbm_bytes": hbm_bytes,
        "sizes": sizes,
        "seconds": seconds,
        "step_s": max(seconds.values()),
        "bound_by": max(seconds, key=seconds.get),
        "mfu": model_flops / peak / max(seconds.values()),
        "peak_tflops": peak / 1e12,
    }


def _model_flops(config, mode):
    """Model FLOPs of one train step, or of drawing one batch."""
    if mode == "train":
        return config.train.batch_size * flops.training_flops(config)
    return config.sample.batch_size * draw.model_flops(config)


def _lengths(config, mode):
    """(tokens, evaluations) of the network for each size of its tokens, for one image."""
    lengths = {1: flops.tokens_per_image(config), **flops.coarse_tokens(config)}
    if mode == "sample":
        calls = draw.evaluations_by_size(config)
    else:
        calls = dict.fromkeys(lengths, 1 / config.diffusion.coarse_every) | {1: 1}
    return [(length, calls[size]) for size, length in lengths.items()]


def _splash_flops(config, mode, mesh):
    """FLOPs of the splash kernel on one chip; the compiler does not count those of kernels."""
    width, depth, heads = dimensions(config.model)
    # Two matmuls forward; backward three for dq, and four for dk and dv.
    matmuls = 2 + 7 + (2 if config.model.remat == "blocks" else 0) if mode == "train" else 2
    per_image, dtype = 0, config.model.dtype
    for length, calls in _lengths(config, mode):
        plan = attention.plan(config.model.attention, length, width // heads, dtype, mesh)
        if plan.kernel == "splash":
            per_image += calls * 2 * splash_attention.padded_length(length) ** 2 * width
    return _batch(config, mode) / mesh.size * (2 * (depth // 2) + 1) * matmuls * per_image


def _report(config, mode, tpu, f):
    what = "a step" if mode == "train" else f"for {config.sample.steps} sampling steps"
    batch = _batch(config, mode)
    times = ", ".join(f"{name} {s * 1e3:.3g}" for name, s in f["seconds"].items())
    sizes = ", ".join(f"{kind} {_mb(size)}" for kind, size in sorted(f["sizes"].items()))
    if f["fits"]:
        verdict = f"it fits, with {_gib(tpu.chip.hbm_gib * 2**30 - f['peak'])} free"
    else:
        verdict = f"it does not fit; type {memory.advice(config, mode, tpu.num_chips)}"
    lines = (
        f"compiled in {f['compile_s']:.0f} s; batch {batch}, {batch / tpu.num_chips:g} a chip; "
        "the figures below are for one chip",
        f"arguments    {_gib(f['argument'])}",
        f"temporaries  {_gib(f['temporary'])}",
        f"peak memory  {_gib(f['peak'])} of {tpu.chip.hbm_gib} GiB",
        f"FLOPs        {f['model_flops'] / 1e12:.4g} TFLOP {what} by the model, "
        f"{f['executed_flops'] / 1e12:.4g} as compiled",
        f"HBM traffic  {f['hbm_bytes'] / 1e9:.4g} GB",
        f"collectives  {sizes or 'none'}",
        f"prediction   {f['step_s'] * 1e3:.3g} ms {what}, bound by {f['bound_by']} (ms: {times}); "
        f"{batch / f['step_s']:,.0f} images/s on the slice",
        f"MFU          at most {f['mfu']:.1%} of {f['peak_tflops']:g} TFLOP/s",
        verdict,
    )
    return "\n".join(lines)


def _row(args, phase, tpu, f):
    cells = (
        f"{f['argument'] / 2**30:.2f}",
        f"{f['temporary'] / 2**30:.2f}",
        f"{f['peak'] / 2**30:.2f} of {tpu.chip.hbm_gib}",
        f"{f['model_flops'] / 1e12:.3g}",
        f"{sum(f['sizes'].values()) / 1e6:,.0f}",
        f"{f['step_s'] * 1e3:.3g}, {f['bound_by']}",
        f"{f['mfu']:.1%}",
        "yes" if f["fits"] else "no",
    )
    return _row_of(args, phase, tpu, cells)


def _too_large(config, mode, tpu, reason):
    reason = reason.removeprefix("RESOURCE_EXHAUSTED: ")
    return f"{reason}\nit does not fit; type {memory.advice(config, mode, tpu.num_chips)}"


def _row_of(args, phase, tpu, cells):
    file, colon, argument = args.config.partition(":")
    name = pathlib.Path(file).stem + colon + argument + _named(phase, args.mode)
    batch = str(_batch(phase.config, args.mode))
    return f"| {' | '.join((name, tpu.name, batch, *cells))} |"


def _named(phase, mode):
    """ ", phase 2" for a program of several."""
    several = phase.index or phase.last_step < phase.config.train.num_steps
    return f", phase {phase.index + 1}" if several and mode == "train" else ""


def _gib(size):
    return f"{size / 2**30:.2f} GiB"


def _mb(size):
    return f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    # Not 1, Python's own: here it means that the program does not fit.
    command_line.run(main, unexpected=3)
