"""The baseline at 256x256: whole faces from fresh weights (paper: 940k steps, 120 h on 8 V100).

Ours takes as long as both stages of configs/pretrain_celebahq.py and configs/finetune_celebahq.py
together, at the rates of their bare steps on an H200. The paper's takes longer than its two stages:
compare at equal total cost, pre-training included.

Command:  python main.py --config=configs/scratch_celebahq.py --workdir=W
          or --config=configs/scratch_celebahq.py:paper for the paper's recipe
Device:   as for configs/finetune_celebahq.py, but on an H200 58 h (paper: 86 h)
Expected: score: not measured yet

Ours has the settings of our stage 2 and was not measured at this size. In the study at 128x128
(docs/study.md) Muon, a batch of 32 and the noise levels of stage 2 gave the best of scratch's runs
of 300 s, with a learning rate of 3.2e-3; with uniform levels, a batch of 64 was as good.
"""

from configs import finetune_celebahq

RECIPES = {
    "ours": {
        "train.num_steps": 630_000,
    },
    "paper": {
        "optim.lr_peak": 2e-4,
        "train.num_steps": 940_000,
    },
}
ARGUMENTS = tuple(RECIPES)


def get_config(recipe: str = "ours"):
    config = finetune_celebahq.get_config(recipe)
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
