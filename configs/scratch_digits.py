"""The baseline: whole digits with no pre-training, in as many steps as fine-tuning.

Compare at equal total cost, pre-training included: as set here, this run costs less.

Command:  python main.py --config=configs/scratch_digits.py --workdir=W
Device:   2 CPU cores, about 3 minutes
Expected: loss: not measured yet
"""

from configs import finetune_digits


def get_config():
    config = finetune_digits.get_config()
    config.optim.lr_peak = 2e-3
    return config
