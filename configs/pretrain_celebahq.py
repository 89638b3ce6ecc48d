"""Claim: faces at 256x256 learnt from a tenth of each image (arXiv 2306.11363, table 2's start).

U-ViT-B, patch 4, 4x4 blocks, 90 % hidden: 417 tokens instead of 4097, 16.5 times fewer FLOPs.

Prepare:  python -m maskdm_jax.data.prepare --images FOLDER --name celebahq --size 256
Command:  python main.py --config=configs/pretrain_celebahq.py --workdir=W1
Device:   one GPU, 35 to 38 GiB; 7.9 h on an H200 at the bare step's 1,790 images/s
Expected: initial weights for configs/finetune_celebahq.py; score: not measured yet
"""

from maskdm_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = "celebahq"
    config.data.image_size = (256, 256)
    config.data.cache = "host"
    config.model.size = "B"
    config.mask.kind = "block"
    config.mask.ratio = 0.9
    config.mask.block_size = 4
    config.optim.lr_peak = 2e-4
    config.optim.clip_norm = 1.0
    config.train.num_steps = 200_000
    config.train.batch_size = 256
    config.train.sample_every_steps = 0  # a masked model has not seen a whole image
    config.checkpoint.every_steps = 5_000
    return config
