"""The U-ViT (Bao et al. 2022) as the official masked diffusion implementation builds it.

Tokens are [class, time, patches] or [time, patches], plus a learned position table over all of
them. Hidden patches never reach the network: `visible_BV` holds the ids of the given patches and
selects their position rows. With `mask.hidden = "pool"`, pooled tokens of the hidden blocks follow
the patches, see `pooling`. Other code uses only `make_model`, `init_params` and `apply`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from maskdm_jax.model import attention, layers, linear, patches
from maskdm_jax.model.linear import Affine, Linear, folded, kernel_init
from maskdm_jax.model.pooling import Pooled
from maskdm_jax.model.sizes import dimensions, grid_shape


def make_model(config, mesh: Mesh | None = None) -> "UViT":
    """The network of a config, for the devices of `mesh` (None: this process's first device)."""
    grid = grid_shape(config.data.image_size, config.model.patch_size)
    width, depth, num_heads = dimensions(config.model)
    return UViT(
        num_patches=grid[0] * grid[1],
        patch_dim=patches.patch_dim(config.model.patch_size, config.data.channels),
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
        grid=grid,
        pool_size=config.mask.pool_size if config.mask.hidden == "pool" else 0,
        coarse=tuple(size for size, _ in config.model.coarse),
        haar_patch_size=config.model.patch_size if config.model.wavelet == "haar" else 0,
        mesh=mesh,
    )


def init_params(model: "UViT", key: jax.Array) -> dict:
    """Random float32 parameters. No shape depends on the mask, so both stages share them; those of
    pooled tokens are under "pooled", and only stage 1 has them. Those of coarse tokens of q x q
    patches are under "coarse_q"."""
    pooled_BG = jnp.zeros((1, 1), jnp.int32) if model.pool_size else None
    num_tokens = model.num_patches + (1 if model.pool_size else 0)
    x_BVP = jnp.zeros((1, num_tokens, model.patch_dim))
    t_B = jnp.zeros((1,), jnp.int32)
    label_B = jnp.zeros((1,), jnp.int32) if model.num_classes else None
    params = model.init(key, x_BVP, t_B, label_B=label_B, pooled_BG=pooled_BG)["params"]
    for size in model.coarse:
        x_BGP = jnp.zeros((1, model.num_patches // size**2, model.patch_dim))
        name = f"coarse_{size}"
        params[name] = model.init(key, x_BGP, t_B, label_B=label_B, coarse=size)["params"][name]
    return params


def apply(
    model: "UViT",
    params: dict,
    x_BVP: jax.Array,
    t_B: jax.Array,
    *,
    visible_BV: jax.Array | None = None,
    pooled_BG: jax.Array | None = None,
    label_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
    coarse: int = 0,
) -> jax.Array:
    """Runs the network on the given patches.

    Args:
      model: from `make_model`.
      params: from `init_params`.
      x_BVP: noisy patches [B, V, P], float32; with pooled tokens [B, V + G, P], patches first.
      t_B: times [B], int32 or float32; DDPM's are 0 .. T - 1.
      visible_BV: ids of those patches [B, V], int32; None if all N are given in order.
      pooled_BG: ids of the pooled tokens [B, G], int32; None if there are none. Parameters of a
        model with pooled tokens also run without them.
      label_B: classes [B], int32; `num_classes` means "no class". None for an unconditional model.
      dropout_key: the key for dropout in training; None switches dropout off.
      coarse: q, one of `config.model.coarse`: x_BVP are the averages of all squares of q x q
        patches, in order, [B, N / q^2, P], and so is the output; 0: they are patches.

    Returns:
      The network's output, float32, of x_BVP's shape.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    if model.haar_patch_size:
        x_BVP = patches.to_haar(x_BVP, model.haar_patch_size)
    given = x_BVP, t_B, visible_BV, label_B, dropout_key is None, pooled_BG, coarse
    out_BVP = model.apply({"params": params}, *given, rngs=rngs)
    if model.haar_patch_size:
        out_BVP = patches.from_haar(out_BVP, model.haar_patch_size)
    return out_BVP


def timestep_embedding(t_B: jax.Array, width: int, max_period: float = 10000.0) -> jax.Array:
    """Sinusoids of the timesteps [B], cosines first, float32 [B, width] (Ho et al. 2020)."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t_B[:, None].astype(jnp.float32) * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width % 2)))


class UViT(nn.Module):
    """The network; its fields are those of `config.model`, with dimensions resolved."""

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
    grid: tuple[int, int] = (0, 0)  # which pooled tokens need
    pool_size: int = 0
    coarse: tuple[int, ...] = ()  # sizes of the coarse tokens, in patches
    haar_patch_size: int = 0  # side of the patches that `apply` transforms; 0: none
    mesh: Mesh | None = None

    @property
    def num_extra_tokens(self) -> int:
        """Tokens before the patches: the time, and the class if the model has classes."""
        return 2 if self.num_classes else 1

    @property
    def num_skips(self) -> int:
        """Blocks on each side of the middle one."""
        return self.depth // 2

    @nn.compact
    def __call__(
        self,
        x_BVP,
        t_B,
        visible_BV=None,
        label_B=None,
        deterministic=True,
        pooled_BG=None,
        coarse=0,
    ):
        num_given, pooled = x_BVP.shape[1], None  # patches
        if coarse:
            num_given, pooled = 0, self._pooled(coarse, f"coarse_{coarse}")
        elif pooled_BG is not None:
            num_given -= pooled_BG.shape[1]
            pooled = self._pooled(self.pool_size, "pooled")
        x_BVP, x_BGP = jnp.split(x_BVP, [num_given], axis=1)
        extra_BED, rows_ND = self._extra(t_B, label_B)
        x_BLD = [extra_BED]
        if num_given:
            x_BLD.append(self._embed(x_BVP, visible_BV, rows_ND))
        if pooled:
            x_BLD.append(pooled.embed(x_BGP, pooled_BG, rows_ND))
        x_BLD = jnp.concatenate(x_BLD, axis=1)
        num_tokens, head_dim = x_BLD.shape[1], self.width // self.num_heads
        plan = attention.plan(self.attention, num_tokens, head_dim, self.dtype, self.mesh)
        x_BLD = jnp.pad(x_BLD, ((0, 0), (0, plan.length - num_tokens), (0, 0)))
        # Blocks take one list of M = B * L tokens: given [B, L, D], XLA may choose a batch-last
        # layout, which costs transposes in every block.
        x_MD = x_BLD.reshape(-1, self.width)
        make_block = functools.partial(
            nn.remat(Block, static_argnums=(3,)) if self.remat == "blocks" else Block,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            dropout=self.dropout,
            plan=plan,
            dtype=self.dtype,
        )
        skips = []
        for i in range(self.num_skips):
            x_MD = make_block(name=f"in_block_{i}")(x_MD, None, deterministic)
            skips.append(x_MD)
        x_MD = make_block(name="mid_block")(x_MD, None, deterministic)
        for i in range(self.num_skips):
            x_MD = make_block(name=f"out_block_{i}")(x_MD, skips.pop(), deterministic)
        normed_BLD = layers.normalize(x_MD).reshape(-1, plan.length, self.width)
        start, end = self.num_extra_tokens, self.num_extra_tokens + num_given
        out = []
        if num_given:
            norm = Affine(self.width, name="norm")()
            output = Linear(self.width, self.patch_dim, name="output")()
            kernel, bias = folded(norm, output, self.dtype)
            out.append((normed_BLD[:, start:end] @ kernel).astype(jnp.float32) + bias)
        if pooled:
            out.append(pooled.predict(normed_BLD[:, end:num_tokens]))
        return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)

    def _pooled(self, size, name):
        return Pooled(self.grid, size, self.patch_dim, self.width, self.dtype, name=name)

    def _embed(self, x_BVP, visible_BV, rows_ND):
        """The patches' tokens [B, V, D]."""
        embed = linear.patch_embed(self.patch_dim, self.width, self.dtype, name="patch_embed")
        # Gathered in float32, because their gradient, a sum over images, takes the same dtype.
        rows = rows_ND if visible_BV is None else rows_ND[visible_BV]
        return embed(x_BVP) + rows.astype(self.dtype)

    def _extra(self, t_B, label_B):
        """The tokens before them [B, E, D], and the patches' rows of the position table [N, D]."""
        time_BD = timestep_embedding(t_B, self.width)
        if self.mlp_time_embed:
            time_BD = self._dense(4 * self.width, "time_mlp_in")(time_BD)
            time_BD = self._dense(self.width, "time_mlp_out")(nn.silu(time_BD))
        extra = [time_BD]
        if self.num_classes:
            # The last row is "no class", for classifier-free guidance.
            table = nn.Embed(
                self.num_classes + 1, self.width, embedding_init=kernel_init, name="class_embed"
            )
            extra.insert(0, table(label_B))
        position_LD = self.param(
            "position", kernel_init, (self.num_extra_tokens + self.num_patches, self.width)
        )
        extra_BED = jnp.stack(extra, axis=1) + position_LD[: self.num_extra_tokens]
        return extra_BED.astype(self.dtype), position_LD[self.num_extra_tokens :]

    def _dense(self, features, name):
        return nn.Dense(features, kernel_init=kernel_init, dtype=self.dtype, name=name)


class Block(nn.Module):
    """A pre-LN transformer block; with a skip, [x, skip] is projected to D first.

        x += proj(attention(LN(x)));  x += mlp_out(GELU(mlp_in(LN(x))))

    Three products are rearranged, for the same result with less memory traffic:

    - A LayerNorm's scale and shift are `folded` into the matmul that follows, and cost nothing per
      token. The shift reaches q and v as biases. k needs none: a shift of all keys of a head adds
      the same to all scores of a query, which leaves the softmax unchanged. v's bias passes through
      attention unchanged, since softmax weights sum to 1, and joins the bias of `proj`.
    - q, k and v are one matmul if the attention kernel reads them as one array; otherwise they are
      three, with parts of one kernel, because splitting the result of one would cost copies.
    - [x, skip] W = x W_1 + skip W_2: x and skip are never concatenated.
    """

    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    dropout: float
    plan: attention.Plan
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_MD, skip_MD, deterministic):
        width, dtype, mesh = x_MD.shape[-1], self.dtype, self.plan.mesh

        def drop(x):
            return nn.Dropout(self.dropout, deterministic=deterministic)(x)

        if skip_MD is not None:
            kernel, bias = Linear(2 * width, width, name="skip")()
            kernel_x, kernel_skip = jnp.split(kernel.astype(dtype), 2)
            x_MD, normed_MD = layers.add_normalize(
                x_MD @ kernel_x, skip_MD @ kernel_skip, bias, mesh
            )
        else:
            normed_MD = layers.normalize(x_MD)

        norm = Affine(width, name="norm_attention")()
        qkv = Linear(width, 3 * width, use_bias=False, name="qkv")()
        kernel, bias = folded(norm, qkv, dtype)
        q_bias, _, v_bias = jnp.split(bias, 3)
        if self.qkv_bias:  # on q and v only, as in the official code
            q_bias += self.param("q_bias", nn.initializers.zeros, (width,))
            v_bias += self.param("v_bias", nn.initializers.zeros, (width,))
        out_BLKH = self._attend(normed_MD, kernel, q_bias.astype(dtype))
        kernel, bias = Linear(width, width, name="proj")()
        bias += linear.dot(v_bias, kernel)
        out_MD = out_BLKH.reshape(x_MD.shape) @ kernel.astype(dtype)
        if self.dropout:  # dropout applies to the bias too, so add it first
            out_MD = drop(out_MD + bias.astype(dtype))
            bias = jnp.zeros_like(bias)
        x_MD, normed_MD = layers.add_normalize(x_MD, out_MD, bias, mesh)

        hidden_width = int(self.mlp_ratio * width)
        norm = Affine(width, name="norm_mlp")()
        mlp_in = Linear(width, hidden_width, name="mlp_in")()
        kernel, bias = folded(norm, mlp_in, dtype)
        hidden = drop(layers.bias_gelu(normed_MD @ kernel, bias, mesh))
        kernel, bias = Linear(hidden_width, width, name="mlp_out")()
        return x_MD + drop(hidden @ kernel.astype(dtype) + bias.astype(dtype))

    def _attend(self, normed_MD, kernel, q_bias):
        heads = (self.num_heads, normed_MD.shape[-1] // self.num_heads)
        if self.plan.packed:
            qkv_MN = layers.add_to_first(normed_MD @ kernel, q_bias)
            return attention.attend_packed(
                qkv_MN.reshape(-1, self.plan.length, 3, *heads), self.plan
            )
        q_MD, k_MD, v_MD = (normed_MD @ part for part in jnp.split(kernel, 3, axis=1))
        qkv = (x.reshape(-1, self.plan.length, *heads) for x in (q_MD + q_bias, k_MD, v_MD))
        return attention.attend(*qkv, self.plan)
