"""A textbook U-ViT in PyTorch, under the names of the official checkpoints."""

import math

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, num_heads, qkv_bias):
        super().__init__()
        self.num_heads = num_heads
        if qkv_bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD):
        q, k, v = self.qkv(x_BLD).chunk(3, dim=-1)
        if hasattr(self, "q_bias"):
            q, v = q + self.q_bias, v + self.v_bias
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, num_heads, qkv_bias, has_skip=False):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, num_heads, qkv_bias)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)
        if has_skip:
            self.skip_linear = nn.Linear(2 * width, width)

    def forward(self, x, skip=None):
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, width, num_skips, num_heads, patch, num_patches, num_classes, options):
        super().__init__()
        qkv_bias, mlp_time_embed = options
        num_extra = 2 if num_classes else 1
        if num_classes:
            self.uncond_embed = nn.Parameter(torch.zeros(1, width))
        self.encoder_pos_embed = nn.Parameter(torch.zeros(1, num_extra + num_patches, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, width)
        self.time_embed = nn.Identity()
        if mlp_time_embed:
            layers = nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
            self.time_embed = nn.Sequential(*layers)
        block = width, num_heads, qkv_bias
        self.in_blocks = nn.ModuleList(Block(*block) for _ in range(num_skips))
        self.mid_block = Block(*block)
        self.out_blocks = nn.ModuleList(Block(*block, has_skip=True) for _ in range(num_skips))
        self.norm = nn.LayerNorm(width)

    def forward(self, image_BCHW, t_B, label_B):
        patches_BND = self.patch_embed.proj(image_BCHW).flatten(2).transpose(1, 2)
        half = patches_BND.shape[-1] // 2
        angles = t_B[:, None] * 10000 ** (-torch.arange(half) / half)
        tokens = [self.time_embed(torch.cat([angles.cos(), angles.sin()], -1))[:, None]]
        if hasattr(self, "label_emb"):
            rows = torch.cat([self.label_emb.weight, self.uncond_embed])
            tokens.insert(0, rows[label_B][:, None])
        x = torch.cat([*tokens, patches_BND], 1) + self.encoder_pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.norm(x)[:, len(tokens) :]


class UViT(nn.Module):
    """eps [B, 3, H, W] of noisy square images; a label of `num_classes` is "no class"."""

    def __init__(self, width=32, num_skips=2, num_heads=4, patch=4, grid=4, num_classes=0, *,
                 qkv_bias=False, mlp_time_embed=False):  # fmt: skip
        super().__init__()
        self.shape = (grid, grid, patch, patch, 3)
        options = qkv_bias, mlp_time_embed
        self.encoder = Encoder(
            width, num_skips, num_heads, patch, grid * grid, num_classes, options
        )
        self.encoder_to_output = nn.Linear(width, 3 * patch * patch)

    def forward(self, image_BCHW, t_B, label_B=None):
        out_BNP = self.encoder_to_output(self.encoder(image_BCHW, t_B, label_B))
        rows, cols, p, q, channels = self.shape
        out = out_BNP.reshape(-1, *self.shape).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(-1, channels, rows * p, cols * q)


class Diffusion(nn.Module):
    """A network, and the noise schedule's tables as buffers of T numbers."""

    def __init__(self, network, tables):
        super().__init__()
        for name, values in tables.items():
            self.register_buffer(name, torch.tensor(values))
        self.model = network


class Average(nn.Module):
    """A network, its average, and the average's count."""

    def __init__(self, online_model, ema_model):
        super().__init__()
        self.online_model, self.ema_model = online_model, ema_model
        self.register_buffer("initted", torch.tensor([False]))
        self.register_buffer("step", torch.tensor([0]))
