"""bias + exact GELU as Pallas kernels (Triton, NVIDIA GPUs), forward and backward.

The hidden layer is the widest array of a block, so its activation should run at memory speed.
XLA's erf and division take more instructions than fit into that time, and its sum over tokens, the
bias's gradient, slows the pass that computes it. Here erf costs one exponential and one reciprocal,
and each tile's column sums are written with its gradient.
"""

import functools
import math
import struct

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from maskdm_jax.model.kernels import rows

# The tile of one program: rows are tokens, columns are channels.
_ROWS, _COLUMNS, _WARPS = 64, 128, 8

# erfc(z) = exp(-z^2) (a_1 t + ... + a_5 t^5), t = 1 / (1 + 0.3275911 z), with z = |y| / sqrt(2).
# The series holds a_5 ... a_1, each halved.
_EXPONENT = -0.5 / math.log(2)  # exp(-y^2 / 2) = 2^(_EXPONENT y^2)
_SLOPE = 0.3275911 * 0.5**0.5
_SERIES = (0.5307027145, -0.7265760135, 0.7107068705, -0.142248368, 0.127414796)


def supports(width: int, dtype) -> bool:
    """Whether the kernels support `width` channels of `dtype`."""
    return width % _COLUMNS == 0 and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def bias_gelu(x_MD: jax.Array, bias_D: jax.Array, interpret: bool = False) -> jax.Array:
    """y Phi(y) with y = x + bias, computed in float32.

    Args:
      x_MD: [M, D]; see `supports`.
      bias_D: float32 [D].
      interpret: run the kernel on the CPU, slowly, for tests.

    Returns:
      [M, D] of x's dtype.
    """
    return _forward(x_MD, bias_D, interpret)[0]


def _forward(x_MD, bias_D, interpret):
    (out_MD,) = _call(_forward_kernel, interpret, bias_D, x_MD)
    return out_MD, (x_MD, bias_D)


def _backward(interpret, kept, dout_MD):
    x_MD, bias_D = kept
    dx_MD, sums = _call(_backward_kernel, interpret, bias_D, x_MD, dout_MD)
    return dx_MD, jnp.sum(sums, (0, 1))


bias_gelu.defvjp(_forward, _backward)


def _call(kernel, interpret, bias_D, *arrays):
    """Runs `kernel` on tiles of [M, D] arrays; a second array adds an output of column sums."""
    x_MD = arrays[0]
    num_rows, columns = x_MD.shape
    grid = (pl.cdiv(num_rows, _ROWS), columns // _COLUMNS)
    tile = pl.BlockSpec((_ROWS, _COLUMNS), lambda i, j: (i, j))
    out_shape = [jax.ShapeDtypeStruct(x_MD.shape, x_MD.dtype)]
    out_specs = [tile]
    if len(arrays) == 2:
        out_shape.append(jax.ShapeDtypeStruct((grid[0], 1, columns), jnp.float32))
        out_specs.append(pl.BlockSpec((None, 1, _COLUMNS), lambda i, j: (i, 0, j)))
    return pl.pallas_call(
        functools.partial(kernel, num_rows=num_rows, interpret=interpret),
        out_shape=out_shape,
        grid=grid,
        in_specs=[pl.BlockSpec((1, _COLUMNS), lambda i, j: (0, j)), *[tile] * len(arrays)],
        out_specs=out_specs,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="gelu" + kernel.__name__,
    )(bias_D[None].astype(jnp.float32), *arrays)


def _forward_kernel(bias_ref, x_ref, out_ref, *, num_rows, interpret):
    y = _load(x_ref, num_rows) + bias_ref[...]
    cdf, _ = normal_cdf_and_exp(y) if interpret else _fast_normal_cdf_and_exp(y)
    _store(out_ref, y * cdf, num_rows)


def _backward_kernel(bias_ref, x_ref, dout_ref, dx_ref, sums_ref, *, num_rows, interpret):
    y = _load(x_ref, num_rows) + bias_ref[...]
    cdf, exp = normal_cdf_and_exp(y) if interpret else _fast_normal_cdf_and_exp(y)
    dx = (cdf + y * exp * (2 * math.pi) ** -0.5) * _load(dout_ref, num_rows)
    _store(dx_ref, dx, num_rows)
    sums_ref[...] = jnp.sum(dx, axis=0, keepdims=True)  # rows beyond M are zero in dout


def normal_cdf_and_exp(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Phi(y) and exp(-y^2 / 2), float32, to 3e-7 (Abramowitz & Stegun 7.1.26)."""
    exp = jnp.exp2(jnp.square(y) * _EXPONENT)
    t = 1 / (1 + _SLOPE * jnp.abs(y))
    series = _SERIES[0]
    for coefficient in _SERIES[1:]:
        series = series * t + coefficient
    tail = series * t * exp
    return jnp.where(y < 0, tail, 1 - tail), exp


def _fast_normal_cdf_and_exp(y):
    """`normal_cdf_and_exp` in PTX: compiled from JAX it has no fused multiply-adds, and takes a
    third longer than its memory traffic."""
    exp = _inline(
        f"""{{
        mul.f32 $0, $1, $1;
        mul.f32 $0, $0, {_hex(_EXPONENT)};
        ex2.approx.ftz.f32 $0, $0;
        }}""",
        y,
    )
    steps = "".join(f"fma.rn.f32 s, s, t, {_hex(c)};\n" for c in _SERIES[1:])
    cdf = _inline(
        f"""{{
        .reg .f32 t, s;
        .reg .pred negative;
        abs.f32 t, $1;
        fma.rn.f32 t, t, {_hex(_SLOPE)}, {_hex(1.0)};
        rcp.approx.ftz.f32 t, t;
        mov.f32 s, {_hex(_SERIES[0])};
        {steps}
        mul.f32 s, s, t;
        mul.f32 s, s, $2;
        sub.f32 t, {_hex(1.0)}, s;
        setp.lt.f32 negative, $1, {_hex(0.0)};
        selp.f32 $0, s, t, negative;
        }}""",
        y,
        exp,
    )
    return cdf, exp


def _inline(asm, *args):
    (out,) = triton.elementwise_inline_asm(
        asm,
        args=args,
        constraints="=&f" + ",f" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return out


def _hex(value):
    """A PTX float32 literal."""
    return "0f" + struct.pack(">f", value).hex()


def _load(ref, num_rows):
    return rows.load(ref, _mask(ref, num_rows)).astype(jnp.float32)


def _store(ref, value, num_rows):
    rows.store(ref, value, _mask(ref, num_rows))


def _mask(ref, num_rows):
    if num_rows % _ROWS == 0:
        return None
    return rows.below(ref.shape, num_rows, pl.program_id(0) * _ROWS)
