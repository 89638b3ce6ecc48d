"""The entry to attention: XLA everywhere, and fused kernels: our own on NVIDIA GPUs, one for
short sequences and one for Hopper's, cuDNN's where neither fits, and on TPUs JAX's splash kernel.

Attention is 47 % of a U-ViT-B block at 4097 tokens and 8 % at 417, so the kernel decides the cost
of stage 2. A kernel that wants other lengths than the model has is given padded ones, with the
padding masked. Padding q, k and v costs a copy of each, so a model asks `padding` once, carries
that many tokens more through all its blocks, and tells `attend` how many are real. Where that would
be many, `attend` pads.

XLA cannot split a Pallas kernel over devices: on a mesh, each device runs it on its own images.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maskdm_jax import sharding
from maskdm_jax.model.kernels import hopper_attention, short_attention, splash_attention

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas", "hopper", "splash")
# Those that read q, k and v as one matmul makes them, and write their gradients so.
_PACKED = ("pallas", "hopper")

# JAX refuses odd lengths to cuDNN's backward pass.
_CUDNN_MULTIPLE = 2
# On an NVIDIA GPU, below this short_attention's kernel is taken.
_LONG_FROM = 128
# On a TPU, from here on the splash kernel is taken, below it XLA's attention, which keeps K L^2
# scores of 4 bytes an image and block. At 4097 tokens they are 5 times all else that a step of
# U-ViT-B needs, at 417 as much as all else, at 257 (U-ViT-S) half (launch/compile_check.py with
# model.attention xla and splash). Shorter, they are few, and most of the kernel's block is padding.
_SPLASH_MIN_LENGTH = 256
# The compiler counts less traffic where 4097 tokens become 4224 in all blocks of the network, and
# where 417 become 512 in the kernel alone. The rule lies between.
_CARRIED_PADDING = 1 / 16


def attend(
    q_BLKH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    implementation: str = "auto",
    *,
    num_valid: int | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the first `num_valid` tokens, with the softmax in float32.

    Args:
      q_BLKH, k_BLKH, v_BLKH: [B, L, K, H], any float dtype.
      implementation: "xla", "cudnn", "pallas" (`short_attention`), "hopper" (`hopper_attention`),
        "splash" (`long_attention`), or "auto": the fused kernel for that length where the device
        and the dtype allow it, XLA otherwise. A kernel that is named where it cannot run is XLA
        too, with one warning.
      num_valid: tokens that are real; the rest is padding, and what comes out for it is arbitrary
        but finite. None: all L.
      mesh: the devices that the batch is split over. None: this process's first device.

    Returns:
      [B, L, K, H] of q's dtype.
    """
    length, head_dim = q_BLKH.shape[1], q_BLKH.shape[3]
    num_valid = length if num_valid is None else num_valid
    chosen = choose(implementation, length, head_dim, q_BLKH.dtype, mesh)
    supported = hopper_attention.supports(num_valid, head_dim, q_BLKH.dtype)
    if chosen == "hopper" and not supported:
        chosen = "cudnn"  # so much of it is padding
    if chosen == "xla":
        mask = None if num_valid == length else (jnp.arange(length) < num_valid)[None, None, None]
        return jax.nn.dot_product_attention(q_BLKH, k_BLKH, v_BLKH, mask=mask, implementation="xla")
    if chosen == "cudnn":
        return _cudnn(q_BLKH, k_BLKH, v_BLKH, num_valid)

    if chosen in _PACKED:
        return _packed(jnp.stack([q_BLKH, k_BLKH, v_BLKH], axis=2), chosen, num_valid, mesh)

    def kernel(q, k, v):
        return splash_attention.long_attention(q, k, v, num_valid)

    return sharding.on_each_device(kernel, mesh, q_BLKH.shape[0])(q_BLKH, k_BLKH, v_BLKH)


