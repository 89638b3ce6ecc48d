"""Claim: whole 256x256 or 512x512 images by the large model on Haar coefficients.

From the paper (arXiv 2306.11363): fine-tuning for 550k steps. Ours: all that
configs/finetune_celebahq.py:paper has too, that is batch 32 and a learning rate of 1e-5 after 5k
steps of warm-up, and what configs/pretrain_dwt.py calls ours.

Command:  python main.py --config=configs/finetune_dwt.py:256 --workdir=W2 --config.init.path=W1
          where W1 is the --workdir of configs/pretrain_dwt.py:256
Device:   not measured yet
Expected: score: not measured yet
"""

from configs import pretrain_dwt

ARGUMENTS = pretrain_dwt.ARGUMENTS


def get_config(argument):
    config = pretrain_dwt.get_config(argument)
    config.mask.kind = "none"
    config.optim.lr_peak = 1e-5
    config.optim.warmup_steps = 5_000
    config.train.num_steps = 550_000
    config.train.batch_size = 32
    config.train.sample_every_steps = 10_000
    config.sample.batch_size = 32
    return config
