"""The baseline: whole points of a 2-D swiss roll with no pre-training, for as long as both stages.

Command:  python main.py --config=configs/scratch_swiss_roll.py --workdir=W
Device:   2 CPU cores, a minute and a half
Expected: see docs/study.md
"""

from configs import finetune_swiss_roll


def get_config():
    config = finetune_swiss_roll.get_config()
    config.train.num_steps = 3_000
    return config
