"""Claim: which mask to pre-train with (the CelebA 64 ablation of arXiv 2306.11363).

The argument is the mask and the share hidden: patch, block2, block4, block8 (blocks of so many
patches squared) or crop (one window stays visible), each with 0.1, 0.5 and 0.9. U-ViT-S, patch 4,
256 patches. Whole blocks are hidden, and their number is rounded down: block8,0.9 hides 3 of 4, and
there is no block8,0.1, which would hide none. block2,0.9 is configs/pretrain_celeba64.py:paper.

From the paper's recipe: network, masks, shares, batch 256, learning rate 2e-4 without warm-up or
clipping, linear schedule, no flips, 200k steps. Ours: the sides of crop's windows, 15, 11 and 5 of
16 patches, which are nearest to the shares (12, 53 and 90 % are hidden).

Prepare:  python -m maskdm_jax.data.prepare --images FOLDER --name celeba64 --size 64
Command:  python main.py --config=configs/ablation_celeba64.py:block4,0.9 --workdir=W1
          then stage 2 of each, and the baseline without stage 1:
          python main.py --config=configs/finetune_celeba64.py:paper --workdir=W2
            --config.init.path=W1
          python main.py --config=configs/scratch_celeba64.py:paper --workdir=W
Device:   one GPU; not measured yet
Expected: initial weights for configs/finetune_celeba64.py:paper; score: not measured yet
"""

from configs import pretrain_celeba64

CROP_SIZES = {"0.1": 15, "0.5": 11, "0.9": 5}
ARGUMENTS = tuple(
    f"{mask},{share}"
    for mask in ("patch", "block2", "block4", "block8", "crop")
    for share in CROP_SIZES
    if (mask, share) != ("block8", "0.1")
)


def get_config(argument):
    mask, share = argument.split(",")
    config = pretrain_celeba64.get_config("paper")
    config.mask.kind = mask.rstrip("248")
    if mask == "crop":
        config.mask.crop_size = CROP_SIZES[share]
    else:
        config.mask.ratio = float(share)
    if config.mask.kind == "block":
        config.mask.block_size = int(mask.removeprefix("block"))
    return config
