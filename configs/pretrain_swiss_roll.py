"""Claim: one coordinate of a point of a 2-D swiss roll at a time (the toy of arXiv 2306.11363).

Each coordinate is a token; one of the two is hidden, so this stage learns the two marginals.

Command:  python main.py --config=configs/pretrain_swiss_roll.py --workdir=W1
Device:   2 CPU cores, half a minute
Expected: initial weights for configs/finetune_swiss_roll.py
"""

from maskdm_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = "swiss_roll"
    config.data.image_size = (1, 2)
    config.data.channels = 1
    config.data.cache = "device"
    config.model.size = "S"
    config.model.width = 64
    config.model.depth = 3
    config.model.num_heads = 2
    config.model.patch_size = 1
    config.model.mlp_time_embed = True
    config.model.dtype = "float32"
    config.mask.kind = "patch"
    config.mask.ratio = 0.5
    config.optim.lr_peak = 2e-3
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0
    config.train.num_steps = 1_000
    config.train.batch_size = 256
    config.train.log_every_steps = 100
    config.train.sample_every_steps = 0  # a masked model has not seen a whole point
    config.checkpoint.every_steps = 1_000
    config.sample.batch_size = 1_000
    config.sample.steps = 100
    return config
