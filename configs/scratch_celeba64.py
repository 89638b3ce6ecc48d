"""The baseline at 64x64: whole faces from fresh weights (paper: CelebA ablation).

Ours takes as long as both stages of configs/pretrain_celeba64.py and configs/finetune_celeba64.py
together, at the rates of their bare steps on an H200. The paper's takes longer than its two stages:
compare at equal total cost, pre-training included.

Command:  python main.py --config=configs/scratch_celeba64.py --workdir=W
          or --config=configs/scratch_celeba64.py:paper for the paper's recipe
Device:   as for configs/finetune_celeba64.py, but on an H200 1.55 h (paper: 2.5 h)
Expected: score: not measured yet

Ours has the settings of our stage 2 and was not measured at this size. In the study at 128x128
(docs/study.md) Muon, a batch of 32 and the noise levels of stage 2 gave the best of scratch's runs
of 300 s, with a learning rate of 3.2e-3; with uniform levels, a batch of 64 was as good.
"""

from configs import finetune_celeba64

RECIPES = {
    "ours": {
        "train.num_steps": 122_000,
    },
    "paper": {
        "train.num_steps": 400_000,
    },
}
ARGUMENTS = tuple(RECIPES)


def get_config(recipe: str = "ours"):
    config = finetune_celeba64.get_config(recipe)
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
