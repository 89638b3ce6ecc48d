"""Claim: faces at 64x64 learnt from a tenth of each image (CelebA ablation of arXiv 2306.11363).

U-ViT-S, patch 4, 2x2 blocks, 90 % hidden: 29 tokens instead of 257.

Prepare:  python -m maskdm_jax.data.prepare --images FOLDER --name celeba64 --size 64
Command:  python main.py --config=configs/pretrain_celeba64.py --workdir=W1
Device:   one GPU; 0.3 h on an H200 at the bare step's 50,400 images/s (batch 1024, 7.1 GiB)
Expected: initial weights for configs/finetune_celeba64.py; score: not measured yet
"""

from maskdm_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = "celeba64"
    config.data.image_size = (64, 64)
    config.data.cache = "device"
    config.model.size = "S"
    config.mask.kind = "block"
    config.mask.ratio = 0.9
    config.mask.block_size = 2
    config.diffusion.schedule = "linear"
    config.optim.lr_peak = 2e-4
    config.train.num_steps = 200_000
    config.train.batch_size = 256
    config.train.sample_every_steps = 0  # a masked model has not seen a whole image
    config.checkpoint.every_steps = 5_000
    return config
