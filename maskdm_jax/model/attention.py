"""The choice of attention kernel: a fused one if the device has one, XLA's otherwise.

NVIDIA GPUs run one of two kernels in `kernels/`, for short sequences and for Hopper GPUs, or
cuDNN's if neither fits; TPUs run JAX's splash kernel. Attention is 47 % of a U-ViT-B block at 4097
tokens and 8 % at 417, so the kernel decides the cost of stage 2.

A network plans its attention once for all blocks: the kernel, and the tokens of padding it needs.
Padding q, k and v in every block would cost a copy of each; if the padding is small, the network
carries it through all its blocks instead.

XLA cannot split a Pallas kernel over devices: on a mesh, each device runs it on its own images.
"""

import functools
import importlib
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maskdm_jax import sharding

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas", "hopper", "splash")
# Kernels that read q, k and v as one array, the output of one matmul, and write one gradient.
_PACKED = ("pallas", "hopper")

# JAX rejects odd lengths in cuDNN's backward pass.
_CUDNN_MULTIPLE = 2
# NVIDIA GPUs: the kernel for short sequences runs below this many tokens.
_LONG_FROM = 128
# NVIDIA GPUs with 99 KiB of shared memory per block, not 163 or more, by compute capability: A10,
# L4 and GeForce cards. There the short kernel's backward pass fits if a head has at most this many
# values: 128 tokens of 64 channels, or 64 of 128; 104 of 128 need 128 KiB.
_SMALL_SHARED_MEMORY = (8.6, 8.9, 12.0)
_SMALL_TILE = 128 * 64
# TPUs: the splash kernel runs from this many tokens on, XLA's attention below. XLA's keeps K L^2
# scores of 4 bytes per image and block: 5 times all other memory of a U-ViT-B step at 4097 tokens,
# as much as all other memory at 417, half of it at 257 with U-ViT-S (launch/compile_check.py with
# model.attention xla and splash). For shorter sequences the kernel's block is mostly padding.
_SPLASH_MIN_LENGTH = 256
# By the compiler's count of memory traffic, padding 4097 tokens to 4224 is cheaper in all blocks of
# the network, and padding 417 to 512 in the kernel alone. The threshold is between the two.
_CARRIED_PADDING = 1 / 16


class Plan(NamedTuple):
    """How the blocks of a network attend.

    Fields:
      kernel: "xla", "cudnn", "pallas" (kernels.short_attention), "hopper", or "splash".
      length: tokens of an image, with padding.
      num_valid: tokens that are not padding; padding's outputs are arbitrary but finite.
      mesh: the devices that the batch is split over; None: this process's first device.
    """

    kernel: str
    length: int
    num_valid: int
    mesh: Mesh | None

    @property
    def packed(self) -> bool:
        """Whether the kernel reads q, k and v as one array, the output of one matmul."""
        return self.kernel in _PACKED


def plan(
    implementation: str, num_tokens: int, head_dim: int, dtype, mesh: Mesh | None = None
) -> Plan:
    """The plan for attention over `num_tokens` tokens on the devices of `mesh`.

    Args:
      implementation: a kernel, see `Plan`, or "auto": the fused kernel for that many tokens if
        device and dtype allow it, XLA otherwise. A named kernel that cannot run is replaced by
        XLA, with one warning.
      num_tokens: of an image.
      head_dim: channels of a head.
      dtype: of q, k and v.
      mesh: None for this process's first device.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r}; expected one of {IMPLEMENTATIONS}"
        )
    device, dtype = sharding.first_device(mesh), jnp.dtype(dtype)
    kernel = implementation
    if kernel == "auto":
        kernel = _fastest(device, num_tokens, head_dim, dtype)
    missing = _misses(device, kernel, num_tokens, head_dim, dtype)
    if missing and implementation != "auto":
        _warn_once(f"model.attention is {kernel!r}, but {missing}; XLA's attention runs instead")
    kernel = "xla" if missing else kernel
    return Plan(kernel, num_tokens + _padding(kernel, num_tokens), num_tokens, mesh)


def attend(q_BLKH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, plan: Plan) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the first `plan.num_valid` tokens; the softmax is float32.

    Args:
      q_BLKH, k_BLKH, v_BLKH: [B, L, K, H], any float dtype, L = `plan.length`.

    Returns:
      [B, L, K, H] of q's dtype.
    """
    if plan.packed:
        return attend_packed(jnp.stack([q_BLKH, k_BLKH, v_BLKH], axis=2), plan)
    if plan.kernel == "splash":
        kernel = functools.partial(
            _kernels("splash_attention").splash_attention, num_valid=plan.num_valid
        )
        run = sharding.on_each_device(kernel, plan.mesh, q_BLKH.shape[0])
        return run(q_BLKH, k_BLKH, v_BLKH)
    dtype, padded = q_BLKH.dtype, plan.num_valid < plan.length
    if sharding.bfloat16_advice(sharding.first_device(plan.mesh), dtype.name):
        # JAX names the algorithm of XLA's attention, and XLA has none of bfloat16 for such a GPU.
        q_BLKH, k_BLKH, v_BLKH = (x.astype(jnp.float32) for x in (q_BLKH, k_BLKH, v_BLKH))
    if plan.kernel == "cudnn":
        batch = q_BLKH.shape[0]
        lengths = jnp.full((batch,), plan.num_valid, jnp.int32) if padded else None
        masked = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    else:
        is_real_L = jnp.arange(plan.length) < plan.num_valid
        masked = dict(mask=is_real_L[None, None, None] if padded else None)
    return jax.nn.dot_product_attention(
        q_BLKH, k_BLKH, v_BLKH, implementation=plan.kernel, **masked
    ).astype(dtype)


