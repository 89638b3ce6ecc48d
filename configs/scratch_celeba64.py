"""The baseline at 64x64: whole faces from fresh weights (paper: CelebA ablation).

Ours takes as long as both stages of configs/pretrain_celeba64.py and configs/finetune_celeba64.py
together, at the rates of their bare steps on an H200. The paper's takes longer than its two stages:
compare at equal total cost, pre-training included.

Command:  python main.py --config=configs/scratch_celeba64.py --workdir=W
          or --config=configs/scratch_celeba64.py:paper for the paper's recipe
Device:   as for configs/finetune_celeba64.py, but on an H200 1.55 h (paper: 2.5 h)
Expected: score: not measured yet

Ours is in two phases, for the reason that configs/scratch_celebahq.py gives, which also says what
was measured elsewhere. At this size the study has short runs of such phases, on other faces and
with a peak of 3.2e-3: FID-768 0.0868 after 120 s with batch 64 (two seeds), 0.0773 with batch 128,
and 0.0930 with batch 64 and uniform levels.
"""

from configs import finetune_celeba64

RECIPES = {
    "ours": {
        "phases": (
            (
                0.6,
                {"diffusion.draw_mean": 1.4, "diffusion.draw_std": 1.6, "optim.lr_end": 0.3},
            ),
            (0.4, {}),
        ),
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
