"""The U-ViT (Bao et al. 2022) as the official masked diffusion implementation builds it.

Tokens are [class, time, patches] or [time, patches], plus a learned position table over all of
them. Hidden patches never reach the network: `visible_BV` names the patches that are given, and
selects their position rows. `init_params` and `apply` are all that the rest of the code sees.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from maskdm_jax.attention import attend
from maskdm_jax.patches import grid_shape

# size: (width D, blocks, heads K). An even count of blocks builds one more: n/2 + 1 + n/2.
SIZES = {"S": (512, 13, 8), "B": (768, 13, 12), "L": (1024, 21, 16), "H": (1152, 29, 16)}

_LAYER_NORM_EPSILON = 1e-5
_kernel_init = nn.initializers.truncated_normal(0.02)


def dimensions(model) -> tuple[int, int, int]:
    """(width, depth, num_heads) of `config.model`; a field that is 0 is the size's own."""
    width, depth, num_heads = SIZES[model.size]
    return model.width or width, model.depth or depth, model.num_heads or num_heads


def make_model(config) -> "UViT":
    """The network of a config."""
    rows, cols = grid_shape(config.data.image_size, config.model.patch_size)
    width, depth, num_heads = dimensions(config.model)
    return UViT(
        num_patches=rows * cols,
        patch_dim=config.model.patch_size**2 * config.data.channels,
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=config.model.mlp_ratio,
        qkv_bias=config.model.qkv_bias,
        mlp_time_embed=config.model.mlp_time_embed,
        num_classes=config.model.num_classes,
        dropout=config.model.dropout,
        remat=config.model.remat,
        attention=config.model.attention,
        dtype=jnp.dtype(config.model.dtype),
    )


def init_params(model: "UViT", key: jax.Array) -> dict:
    """Fresh float32 parameters. No shape depends on the mask, so both stages share them."""
    x_BNP = jnp.zeros((1, model.num_patches, model.patch_dim))
    t_B = jnp.zeros((1,), jnp.int32)
    label_B = jnp.zeros((1,), jnp.int32) if model.num_classes else None
    return model.init(key, x_BNP, t_B, label_B=label_B)["params"]


