"""The baseline at 64x64: whole faces from fresh weights (paper: CelebA ablation).

Give it the pre-training's cost in extra steps before comparing: only equal total cost is fair.

Command:  python main.py --config=configs/scratch_celeba64.py --workdir=W
Device:   one GPU, 9.2 GiB; 4.2 h on an H200 at 3,430 images/s, measured with an older attention
Expected: score: not measured yet
"""

from configs import finetune_celeba64


def get_config():
    config = finetune_celeba64.get_config()
    config.train.num_steps = 400_000
    return config
