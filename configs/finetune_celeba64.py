"""Claim: whole 64x64 faces, from masked pre-training (paper: CelebA ablation).

Command:  python main.py --config=configs/finetune_celeba64.py --workdir=W2 --config.init.path=W1
          where W1 is the --workdir of configs/pretrain_celeba64.py
Device:   one GPU; 1.3 h on an H200 at the bare step's 5,608 images/s (at batch 256, with 15 GiB)
Expected: score: not measured yet
"""

from configs import pretrain_celeba64


def get_config():
    config = pretrain_celeba64.get_config()
    config.mask.kind = "none"
    config.train.num_steps = 200_000
    config.train.batch_size = 128
    config.train.sample_every_steps = 10_000
    return config
