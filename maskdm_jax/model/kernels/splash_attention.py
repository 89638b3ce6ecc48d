"""Attention over long sequences on TPUs: JAX's splash kernel, set up for images.

JAX has two kernels for TPUs. At 4097 tokens splash keeps half the temporaries of flash_attention,
and it is the one that large language models train with. It never writes the scores, forward or
backward. Its lengths are multiples of its blocks; the padding that fills the last block is a
segment of its own, and a token attends only to its own segment.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

# Queries and keys of one block, multiples of 128. The first that gives the least padding is used.
# With 512 the float32 scores of a block take 1 MiB of the 16 that the compiler gives a kernel.
_BLOCKS = (512, 384, 256)


def padded_length(length: int) -> int:
    """The shortest length supported by the kernel for `length` tokens: 4224 for 4097."""
    return min(_pad(length, block) for block in _BLOCKS)


def splash_attention(
    q_BLKH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    num_valid: int,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the first `num_valid` keys, with the softmax in float32.

    Args:
      q_BLKH, k_BLKH, v_BLKH: [B, L, K, H]; an L that is not a `padded_length` costs copies.
      num_valid: tokens that are not padding, at least 1.
      interpret: run the kernel on the CPU, slowly, for tests.

    Returns:
      [B, L, K, H] of q's dtype.
    """
    _, length, num_heads, head_dim = q_BLKH.shape
    padded = padded_length(length)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((padded, padded))] * num_heads),
        block_sizes=_block_sizes(padded),
        interpret=interpret,
    )
    segments = None
    if num_valid < padded:
        segment_L = (jnp.arange(padded) >= num_valid).astype(jnp.int32)
        segments = splash.SegmentIds(q=segment_L, kv=segment_L)

    def prepare(x_BLKH):
        x_BLKH = jnp.pad(x_BLKH, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        return x_BLKH.swapaxes(1, 2)

    # The kernel does not scale the scores.
    q_BKLH, k_BKLH, v_BKLH = map(prepare, (q_BLKH * head_dim**-0.5, k_BLKH, v_BLKH))
    out_BKLH = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(
        q_BKLH, k_BKLH, v_BKLH
    )
    return out_BKLH.swapaxes(1, 2)[:, :length]


def _block_sizes(padded):
    size = next(block for block in _BLOCKS if padded % block == 0)
    forward = dict(block_q=size, block_kv=size, block_kv_compute=size)
    dkv = dict(block_q_dkv=size, block_kv_dkv=size, block_kv_dkv_compute=size)
    dq = dict(block_q_dq=size, block_kv_dq=size)
    # A TPU stores rows of 128: with 64 channels per head last, arrays would take twice the memory.
    tokens_last = splash.QKVLayout.SEQ_MINOR
    layout = dict(q_layout=tokens_last, k_layout=tokens_last, v_layout=tokens_last)
    return splash.BlockSizes(**forward, **dkv, **dq, **layout)


def _pad(length, block):
    return -(-length // block) * block
