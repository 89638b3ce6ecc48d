"""Linear layers and LayerNorms as bare parameters, for products that the network rearranges."""

import jax
import jax.numpy as jnp
from flax import linen as nn

kernel_init = nn.initializers.truncated_normal(0.02)


def folded(norm, linear, dtype) -> tuple[jax.Array, jax.Array]:
    """(kernel [D, F], bias [F]) such that LN(x) W + b = normalize(x) @ kernel + bias.

    Args:
      norm: (scale, shift) of a LayerNorm, float32 [D] each.
      linear: (W [D, F],) or (W, b [F]), float32.
      dtype: of the returned kernel; the returned bias is float32.
    """
    (scale, shift), (kernel, *bias) = norm, linear
    return (scale[:, None] * kernel).astype(dtype), sum(bias) + dot(shift, kernel)


def dot(x, kernel):
    """x @ kernel in exact float32, which costs nothing for a vector; by default GPUs and TPUs would
    round the factors."""
    return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)


class Linear(nn.Module):
    """The float32 parameters of a linear layer: (kernel [in, out], bias [out]), or (kernel,)."""

    inputs: int
    outputs: int
    use_bias: bool = True

    @nn.compact
    def __call__(self):
        kernel = self.param("kernel", kernel_init, (self.inputs, self.outputs))
        if not self.use_bias:
            return (kernel,)
        return kernel, self.param("bias", nn.initializers.zeros, (self.outputs,))


class Affine(nn.Module):
    """The float32 parameters of a LayerNorm: (scale [D], bias [D])."""

    width: int

    @nn.compact
    def __call__(self):
        scale = self.param("scale", nn.initializers.ones, (self.width,))
        return scale, self.param("bias", nn.initializers.zeros, (self.width,))


def patch_embed(patch_dim: int, width: int, dtype, **kwargs) -> nn.Dense:
    """The layer from the P values of a patch to D channels.

    A convolution of stride p is a matmul over patches. Its weights and bias have PyTorch's default
    init, uniform within 1 / sqrt(fan_in).
    """
    init = _uniform(patch_dim**-0.5)
    return nn.Dense(width, kernel_init=init, bias_init=init, dtype=dtype, **kwargs)


def _uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
