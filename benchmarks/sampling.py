"""Times sampling: DDIM through the sampler that --mode=sample runs, with random weights.

    python -m benchmarks.sampling --bench sample256 --data_dir DIR

Prints one JSON line. Weights do not change the time. `evaluations_per_s` counts images times
network evaluations and compares runs of any length; MFU is that of the forward pass.
"""

import json
import sys
import time

import jax
import numpy as np

from benchmarks import cases, measure
from maskdm_jax import draw, draw_batches, flops, sharding, state
from maskdm_jax.run import command_line, memory

_STEPS = 25


def bench(config, seconds: float) -> dict:
    """Rates of the sampler, and the time to compile it and to draw once."""
    mesh = sharding.make_mesh(config)
    shardings = jax.tree.map(lambda x: x.sharding, draw.abstract_params(config, mesh))
    params = jax.jit(lambda: state.fresh_params(config, mesh), out_shardings=shardings)()
    batch = config.sample.batch_size
    index_B = jax.device_put(np.arange(batch, dtype=np.int32), sharding.batch_sharding(mesh))
    drawing = draw_batches.Drawing(config, mesh, _STEPS)

    def drawn(_):
        return [made for _, made in drawing.stretches(params, index_B)][-1]

    start = time.perf_counter()
    jax.block_until_ready(drawn(0))
    set_up_s = time.perf_counter() - start
    call_s = measure.seconds_per_call(drawn, seconds, warm_up=1)
    evaluations_per_s = batch * _STEPS / call_s
    peak = measure.matmul_tflops()
    walk = config.copy_and_resolve_references()
    walk.sample.steps = _STEPS
    tflops = batch / call_s * draw.model_flops(walk) / 1e12
    datasheet = flops.peak_tflops(jax.devices()[0])
    return {
        "device": jax.devices()[0].device_kind,
        "batch": batch,
        "images_per_s": evaluations_per_s / config.sample.steps,
        "evaluations_per_s": evaluations_per_s,
        "model_tflops": tflops,
        "matmul_tflops": peak,
        "mfu": tflops / peak,
        "mfu_datasheet": datasheet and tflops / datasheet,
        "set_up_s": set_up_s,
        "versions": measure.versions(),
    }


def main():
    args = cases.parser(__doc__, "sampling", cases.NAMES[-1:]).parse()
    memory.set_gpu_memory_fraction()
    config = cases.chosen(args, "sample")
    print(json.dumps({"bench": args.bench, **bench(config, args.seconds)}), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