def apply(
    model: "UViT",
    params: dict,
    x_BVP: jax.Array,
    t_B: jax.Array,
    *,
    visible_BV: jax.Array | None = None,
    label_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Runs the network on the given patches.

    Args:
      model: from `make_model`.
      params: from `init_params`.
      x_BVP: noisy patches [B, V, P], float32.
      t_B: timesteps [B], int32 in 0 .. T - 1.
      visible_BV: ids of those patches [B, V], int32; None where all N are given in order.
      label_B: classes [B], int32; `num_classes` means "no class". None for an unconditional model.
      dropout_key: training with dropout; None switches dropout off.

    Returns:
      float32 [B, V, P].
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    return model.apply(
        {"params": params}, x_BVP, t_B, visible_BV, label_B, dropout_key is None, rngs=rngs
    )


def timestep_embedding(t_B: jax.Array, width: int, max_period: float = 10000.0) -> jax.Array:
    """Sinusoids of the timestep, cosines first, float32 [B, width] (Ho et al. 2020)."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t_B[:, None].astype(jnp.float32) * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width % 2)))


class UViT(nn.Module):
    """See the module's docstring; the fields are those of `config.model`, resolved."""

    num_patches: int
    patch_dim: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    num_classes: int = 0
    dropout: float = 0.0
    remat: str = "none"
    attention: str = "auto"
    dtype: jnp.dtype = jnp.dtype("float32")

    @property
    def num_extra_tokens(self) -> int:
        """Tokens before the patches: time, and class where there are classes."""
        return 2 if self.num_classes else 1

    @property
    def num_skips(self) -> int:
        """Blocks on each side of the middle one."""
        return self.depth // 2

    @nn.compact
    def __call__(self, x_BVP, t_B, visible_BV=None, label_B=None, deterministic=True):
        x_BLD = self._embed(x_BVP, t_B, visible_BV, label_B)
        block = nn.remat(Block, static_argnums=(3,)) if self.remat == "blocks" else Block
        kwargs = dict(
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            dropout=self.dropout,
            attention=self.attention,
            dtype=self.dtype,
        )
        skips = []
        for i in range(self.num_skips):
            x_BLD = block(**kwargs, name=f"in_block_{i}")(x_BLD, None, deterministic)
            skips.append(x_BLD)
        x_BLD = block(**kwargs, name="mid_block")(x_BLD, None, deterministic)
        for i in range(self.num_skips):
            x_BLD = block(**kwargs, name=f"out_block_{i}")(x_BLD, skips.pop(), deterministic)
        x_BVD = _layer_norm("norm", x_BLD[:, self.num_extra_tokens :], self.dtype)
        out_BVP = nn.Dense(
            self.patch_dim, kernel_init=_kernel_init, dtype=self.dtype, name="output"
        )(x_BVD)
        return out_BVP.astype(jnp.float32)

    def _embed(self, x_BVP, t_B, visible_BV, label_B):
        # A convolution of stride p is a matmul over patches; its init is the framework's default,
        # uniform in 1 / sqrt(fan_in), for the bias too.
        bound = self.patch_dim**-0.5
        x_BVD = nn.Dense(
            self.width,
            kernel_init=_uniform(bound),
            bias_init=_uniform(bound),
            dtype=self.dtype,
            name="patch_embed",
        )(x_BVP)
        time_BD = timestep_embedding(t_B, self.width)
        if self.mlp_time_embed:
            time_BD = self._dense(4 * self.width, "time_mlp_in")(time_BD)
            time_BD = self._dense(self.width, "time_mlp_out")(nn.silu(time_BD))
        extra = [time_BD]
        if self.num_classes:
            # The last row stands for "no class": what classifier-free guidance needs.
            table = nn.Embed(
                self.num_classes + 1, self.width, embedding_init=_kernel_init, name="class_embed"
            )
            extra.insert(0, table(label_B))
        position_LD = self.param(
            "position", _kernel_init, (self.num_extra_tokens + self.num_patches, self.width)
        )
        extra_BED = jnp.stack(extra, axis=1) + position_LD[: self.num_extra_tokens]
        patch_rows_ND = position_LD[self.num_extra_tokens :].astype(self.dtype)
        x_BVD += patch_rows_ND if visible_BV is None else patch_rows_ND[visible_BV]
        return jnp.concatenate([extra_BED.astype(self.dtype), x_BVD], axis=1)

    def _dense(self, features, name):
        return nn.Dense(features, kernel_init=_kernel_init, dtype=self.dtype, name=name)


class Block(nn.Module):
    """Pre-LN transformer block; with a skip, [x, skip] is projected to D first."""

    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    dropout: float
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD, skip_BLD, deterministic):
        width = x_BLD.shape[-1]

        def dense(features, name, use_bias=True):
            return nn.Dense(
                features, use_bias, dtype=self.dtype, kernel_init=_kernel_init, name=name
            )

        def drop(x):
            return nn.Dropout(self.dropout, deterministic=deterministic)(x)

        if skip_BLD is not None:
            x_BLD = dense(width, "skip")(jnp.concatenate([x_BLD, skip_BLD], axis=-1))

        qkv_BLD = dense(3 * width, "qkv", use_bias=False)(
            _layer_norm("norm_attention", x_BLD, self.dtype)
        )
        if self.qkv_bias:  # on q and v only, as the official code has it
            q_bias = self.param("q_bias", nn.initializers.zeros, (width,))
            v_bias = self.param("v_bias", nn.initializers.zeros, (width,))
            bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
            qkv_BLD += bias.astype(self.dtype)
        heads = (*x_BLD.shape[:2], self.num_heads, width // self.num_heads)
        q, k, v = (x.reshape(heads) for x in jnp.split(qkv_BLD, 3, axis=-1))
        out_BLD = attend(q, k, v, self.attention).reshape(x_BLD.shape)
        x_BLD += drop(dense(width, "proj")(out_BLD))

        hidden = dense(int(self.mlp_ratio * width), "mlp_in")(
            _layer_norm("norm_mlp", x_BLD, self.dtype)
        )
        hidden = drop(nn.gelu(hidden, approximate=False))
        return x_BLD + drop(dense(width, "mlp_out")(hidden))


def _layer_norm(name, x, dtype):
    # Statistics in float32 by the two-pass formula: the one-pass one loses digits on large means.
    norm = nn.LayerNorm(_LAYER_NORM_EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)
    return norm(x).astype(dtype)


def _uniform(bound):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
