"""The PyTorch peer's network: the U-ViT of maskdm_jax.model, in plain PyTorch.

Its submodules are named as ours, so that our parameters load into it.
"""

import math

import torch
from torch import nn

from maskdm_jax.model import patches
from maskdm_jax.model.sizes import dimensions, grid_shape


class Block(nn.Module):
    """Pre-LN transformer block; with `has_skip`, [x, skip] is projected to D first."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, has_skip: bool):
        super().__init__()
        hidden = int(mlp_ratio * width)
        self.num_heads = num_heads
        self.skip = nn.Linear(2 * width, width) if has_skip else None
        self.norm_attention = nn.LayerNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-5)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def forward(self, x_BLD, skip_BLD=None):
        if self.skip is not None:
            x_BLD = self.skip(torch.cat([x_BLD, skip_BLD], dim=-1))
        qkv_BLD = self.qkv(self.norm_attention(x_BLD))
        # [3, B, K, L, H]: q, k and v are views of what qkv wrote.
        parts = qkv_BLD.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out_BKLH = nn.functional.scaled_dot_product_attention(*parts.unbind())
        x_BLD = x_BLD + self.proj(out_BKLH.transpose(1, 2).flatten(2))
        return x_BLD + self.mlp_out(nn.functional.gelu(self.mlp_in(self.norm_mlp(x_BLD))))


class Pooled(nn.Module):
    """The network's ends for pooled tokens; the submodules are named as in model.pooling."""

    def __init__(self, grid: tuple[int, int], size: int, patch_dim: int, width: int):
        super().__init__()
        self.rows, self.cols, self.size = grid[0] // size, grid[1] // size, size
        self.patch_embed = nn.Linear(patch_dim, width)
        self.vector = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.output = nn.Linear(width, patch_dim)

    def embed(self, x_BGP, pooled_BG, rows_ND):
        """Tokens [B, G, D]: a Linear layer, the mean position of the patches, a learnt vector."""
        squares = rows_ND.view(self.rows, self.size, self.cols, self.size, -1)
        position = squares.mean((1, 3)).flatten(0, 1) * (self.size / 2)
        return self.patch_embed(x_BGP) + (position[pooled_BG] + self.vector)

    def predict(self, x_BGD):
        """The output [B, G, P]."""
        return self.output(self.norm(x_BGD)).float()


class UViT(nn.Module):
    """U-ViT over tokens [time, patches, pooled tokens]; the submodules are named as in model.uvit.

    `pooled` is None for a network without pooled tokens.
    """

    def __init__(self, num_patches, patch_dim, width, depth, num_heads, mlp_ratio=4.0, pooled=None):
        super().__init__()
        shape, half = (width, num_heads, mlp_ratio), range(depth // 2)
        self.patch_embed = nn.Linear(patch_dim, width)
        self.position = nn.Parameter(torch.empty(1 + num_patches, width))
        self.in_blocks = nn.ModuleList(Block(*shape, has_skip=False) for _ in half)
        self.mid_block = Block(*shape, has_skip=False)
        self.out_blocks = nn.ModuleList(Block(*shape, has_skip=True) for _ in half)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.output = nn.Linear(width, patch_dim)
        self.pooled = pooled
        for param in self.parameters():
            if param.ndim == 2:
                nn.init.trunc_normal_(param, std=0.02)

    def forward(self, x_BVP, t_B, visible_BV=None, x_BGP=None, pooled_BG=None):
        """The outputs, float32 [B, V, P] of patches and [B, G, P] of pooled tokens (None without).

        Given are the noisy values of both, timesteps [B], and the ids of both.
        """
        x_BVD = self.patch_embed(x_BVP.to(self.patch_embed.weight.dtype))
        dtype = x_BVD.dtype  # of all tokens and the residual stream: bf16 under autocast
        # Gathered in the table's own dtype, so its gradient is summed in float32.
        position = self.position[1:] if visible_BV is None else self.position[1 + visible_BV]
        time_BD = timestep_embedding(t_B, self.position.shape[1]) + self.position[0]
        parts = [time_BD[:, None].to(dtype), (x_BVD + position).to(dtype)]
        if pooled_BG is not None:
            parts.append(self.pooled.embed(x_BGP, pooled_BG, self.position[1:]).to(dtype))
        x_BLD = torch.cat(parts, dim=1)
        skips = []
        for block in self.in_blocks:
            x_BLD = block(x_BLD)
            skips.append(x_BLD)
        x_BLD = self.mid_block(x_BLD)
        for block in self.out_blocks:
            x_BLD = block(x_BLD, skips.pop())
        end = 1 + x_BVP.shape[1]
        out_BVP = self.output(self.norm(x_BLD[:, 1:end])).float()
        return out_BVP, None if pooled_BG is None else self.pooled.predict(x_BLD[:, end:])


def timestep_embedding(t_B, width):
    """Sinusoids of the timestep, cosines first, float32 [B, width] for an even width."""
    half = width // 2
    steps = torch.arange(half, device=t_B.device, dtype=torch.float32)
    angles = t_B[:, None].float() * torch.exp(-math.log(10000.0) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def make_model(config) -> UViT:
    """The network of a config; ValueError for a field that this peer does not implement."""
    extras = ("qkv_bias", "mlp_time_embed", "num_classes", "dropout")
    refused = [f"model.{name}" for name in extras if config.model[name]]
    refused += ["model.remat"] * (config.model.remat != "none")
    refused += ["data.flip"] * config.data.flip + ["crop masks"] * (config.mask.kind == "crop")
    refused += ["optim.accumulate_steps"] * (config.optim.accumulate_steps > 1)
    if refused:
        raise ValueError(f"the PyTorch peer does not have {', '.join(refused)}; unset them")
    grid = grid_shape(config.data.image_size, config.model.patch_size)
    patch_dim = patches.patch_dim(config.model.patch_size, config.data.channels)
    width, depth, num_heads = dimensions(config.model)
    pooled = None
    if config.mask.hidden == "pool":
        pooled = Pooled(grid, config.mask.pool_size, patch_dim, width)
    sizes = grid[0] * grid[1], patch_dim, width, depth, num_heads, config.model.mlp_ratio
    return UViT(*sizes, pooled)
