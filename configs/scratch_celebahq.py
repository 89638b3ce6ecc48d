"""The baseline at 256x256: whole faces from fresh weights (paper: 940k steps, 120 h on 8 V100).

Ours takes as long as both stages of configs/pretrain_celebahq.py and configs/finetune_celebahq.py
together, at the rates of their bare steps on an H200. The paper's takes longer than its two stages:
compare at equal total cost, pre-training included.

Command:  python main.py --config=configs/scratch_celebahq.py --workdir=W
          or --config=configs/scratch_celebahq.py:paper for the paper's recipe
Device:   as for configs/finetune_celebahq.py, but on an H200 58 h (paper: 86 h)
Expected: score: not measured yet

Ours has the settings of our stage 2 in two phases, 60 and 40 % of the updates: the noise levels of
stage 1, down to 0.3 of the peak, then those of stage 2, down to 0, each with a warm-up of its own.
It was not measured at this size, and the peak of 4e-4 is our choice. In the study at 128x128
(docs/study.md; one H200, one seed), with a peak of 3.2e-3 and a batch of 64, such phases gave
FID-768 0.161 after 300 s and 0.118 after 600 s. The arm with a masked first phase, at its own peak
and batches, has 0.132 and 0.105. With levels further apart, and the optimizer's moments kept for
the last phase, scratch has 0.142 and 0.120 (one H100; three seeds each); that is not carried
over, as it costs accuracy at little noise. At 4,097 tokens, as here, 600 s gave 0.332 with our
levels and 0.320 with uniform ones; the held-out loss is better with ours, 0.0606 against 0.0641
(one H100, one seed each).

Other levels, or EDM, need --config.phases="()" too.
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