def attend_packed(qkv_BLTKH: jax.Array, plan: Plan) -> jax.Array:
    """`attend` for q, k and v in one array, [B, L, 3, K, H].

    Raises:
      ValueError: if the plan is not `packed`, or pads tokens for the Hopper kernel.
    """
    if not plan.packed:
        raise ValueError(f"{plan.kernel} attention takes q, k and v apart; expected {_PACKED}")
    if plan.kernel == "hopper":
        if plan.num_valid < plan.length:
            raise ValueError(f"the Hopper kernel takes no padding; {plan} has some")
        kernel = _kernels("hopper_attention").hopper_attention
    else:
        kernel = functools.partial(
            _kernels("short_attention").short_attention, num_valid=plan.num_valid
        )
    return sharding.on_each_device(kernel, plan.mesh, qkv_BLTKH.shape[0])(qkv_BLTKH)


def _kernels(name):
    # Imported on use: importing all kernels takes longer than everything else in the network.
    return importlib.import_module(f"maskdm_jax.model.kernels.{name}")


def _fastest(device, num_tokens, head_dim, dtype):
    if device.platform == "tpu":
        return "splash" if num_tokens >= _SPLASH_MIN_LENGTH else "xla"
    if sharding.unfit_for_gpu_kernels(device):
        return "xla"
    if num_tokens < _LONG_FROM:
        return "pallas"
    return "cudnn" if _misses(device, "hopper", num_tokens, head_dim, dtype) else "hopper"


def _padding(kernel, num_tokens):
    """Tokens of padding for the whole network, which spare `attend` copies to pad its arguments; 0
    if that many would cost the rest of the network more than those copies."""
    if kernel == "cudnn":
        return -num_tokens % _CUDNN_MULTIPLE
    if kernel == "splash":
        extra = _kernels("splash_attention").padded_length(num_tokens) - num_tokens
        return extra if extra <= _CARRIED_PADDING * num_tokens else 0
    return 0


def _misses(device, kernel, num_tokens, head_dim, dtype) -> str:
    """Why the kernel cannot run; "" if it can."""
    if kernel == "xla":
        return ""
    if kernel == "splash":
        return "" if device.platform == "tpu" else f"the device is {device.device_kind}, not a TPU"
    if unfit := sharding.unfit_for_gpu_kernels(device):
        return unfit
    small = sharding.compute_capability(device) in _SMALL_SHARED_MEMORY
    if kernel == "pallas" and small and num_tokens * head_dim > _SMALL_TILE:
        return f"{device.device_kind} has too little shared memory for its tiles"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"model.dtype is {dtype.name}, not bfloat16"
    if kernel == "cudnn":
        if head_dim > 128 or head_dim % 8:
            return f"{head_dim} channels per head are not a multiple of 8 up to 128"
        return ""
    if kernel == "hopper" and getattr(device, "compute_capability", None) != "9.0":
        return f"the device is {device.device_kind}, not a Hopper GPU"
    module = "hopper_attention" if kernel == "hopper" else "short_attention"
    if not _kernels(module).supports(num_tokens, head_dim, dtype):
        return f"it does not take {num_tokens} tokens, {head_dim} channels per head, {dtype.name}"
    return ""


@functools.cache
def _warn_once(message):
    warnings.warn(message, stacklevel=3)
