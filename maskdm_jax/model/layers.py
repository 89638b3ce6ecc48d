"""The memory-bound parts of a block, with hand-written gradients that move less data than XLA's.

With automatic gradients, XLA keeps two intermediates of GELU at four times the width, and reads
every token again to sum the gradients of LayerNorm's scale and bias. benchmarks/RESULTS.md has the
savings.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maskdm_jax import sharding

_EPSILON = 1e-5


@jax.custom_vjp
def normalize(x: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-5) over the last axis: LayerNorm before scale and bias.

    Scale and bias belong to the matmul that follows (see `uvit.Block`). Their gradients then follow
    from the weights' gradients, without a pass over the tokens.

    Args:
      x: [..., D], any float dtype. Statistics are float32, by the two-pass formula: the one-pass
        formula loses digits on large means.

    Returns:
      [..., D] of x's dtype.
    """
    return _normalize_forward(x)[0]


def _normed_and_rstd(x):
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, -1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + _EPSILON)
    return centred * rstd, rstd


def _normalize_forward(x):
    return _normed_and_rstd(x)[0].astype(x.dtype), x


def _normalize_backward(x, dnormed):
    # The barrier keeps XLA from sharing the statistics with the forward pass. Recomputing them is
    # free, since x is read anyway; sharing them would split the forward pass's one kernel.
    normed, rstd = _normed_and_rstd(jax.lax.optimization_barrier(x))
    dnormed = dnormed.astype(jnp.float32)
    projected = normed * jnp.mean(dnormed * normed, -1, keepdims=True)
    dx = rstd * (dnormed - jnp.mean(dnormed, -1, keepdims=True) - projected)
    return (dx.astype(x.dtype),)


normalize.defvjp(_normalize_forward, _normalize_backward)


def add_normalize(
    x_MD: jax.Array, y_MD: jax.Array, bias_D: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """(x + y + bias, its `normalize`).

    Args:
      x_MD, y_MD: [M, D], both of the same float dtype.
      bias_D: float32 [D].
      mesh: the devices that the rows are split over; None: this process's first device.

    Returns:
      Both [M, D] of x's dtype.
    """
    if _kernel("norm", x_MD, mesh):
        return _add_normalize(x_MD, y_MD, bias_D, mesh)
    return _sum_and_normed(x_MD, y_MD, bias_D)


def _sum_and_normed(x_MD, y_MD, bias_D):
    sum_MD = x_MD + (y_MD + bias_D.astype(x_MD.dtype))
    return sum_MD, normalize(sum_MD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _add_normalize(x_MD, y_MD, bias_D, mesh):
    return _sum_and_normed(x_MD, y_MD, bias_D)


def _add_normalize_forward(x_MD, y_MD, bias_D, mesh):
    sum_MD, normed_MD = _sum_and_normed(x_MD, y_MD, bias_D)
    return (sum_MD, normed_MD), sum_MD


def _add_normalize_backward(mesh, sum_MD, gradients):
    from maskdm_jax.model.kernels import norm  # see `_kernel`

    kernel = functools.partial(norm.add_normalize_gradient, epsilon=_EPSILON)
    run = sharding.on_each_device(kernel, mesh, sum_MD.shape[0])
    dx_MD, sums = run(sum_MD, *gradients)
    return dx_MD, dx_MD, jnp.sum(sums, 0)


_add_normalize.defvjp(_add_normalize_forward, _add_normalize_backward)


@jax.custom_vjp
def add_to_first(x_MN: jax.Array, bias_D: jax.Array) -> jax.Array:
    """x with the bias added to its first D channels; the bias's gradient sums over those only."""
    return x_MN + jnp.pad(bias_D, (0, x_MN.shape[1] - bias_D.shape[0]))


def _add_to_first_backward(bias, dx):
    return dx, jnp.sum(dx[:, : bias.shape[0]], 0, dtype=jnp.float32).astype(bias.dtype)


add_to_first.defvjp(lambda x, bias: (add_to_first(x, bias), bias), _add_to_first_backward)


def bias_gelu(x_MD: jax.Array, bias_D: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Exact GELU (Hendrycks & Gimpel 2016), y Phi(y) with y = x + bias, computed in float32.

    Args:
      x_MD: [M, D], any float dtype.
      bias_D: float32 [D].
      mesh: the devices that the rows are split over; None: this process's first device.

    Returns:
      [M, D] of x's dtype.
    """
    if gelu := _kernel("gelu", x_MD, mesh):
        kernel = sharding.on_each_device(gelu.bias_gelu, mesh, x_MD.shape[0], num_whole=1)
        return kernel(x_MD, bias_D)
    return _bias_gelu(x_MD, bias_D)


@jax.custom_vjp
def _bias_gelu(x, bias):
    return _bias_gelu_forward(x, bias)[0]


def _bias_gelu_forward(x, bias):
    y = x.astype(jnp.float32) + bias
    return (y * _cdf(y)).astype(x.dtype), (x, bias)


def _bias_gelu_backward(kept, dout):
    # The barrier keeps XLA from storing the forward pass's erf to use it here.
    x, bias = jax.lax.optimization_barrier(kept)
    y = x.astype(jnp.float32) + bias
    pdf = jnp.exp(-0.5 * jnp.square(y)) * (2 * jnp.pi) ** -0.5
    # Rounding before the product lets XLA sum and store dx in one pass.
    dx = (_cdf(y) + y * pdf).astype(x.dtype) * dout
    return dx, jnp.sum(dx, tuple(range(x.ndim - 1)), dtype=jnp.float32)


def _cdf(y):
    return 0.5 * (1 + jax.lax.erf(y * 0.5**0.5))


_bias_gelu.defvjp(_bias_gelu_forward, _bias_gelu_backward)


def _kernel(name, x_MD, mesh):
    """The module `name` of model.kernels if it supports the devices and the array, else None.

    It is imported only then, because importing Pallas is slow.
    """
    if sharding.unfit_for_gpu_kernels(sharding.first_device(mesh)):
        return None
    module = importlib.import_module(f"maskdm_jax.model.kernels.{name}")
    return module if module.supports(x_MD.shape[1], x_MD.dtype) else None
