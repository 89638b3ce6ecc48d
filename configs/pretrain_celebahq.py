"""Claim: faces at 256x256 learnt from a tenth of each image (arXiv 2306.11363, table 2's start).

U-ViT-B, patch 4, 4x4 blocks, 90 % hidden: 417 tokens instead of 4097, 16.5 times fewer FLOPs.

Prepare:  python -m maskdm_jax.data.prepare --images FOLDER --name celebahq --size 256
Command:  python main.py --config=configs/pretrain_celebahq.py --workdir=W1
          or --config=configs/pretrain_celebahq.py:paper for the paper's recipe, in stage 2 too
          or :paper_50, its stage 1 with 50 % hidden, before configs/finetune_celebahq.py:paper
Device:   one GPU, 35 to 38 GiB; on an H200 at the bare step's 1,790 images/s 35 h (paper: 7.9 h)
Expected: initial weights for configs/finetune_celebahq.py; score: not measured yet

|                           | ours                                 | paper                         |
| ------------------------- | ------------------------------------ | ----------------------------- |
| network's output, noise   | v, shifted cosine                    | eps, cosine                   |
| stage 1: ln(signal/noise) | normal, mean 0, deviation 1.6        | uniform t: mean 0, dev. 1.5   |
| stage 2: ln(signal/noise) | normal, mean -1.2, deviation 1.4     | uniform t                     |
| optimizer, flips          | Muon and AdamW (b1 0.9), yes         | AdamW (b1 0.99), no           |
| stage 1: updates, batch   | 880,000 of 256                       | 200,000 of 256                |
| stage 1: learning rate    | 4e-4, warm-up 2,000, cosine to 1.2e-4 | 2e-4, constant               |
| stage 2: updates, batch   | 250,000 of 32                        | 550,000 of 32                 |
| stage 2: learning rate    | 4e-4, warm-up 2,000, cosine to 0     | 1e-5, warm-up 5,000, constant |
| both stages on that H200  | 58 h, of which 60 % are stage 1      | 58 h, of which 14 %           |

paper_50 differs from paper in the share, in its batch of 64 and in a warm-up of 5,000 steps. The
number of its steps, which the sources at hand do not give, is paper's: our choice.

Measured at this size: the rates of the steps alone, with AdamW; Muon adds to each update, and was
not timed here. No score of either recipe, so ours is not shown to be better here.

Carried over from the study at 128x128 (docs/study.md, arm drop_60_b32_muon_lr16_levels: U-ViT-S,
300 s of training on an H100, one seed): Muon, output, noise, b1, flips, clipping, 4x4 blocks,
batches 256 and 32, 60 % of the time in stage 1, a warm-up and a cosine decay in each stage, to 0.3
of the peak and to 0, and the noise levels of each stage, moved by ln 2 as the schedule is. The arm
reached FID-768 0.128, with uniform levels 0.169 (three seeds); whole images alone, in the better of
two batches, 0.156 with the levels of both stages in turn and 0.183 with uniform ones (one seed
each).

Our choice, measured nowhere: the peak of 4e-4, the warm-up of 2,000 and the numbers of updates. The
study has a peak of 1.6e-3, and a warm-up of 200 for some 10,000 updates. A rate that suits minutes
may be too high for days and for a wider network. Over whole images with the same levels, the gain
in time fell from 1.64 times at 300 s to 1.43 at 600 s (one H200; on an H100 it is 1.52 at 300 s);
with the best settings found for each it is 1.69 and 1.98 (one H100; three seeds, but one of the
masked runs of 150 and 600 s). Whether stage 1 pays after hours is not known. At 4,097 tokens, as
here, 600 s gave 0.221 with a stage 1. Without one, the best of four settings has 0.320 (one seed
each), which a stage 1 reaches after 264 s, interpolated: 2.27 times sooner.

Not carried over: levels further apart and kept moments, of those best settings (0.120 at 300 s).
Neither is shown to help alone, and levels further apart cost accuracy at little noise.

For a shorter run, divide the updates of both stages, and the warm-ups, by one number.
"""

from maskdm_jax.config import default_config

RECIPES = {
    "ours": {
        "data.flip": True,
        "diffusion.prediction": "v",
        "diffusion.schedule": "shifted_cosine",
        "diffusion.draw": "logit_normal",
        "diffusion.draw_mean": 0.0,
        "diffusion.draw_std": 1.6,
        "optim.name": "muon",
        "optim.lr_peak": 4e-4,
        "optim.warmup_steps": 2_000,
        "optim.lr_schedule": "cosine",
        "optim.lr_end": 0.3,
        "optim.b1": 0.9,
        "train.num_steps": 880_000,
    },
    "paper": {
        "diffusion.prediction": "eps",
        "diffusion.schedule": "cosine",
        "optim.lr_peak": 2e-4,
        "train.num_steps": 200_000,
    },
}
RECIPES["paper_50"] = RECIPES["paper"] | {
    "mask.ratio": 0.5,
    "optim.warmup_steps": 5_000,
    "train.batch_size": 64,
}
ARGUMENTS = tuple(RECIPES)


def get_config(recipe: str = "ours"):
    config = default_config()
    config.data.name = "celebahq"
    config.data.image_size = (256, 256)
    config.data.cache = "host"
    config.model.size = "B"
    config.mask.kind = "block"
    config.mask.ratio = 0.9
    config.mask.block_size = 4
    config.optim.clip_norm = 1.0
    config.train.batch_size = 256
    config.train.sample_every_steps = 0  # a masked model has not seen a whole image
    config.checkpoint.every_steps = 5_000
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
