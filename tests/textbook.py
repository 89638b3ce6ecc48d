"""A textbook U-ViT: plain layers, softmax attention, nothing rearranged."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from maskdm_jax.model.uvit import timestep_embedding


class Block(nn.Module):
    num_heads: int
    qkv_bias: bool
    mlp_ratio: float

    @nn.compact
    def __call__(self, x_BLD, skip_BLD=None):
        width = x_BLD.shape[-1]
        if skip_BLD is not None:
            both = jnp.concatenate([x_BLD, skip_BLD], axis=-1)
            x_BLD = nn.Dense(width, name="skip")(both)
        qkv = nn.Dense(3 * width, use_bias=False, name="qkv")(norm("norm_attention")(x_BLD))
        q, k, v = jnp.split(qkv, 3, axis=-1)
        if self.qkv_bias:
            q += self.param("q_bias", nn.initializers.zeros, (width,))
            v += self.param("v_bias", nn.initializers.zeros, (width,))
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, -1) for x in (q, k, v))
        scores = jnp.einsum("blkh,bmkh->bklm", q, k) / q.shape[-1] ** 0.5
        out = jnp.einsum("bklm,bmkh->blkh", nn.softmax(scores), v).reshape(x_BLD.shape)
        x_BLD += nn.Dense(width, name="proj")(out)
        hidden = nn.Dense(int(self.mlp_ratio * width), name="mlp_in")(norm("norm_mlp")(x_BLD))
        hidden = nn.gelu(hidden, approximate=False)
        return x_BLD + nn.Dense(width, name="mlp_out")(hidden)


class UViT(nn.Module):
    width: int
    depth: int
    num_heads: int
    patch_dim: int
    num_patches: int
    num_classes: int = 0
    mlp_time_embed: bool = False
    qkv_bias: bool = False
    mlp_ratio: float = 4.0
    grid: tuple[int, int] = (0, 0)
    pool_size: int = 0

    @nn.compact
    def __call__(self, x_BVP, t_B, visible_BV=None, label_B=None, pooled_BG=None):
        time_BD = timestep_embedding(t_B, self.width)
        if self.mlp_time_embed:
            hidden = nn.silu(nn.Dense(4 * self.width, name="time_mlp_in")(time_BD))
            time_BD = nn.Dense(self.width, name="time_mlp_out")(hidden)
        extra = [time_BD]
        if self.num_classes:
            table = nn.Embed(self.num_classes + 1, self.width, name="class_embed")
            extra = [table(label_B), time_BD]
        count = len(extra)
        shape = (count + self.num_patches, self.width)
        position_LD = self.param("position", nn.initializers.normal(0.02), shape)
        if visible_BV is None:
            visible_BV = jnp.tile(jnp.arange(self.num_patches), (len(x_BVP), 1))
        num_visible = visible_BV.shape[1]
        x_BVP, x_BGP = x_BVP[:, :num_visible], x_BVP[:, num_visible:]
        x_BVD = nn.Dense(self.width, name="patch_embed")(x_BVP) + position_LD[count + visible_BV]
        extra_BED = jnp.stack(extra, axis=1) + position_LD[:count]
        x_BLD = jnp.concatenate([extra_BED, x_BVD], axis=1)
        if pooled_BG is not None:
            ends = Pooled(self.width, self.patch_dim, name="pooled")
            squares = jnp.asarray(squares_of(self.grid, self.pool_size))
            rows_BGSD = position_LD[count + squares[pooled_BG]]
            position_BGD = rows_BGSD.mean(2) * self.pool_size / 2
            x_BLD = jnp.concatenate([x_BLD, ends.embed(x_BGP) + position_BGD], axis=1)
        options = (self.num_heads, self.qkv_bias, self.mlp_ratio)
        skips = []
        for i in range(self.depth // 2):
            x_BLD = Block(*options, name=f"in_block_{i}")(x_BLD)
            skips.append(x_BLD)
        x_BLD = Block(*options, name="mid_block")(x_BLD)
        for i in range(self.depth // 2):
            block = Block(*options, name=f"out_block_{i}")
            x_BLD = block(x_BLD, skips.pop())
        out_BVP = nn.Dense(self.patch_dim, name="output")(norm("norm")(x_BLD))[:, count:]
        if pooled_BG is None:
            return out_BVP
        out_BGP = ends.predict(x_BLD)[:, count + num_visible :]
        return jnp.concatenate([out_BVP[:, :num_visible], out_BGP], axis=1)


class Pooled(nn.Module):
    width: int
    patch_dim: int

    def setup(self):
        self.patch_embed = nn.Dense(self.width)
        self.vector = self.param("vector", nn.initializers.normal(0.02), (self.width,))
        self.norm = nn.LayerNorm(epsilon=1e-5)
        self.output = nn.Dense(self.patch_dim)

    def embed(self, x_BGP):
        return self.patch_embed(x_BGP) + self.vector

    def predict(self, x_BLD):
        return self.output(self.norm(x_BLD))


def squares_of(grid, size):
    """Ids of the patches of each square of size x size patches, [squares][size^2]."""
    corners = [(i, j) for i in range(0, grid[0], size) for j in range(0, grid[1], size)]
    steps = [(a, b) for a in range(size) for b in range(size)]
    return [[(i + a) * grid[1] + j + b for a, b in steps] for i, j in corners]


def norm(name):
    return nn.LayerNorm(epsilon=1e-5, name=name)


def perturbed(params, seed=0, scale=0.1):
    """The parameters with noise added, since fresh biases are 0 and fresh scales 1."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)
