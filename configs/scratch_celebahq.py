"""The baseline at 256x256: whole faces from fresh weights (paper: 940k steps, 120 h on 8 V100).

Compare at equal total cost, pre-training included: as set here, this run costs more than both
stages together.

Command:  python main.py --config=configs/scratch_celebahq.py --workdir=W
Device:   as for configs/finetune_celebahq.py
Expected: score: not measured yet
"""

from configs import finetune_celebahq


def get_config():
    config = finetune_celebahq.get_config()
    config.optim.lr_peak = 2e-4
    config.train.num_steps = 940_000
    return config
