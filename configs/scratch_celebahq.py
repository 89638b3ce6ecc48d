"""The baseline at 256x256: whole faces from fresh weights (paper: 940k steps, 120 h on 8 V100).

Ours takes as long as both stages of configs/pretrain_celebahq.py and configs/finetune_celebahq.py
together, at the rates of their bare steps on an H200. The paper's takes longer than its two stages:
compare at equal total cost, pre-training included.

Command:  python main.py --config=configs/scratch_celebahq.py --workdir=W
          or --config=configs/scratch_celebahq.py:paper for the paper's recipe
Device:   as for configs/finetune_celebahq.py, but on an H200 58 h (paper: 86 h)
Expected: score: not measured yet

Ours has the settings of our stage 2, but the noise levels of both stages, each for its share of the
updates. It was not measured at this size. In the study at 128x128 (docs/study.md) these levels and
Muon gave the best of scratch's runs, with a peak of 3.2e-3 and a batch of 64: FID-768 0.161 after
300 s and 0.118 after 600 s. With a mask in the first phase it was 0.132 and 0.105. Other levels, or
EDM, need --config.phases="()" too.
"""

from configs import finetune_celebahq

RECIPES = {
    "ours": {
        "phases": (
            (
                0.6,
                {"diffusion.draw_mean": 0.0, "diffusion.draw_std": 1.6, "optim.lr_end": 0.3},
            ),
            (0.4, {}),
        ),
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