def attend_packed(
    qkv_BLTKH: jax.Array,
    implementation: str = "auto",
    *,
    num_valid: int | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`attend` of q, k and v that lie side by side, where `takes_packed` says so.

    Args:
      qkv_BLTKH: q, k and v, [B, L, 3, K, H].
      implementation, num_valid, mesh: see `attend`.

    Returns:
      [B, L, K, H] of the same dtype.

    Raises:
      ValueError: where `takes_packed` does not say so.
    """
    length, head_dim = qkv_BLTKH.shape[1], qkv_BLTKH.shape[4]
    num_valid = length if num_valid is None else num_valid
    chosen = choose(implementation, length, head_dim, qkv_BLTKH.dtype, mesh)
    if chosen not in _PACKED:
        raise ValueError(f"{chosen} attention takes q, k and v apart; expected one of {_PACKED}")
    return _packed(qkv_BLTKH, chosen, num_valid, mesh)


def _packed(qkv_BLTKH, chosen, num_valid, mesh):
    def kernel(qkv):
        if chosen == "hopper":
            return _hopper(qkv, num_valid)
        return short_attention.short_attention(qkv, num_valid)

    return sharding.on_each_device(kernel, mesh, qkv_BLTKH.shape[0])(qkv_BLTKH)


def takes_packed(
    implementation: str, length: int, head_dim: int, dtype, mesh: Mesh | None = None
) -> bool:
    """Whether what `attend` would run reads q, k and v as one matmul makes them."""
    return choose(implementation, length, head_dim, dtype, mesh) in _PACKED


def padding(
    implementation: str, length: int, head_dim: int, dtype, mesh: Mesh | None = None
) -> int:
    """Tokens to add to `length` so that `attend` need not copy its arguments to pad them.

    0 where so many tokens would cost the rest of the network more than those copies.
    """
    chosen = choose(implementation, length, head_dim, dtype, mesh)
    if chosen == "cudnn":
        return -length % _CUDNN_MULTIPLE
    if chosen == "splash":
        extra = splash_attention.padded_length(length) - length
        return extra if extra <= _CARRIED_PADDING * length else 0
    return 0


def choose(implementation: str, length: int, head_dim: int, dtype, mesh: Mesh | None = None) -> str:
    """What `attend` runs on the devices of `mesh`: "xla", "cudnn", "pallas", "hopper" or
    "splash".

    Raises:
      ValueError: for an implementation that does not exist.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r}; expected one of {IMPLEMENTATIONS}"
        )
    device, dtype = sharding.first_device(mesh), jnp.dtype(dtype)
    kernel = implementation
    if kernel == "auto":
        kernel = _fastest(device, length, head_dim, dtype)
    if kernel == "xla":
        return "xla"
    missing = _misses(device, kernel, length, head_dim, dtype)
    if missing and implementation != "auto":
        _warn_once(f"model.attention is {kernel!r}, but {missing}; XLA's attention runs instead")
    return "xla" if missing else kernel


def _fastest(device, length, head_dim, dtype):
    if device.platform == "tpu":
        return "splash" if length >= _SPLASH_MIN_LENGTH else "xla"
    if length < _LONG_FROM:
        return "pallas"
    fits = _is_hopper(device) and hopper_attention.supports(length, head_dim, dtype)
    return "hopper" if fits else "cudnn"


def _is_hopper(device):
    return getattr(device, "compute_capability", None) == "9.0"


def _misses(device, kernel, length, head_dim, dtype) -> str:
    """Why the fused kernel cannot run; "" where it can."""
    if kernel == "splash":
        return "" if device.platform == "tpu" else f"the device is {device.device_kind}, not a TPU"
    if unfit := sharding.unfit_for_gpu_kernels(device):
        return unfit
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"model.dtype is {dtype.name}, not bfloat16"
    if kernel == "cudnn" and (head_dim > 128 or head_dim % 8):
        return f"heads of {head_dim} channels are not a multiple of 8 up to 128"
    if kernel == "hopper" and not _is_hopper(device):
        return f"the device is {device.device_kind}, not a Hopper GPU"
    if kernel == "hopper" and not hopper_attention.supports(length, head_dim, dtype):
        return f"{length} tokens, heads of {head_dim} channels or {dtype.name} do not fit its tiles"
    if kernel == "pallas" and not short_attention.supports(length, head_dim):
        return f"{length} tokens and heads of {head_dim} channels do not fit its tiles"
    return ""


def _cudnn(q_BLKH, k_BLKH, v_BLKH, num_valid):
    batch, length = q_BLKH.shape[:2]
    q, k, v = (_pad(x, _CUDNN_MULTIPLE) for x in (q_BLKH, k_BLKH, v_BLKH))
    lengths = None
    if num_valid != q.shape[1]:
        lengths = jnp.full((batch,), num_valid, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]


def _hopper(qkv_BLTKH, num_valid):
    out = hopper_attention.hopper_attention(qkv_BLTKH[:, :num_valid])
    return jnp.pad(out, ((0, 0), (0, qkv_BLTKH.shape[1] - num_valid), (0, 0), (0, 0)))


def _pad(x_BLKH, multiple):
    extra = -x_BLKH.shape[1] % multiple
    return jnp.pad(x_BLKH, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x_BLKH


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=3)
