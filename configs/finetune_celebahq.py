"""Claim: CelebA-HQ 256 in pixel space, from masked pre-training (paper: FID 6.27).

Command:  python main.py --config=configs/finetune_celebahq.py --workdir=W2 --config.init.path=W1
          where W1 is the --workdir of configs/pretrain_celebahq.py
Device:   one data-centre GPU; 50 h on an H200 at the bare step's 97.1 images/s (at batch 64, with
          84 to 92 GiB); --config.model.remat=blocks needs less memory
Expected: the paper's FID is 6.27; ours: not measured yet
"""

from configs import pretrain_celebahq


def get_config():
    config = pretrain_celebahq.get_config()
    config.mask.kind = "none"
    config.optim.lr_peak = 1e-5
    config.optim.warmup_steps = 5_000
    config.train.num_steps = 550_000
    config.train.batch_size = 32
    config.train.sample_every_steps = 10_000
    config.sample.batch_size = 32
    return config
