"""The baseline: whole digits with no pre-training.

Compare at equal total cost, pre-training included: `make demo` sets train.num_steps so that its
training takes as long as both stages together. As set here, this run costs less.

Command:  python main.py --config=configs/scratch_digits.py --workdir=W
Device:   2 CPU cores
Expected: loss about 0.19 at the end, swd about 44, in 2,706 steps (one run of `make demo`)
"""

from configs import finetune_digits


def get_config():
    return finetune_digits.get_config()
