"""Claim: whole points of a 2-D swiss roll, from weights that saw one coordinate at a time.

Command:  python main.py --config=configs/finetune_swiss_roll.py --workdir=W2 --config.init.path=W1
          where W1 is the --workdir of configs/pretrain_swiss_roll.py
Device:   2 CPU cores, a minute; `python -m studies.swiss_roll --out=DIR` runs and draws all
Expected: see docs/study.md
"""

from configs import pretrain_swiss_roll


def get_config():
    config = pretrain_swiss_roll.get_config()
    config.mask.kind = "none"
    config.optim.lr_schedule = "cosine"
    config.train.num_steps = 2_000
    return config
