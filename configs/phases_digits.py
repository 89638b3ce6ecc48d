"""Claim: masked pre-training, then whole digits, in one run: one config, one command, one workdir.

Its phases are configs/pretrain_digits.py and configs/finetune_digits.py.

Command:  python main.py --config=configs/phases_digits.py --workdir=W
Device:   2 CPU cores, about 5 minutes
Expected: as for configs/finetune_digits.py; not measured yet
"""

from configs import finetune_digits


def get_config():
    config = finetune_digits.get_config()
    masked = {"mask.kind": "patch", "optim.lr_schedule": "constant"}
    config.phases = ((1000, masked), (2200, {}))
    config.train.num_steps = 1000 + 2200
    config.train.sample_every_steps = 1600  # once in the second phase, and at its end
    return config
