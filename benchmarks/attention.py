"""Times every implementation of attention at the recipes' sequence lengths.

    python -m benchmarks.attention [--lengths 29 417 4097] [--seconds 0.5]

Forward and backward in bfloat16, heads of 64 channels, each length at its recipe's batch; q, k and
v have the layout that the implementation reads in the network. The rate counts FLOPs as training
does: 3 x the forward pass's two matmuls. Prints one JSON line each; `ratio` is the rate over plain
XLA attention's on this machine.
"""

import json
import sys

import jax
import jax.numpy as jnp

from benchmarks import cases, measure
from maskdm_jax.fields import one_of
from maskdm_jax.model import attention
from maskdm_jax.run import command_line, distributed

# length: (batch, heads)
_SHAPES = {29: (1024, 8), 257: (256, 8), 417: (256, 12), 1025: (64, 12), 4097: (32, 12)}
_HEAD_DIM = 64


def bench(length: int, implementation: str, seconds: float) -> dict:
    """Milliseconds of one forward and backward pass, and the kernel that ran."""
    batch, heads = _SHAPES[length]
    plan = attention.plan(implementation, length, _HEAD_DIM, jnp.bfloat16)
    shape = (batch, plan.length, heads, _HEAD_DIM)
    qkv = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3)]
    arrays = [jnp.stack(qkv, axis=2)] if plan.packed else qkv
    dout = jax.random.normal(jax.random.key(3), shape, jnp.bfloat16)

    @jax.jit
    def both(*arrays):
        attend = attention.attend_packed if plan.packed else attention.attend
        out, pullback = jax.vjp(lambda *x: attend(*x, plan), *arrays)
        return out, pullback(dout)

    call_s = measure.seconds_per_call(lambda i: both(*arrays), seconds)
    flops = 3 * 4 * batch * heads * length**2 * _HEAD_DIM
    return {
        "length": length,
        "implementation": implementation,
        "runs": plan.kernel,
        "padded_by": plan.length - length,
        "batch": batch,
        "ms": call_s * 1e3,
        "model_tflops": flops / call_s / 1e12,
    }


def main():
    parser = command_line.Parser(__doc__, "python -m benchmarks.attention")
    lengths = [str(length) for length in _SHAPES]
    parser.flag("--lengths", one_of(*lengths), "tokens of a sequence", lengths, many=True)
    parser.flag("--seconds", cases.SECONDS, "timed work of each", 0.5)
    args = parser.parse()
    distributed.num_devices()
    for length in map(int, args.lengths):
        plain = None
        for implementation in ("xla", "cudnn", "pallas", "hopper"):
            try:
                result = bench(length, implementation, args.seconds)
            except jax.errors.JaxRuntimeError as error:
                result = {"length": length, "implementation": implementation}
                result["error"] = str(error).splitlines()[0][:120]
            if implementation == "xla":
                plain = result.get("ms")
            if plain and "ms" in result:
                result["ratio"] = plain / result["ms"]
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
