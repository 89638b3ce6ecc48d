"""The baseline at 64x64: whole faces from fresh weights (paper: CelebA ablation).

Compare at equal total cost, pre-training included: as set here, this run costs more than both
stages together.

Command:  python main.py --config=configs/scratch_celeba64.py --workdir=W
Device:   one GPU; 2.5 h on an H200 at the bare step's 5,608 images/s (at batch 256, with 15 GiB)
Expected: score: not measured yet
"""

from configs import finetune_celeba64


def get_config():
    config = finetune_celeba64.get_config()
    config.train.num_steps = 400_000
    return config
