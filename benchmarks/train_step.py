"""Times the bare training step: a whole update, without the loop around it.

    python -m benchmarks.train_step --bench masked256 --data_dir DIR [--profile]

Prints one JSON line. The step is the one that main.py runs: images in device memory as uint8, mask,
noise, loss, gradient, clipping, AdamW, EMA. --profile adds the time spent in each kind of kernel.
--config.FIELD=VALUE changes the case.
"""

import collections
import json
import pathlib
import re
import sys
import tempfile
import time

import jax
import numpy as np

from benchmarks import cases, measure
from maskdm_jax import flops, phases, sharding
from maskdm_jax.data import loader
from maskdm_jax.run import command_line, memory
from maskdm_jax.state import init_state
from maskdm_jax.step import lower_train_step, planned

# Kinds of kernels, by their names in a trace; the first match counts.
_KINDS = (
    ("GELU", r"^gelu_"),
    ("attention", r"sdpa|fmha|flash|cudnn|attention"),
    ("matmul", r"gemm|nvjet|cutlass|matmul|xmma|splitK"),
    ("copies", r"^Memcpy|memset|copy|transpose|concatenate|pad"),
    ("reductions", r"reduce"),
    ("scatter, sort, random", r"scatter|sort|rng|gather"),
    ("other fusions", r""),
)


def compile_step(config):
    """The compiled step. Nothing is put on the device, so several can be compiled in parallel."""
    mesh = sharding.make_mesh(config)
    return lower_train_step(
        phases.phases(config)[0], mesh, len(cases.open_source(config))
    ).compile()


def start(config, compiled):
    """Returns call(i), which runs update i of a compiled step and returns its metrics."""
    mesh = sharding.make_mesh(config)
    arrays = cases.device_arrays(config, mesh)
    order = loader.Order(config.seed, len(arrays["image"]))
    size = config.train.batch_size
    by_batch = sharding.batch_sharding(mesh)
    ready = [
        {"ids": jax.device_put(order.ids(step * size, size).astype(np.int32), by_batch)}
        for step in range(8)
    ]
    state, plan = init_state(config, mesh), planned(phases.phases(config)[0], mesh)

    def call(i):
        nonlocal state
        state, metrics = compiled(state, arrays, ready[i % len(ready)], plan)
        return metrics

    return call


def bench(config, seconds: float) -> tuple[dict, object]:
    """Rates of the bare step on all devices, with its set-up time and memory.

    Image rates are for all devices together; TFLOP/s, MFU and GiB are per device.
    """
    begun = time.perf_counter()
    compiled = compile_step(config)
    call = start(config, compiled)
    set_up_s = time.perf_counter() - begun
    step_s = measure.seconds_per_call(call, seconds)
    images_per_s = config.train.batch_size / step_s
    peak = measure.matmul_tflops()
    num_devices = jax.device_count()
    tflops = images_per_s * flops.training_flops(config) / 1e12 / num_devices
    datasheet = flops.peak_tflops(jax.devices()[0])
    result = {
        "device": jax.devices()[0].device_kind,
        "num_devices": num_devices,
        "batch": config.train.batch_size,
        "images_per_s": images_per_s,
        "step_ms": step_s * 1e3,
        "model_tflops": tflops,
        "matmul_tflops": peak,
        "mfu": tflops / peak,
        "mfu_datasheet": datasheet and tflops / datasheet,
        "set_up_s": set_up_s,
        "memory_gib": memory.bytes_needed(compiled) / 2**30,
        "versions": measure.versions(),
    }
    return result, call


def profile(call, steps: int = 3) -> list[str]:
    """The device's time as a table: by kind of kernel, and for the 25 costliest kernels."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(steps):
                out = call(i)
            jax.block_until_ready(out)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        spent, counts = collections.Counter(), collections.Counter()
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        spent[event.name] += event.duration_ns / 1e6 / steps
                        counts[event.name] += 1
    kinds, number = collections.Counter(), collections.Counter()
    for name, ms in spent.items():
        kind = next(kind for kind, pattern in _KINDS if re.search(pattern, name))
        kinds[kind] += ms
        number[kind] += counts[name] / steps
    total = sum(kinds.values())
    lines = [f"{total:8.2f} ms of kernels a step"]
    lines += [f"{ms:8.2f} ms  {number[k]:6.0f} kernels  {k}" for k, ms in kinds.most_common()]
    lines += [
        f"{ms:8.2f} ms  {counts[n] / steps:6.0f} x  {n[:90]}" for n, ms in spent.most_common(25)
    ]
    return lines


def main():
    parser = cases.parser(__doc__, "train_step", (*cases.NAMES[:-1], *cases.POOLED))
    parser.add_argument("--profile", action="store_true", help="time of each kind of kernel")
    args = parser.parse()
    memory.set_gpu_memory_fraction()
    config = cases.chosen(args, "train")
    result, call = bench(config, args.seconds)
    print(json.dumps({"bench": args.bench, **result}), flush=True)
    if args.profile:
        print("\n".join(profile(call)), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
