"""The one entry to attention: XLA everywhere, and fused kernels on NVIDIA GPUs: cuDNN's for long
sequences, our own for short ones.

Attention is 47 % of a U-ViT-B block at 4097 tokens and 8 % at 417, so the kernel decides the cost
of stage 2. A kernel that wants other lengths than the model has is given padded ones, with the
padding masked. Padding q, k and v costs a copy of each, so a model asks `padding` once, carries
that many tokens more through all its blocks, and tells `attend` how many are real.
"""

import functools
import warnings

import jax
import jax.numpy as jnp

from maskdm_jax import short_attention

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")

# JAX refuses odd lengths to cuDNN's backward pass.
_CUDNN_MULTIPLE = 2
# On one NVIDIA GPU, from here on cuDNN's kernel is taken, below it short_attention's.
_CUDNN_MIN_LENGTH = 128


def attend(
    q_BLKH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    implementation: str = "auto",
    *,
    num_valid: int | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the first `num_valid` tokens, with the softmax in float32.

    Args:
      q_BLKH, k_BLKH, v_BLKH: [B, L, K, H], any float dtype.
      implementation: "xla", "cudnn", "pallas" (`short_attention`), or "auto": the fused kernel for
        that length where the machine and the dtype allow it, XLA otherwise. A kernel that is
        named where it cannot run is XLA too, with one warning.
      num_valid: tokens that are real; the rest is padding, and what comes out for it is arbitrary
        but finite. None: all L.

    Returns:
      [B, L, K, H] of q's dtype.
    """
    batch, length, _, head_dim = q_BLKH.shape
    num_valid = length if num_valid is None else num_valid
    chosen = choose(implementation, length, head_dim, q_BLKH.dtype)
    if chosen == "xla":
        mask = None if num_valid == length else (jnp.arange(length) < num_valid)[None, None, None]
        return jax.nn.dot_product_attention(q_BLKH, k_BLKH, v_BLKH, mask=mask, implementation="xla")
    if chosen == "pallas":
        return short_attention.short_attention(q_BLKH, k_BLKH, v_BLKH, num_valid)
    extra = -length % _CUDNN_MULTIPLE
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x
        for x in (q_BLKH, k_BLKH, v_BLKH)
    )
    lengths = None
    if num_valid != length + extra:
        lengths = jnp.full((batch,), num_valid, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]


def padding(implementation: str, length: int, head_dim: int, dtype) -> int:
    """Tokens to add to `length` so that `attend` need not copy its arguments to pad them."""
    if choose(implementation, length, head_dim, dtype) == "cudnn":
        return -length % _CUDNN_MULTIPLE
    return 0


def choose(implementation: str, length: int, head_dim: int, dtype) -> str:
    """What `attend` runs on this machine: "xla", "cudnn" or "pallas".

    Raises:
      ValueError: for an implementation that does not exist.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r}; expected one of {IMPLEMENTATIONS}"
        )
    if implementation == "xla":
        return "xla"
    kernel = implementation
    if kernel == "auto":
        kernel = "cudnn" if length >= _CUDNN_MIN_LENGTH else "pallas"
    missing = _misses(kernel, length, head_dim, jnp.dtype(dtype))
    if missing and implementation != "auto":
        _warn_once(f"model.attention is {kernel!r}, but {missing}; XLA's attention runs instead")
    return "xla" if missing else kernel


def _misses(kernel, length, head_dim, dtype) -> str:
    """Why the fused kernel cannot run; "" where it can."""
    device = jax.devices()[0]
    if jax.default_backend() != "gpu" or "NVIDIA" not in device.device_kind:
        return f"the device is {device.device_kind}, not an NVIDIA GPU"
    if float(device.compute_capability) < 8.0:
        return f"{device.device_kind} is older than Ampere"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"model.dtype is {dtype.name}, not bfloat16"
    if kernel == "cudnn" and (head_dim > 128 or head_dim % 8):
        return f"heads of {head_dim} channels are not a multiple of 8 up to 128"
    if kernel == "pallas" and not short_attention.supports(length, head_dim):
        return f"{length} tokens and heads of {head_dim} channels do not fit its tiles"
    if kernel == "pallas" and jax.device_count() > 1:
        return "XLA does not split the kernel over several devices"
    return ""


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=3)
