"""The one entry to attention: XLA everywhere, cuDNN's fused kernel on NVIDIA GPUs.

Attention is 47 % of a U-ViT-B block at 4097 tokens and 8 % at 417, so the kernel decides the cost
of stage 2. cuDNN refuses most odd lengths, such as 417 and 4097, so sequences are padded to a
multiple of 64 there and the padding is masked by length.
"""

import jax
import jax.numpy as jnp

_CUDNN_MULTIPLE = 64
# Below this, one small batched matmul by XLA costs less than the padding does.
_CUDNN_MIN_LENGTH = 128


def attend(
    q_BLKH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, implementation: str = "auto"
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, with the softmax in float32.

    Args:
      q_BLKH, k_BLKH, v_BLKH: [B, L, K, H], any float dtype (cuDNN takes bfloat16 and float16).
      implementation: "xla", "cudnn", or "auto": cuDNN on an NVIDIA GPU where the dtype is 16 bits
        and the sequence is long enough for it to pay, XLA otherwise.

    Returns:
      [B, L, K, H] of q's dtype.
    """
    if implementation == "auto":
        implementation = "cudnn" if _prefers_cudnn(q_BLKH) else "xla"
    if implementation == "xla":
        return jax.nn.dot_product_attention(q_BLKH, k_BLKH, v_BLKH, implementation="xla")
    if implementation != "cudnn":
        raise ValueError(
            f"attention implementation {implementation!r}; expected 'auto', 'xla' or 'cudnn'"
        )
    batch, length = q_BLKH.shape[:2]
    padding = -length % _CUDNN_MULTIPLE
    if not padding:
        return jax.nn.dot_product_attention(q_BLKH, k_BLKH, v_BLKH, implementation="cudnn")
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BLKH, k_BLKH, v_BLKH))
    lengths = jnp.full((batch,), length, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]


def _prefers_cudnn(q_BLKH) -> bool:
    # cuDNN's fused kernels need an Ampere GPU or newer, and heads of up to 128 in steps of 8.
    device = jax.devices()[0]
    return (
        jax.default_backend() == "gpu"
        and "NVIDIA" in device.device_kind
        and float(device.compute_capability) >= 8.0
        and q_BLKH.shape[-1] <= 128
        and q_BLKH.shape[-1] % 8 == 0
        and q_BLKH.dtype in (jnp.bfloat16, jnp.float16)
        and q_BLKH.shape[1] >= _CUDNN_MIN_LENGTH
    )
