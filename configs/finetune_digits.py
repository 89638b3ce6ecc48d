"""Claim: whole digits, from weights that never saw a whole digit.

Command:  python main.py --config=configs/finetune_digits.py --workdir=W2 --config.init.path=W1
          where W1 is the --workdir of configs/pretrain_digits.py
Device:   2 CPU cores, about 2.5 minutes (`make demo` runs it)
Expected: loss about 0.18 at the end; swd about 47 with --mode=evaluate (640 real digits against 640
          other real ones: 27 to 31)
"""

from configs import pretrain_digits


def get_config():
    config = pretrain_digits.get_config()
    config.mask.kind = "none"
    config.optim.lr_schedule = "cosine"
    config.train.num_steps = 2200
    config.train.sample_every_steps = 550
    config.sample.sampler = "ddpm"
    config.sample.steps = 50
    config.sample.guidance_scale = 1.5
    config.eval.num = 640  # as many of each class
    config.eval.metrics = ("swd",)  # Inception was not made for 8x8 pixels
    config.eval.heldout_split = ""
    return config
