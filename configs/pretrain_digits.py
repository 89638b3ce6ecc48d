"""Claim: masked pre-training runs anywhere. scikit-learn's 8x8 digits, half of the patches hidden.

Command:  python main.py --config=configs/pretrain_digits.py --workdir=W1
Device:   2 CPU cores, about half a minute (`make demo` runs it)
Expected: loss over the visible half about 0.23 at the end
"""

from maskdm_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = "digits"
    config.data.image_size = (8, 8)
    config.data.channels = 1
    config.data.cache = "device"
    config.model.size = "S"
    config.model.width = 128
    config.model.depth = 5
    config.model.num_heads = 4
    config.model.patch_size = 2
    config.model.num_classes = 10
    config.model.mlp_time_embed = True
    config.model.dtype = "float32"
    config.mask.kind = "patch"
    config.mask.ratio = 0.5
    config.optim.lr_peak = 2e-3
    config.optim.b1 = 0.9  # 0.99, the recipes' value, starts too slowly for so few steps
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0
    config.train.num_steps = 1000
    config.train.batch_size = 32
    config.train.log_every_steps = 20
    config.train.sample_every_steps = 0
    config.checkpoint.every_steps = 400
    return config
