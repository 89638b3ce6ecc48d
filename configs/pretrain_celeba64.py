"""Claim: faces at 64x64 learnt from a tenth of each image (CelebA ablation of arXiv 2306.11363).

U-ViT-S, patch 4, 2x2 blocks, 90 % hidden: 29 tokens instead of 257.

Prepare:  python -m maskdm_jax.data.prepare --images FOLDER --name celeba64 --size 64
Command:  python main.py --config=configs/pretrain_celeba64.py --workdir=W1
          or --config=configs/pretrain_celeba64.py:paper for the paper's recipe, in stage 2 too
Device:   one GPU, 7.1 GiB at batch 1024; on an H200 at the bare step's 50,400 images/s (at that
          batch) 0.9 h (paper: 0.3 h)
Expected: initial weights for configs/finetune_celeba64.py; score: not measured yet

|                           | ours                                  | paper                        |
| ------------------------- | ------------------------------------- | ---------------------------- |
| network's output, noise   | v, shifted cosine (here: cosine)      | eps, linear                  |
| stage 1: ln(signal/noise) | normal, mean 1.4, deviation 1.6       | uniform t                    |
| stage 2: ln(signal/noise) | normal, mean 0.2, deviation 1.4       | uniform t                    |
| optimizer, flips          | Muon and AdamW (b1 0.9), yes          | AdamW (b1 0.99), no          |
| gradient norm clipped at  | 1                                     | not                          |
| stage 1: updates, batch   | 165,000 of 1,024                      | 200,000 of 256               |
| stage 1: learning rate    | 4e-4, warm-up 2,000, cosine to 1.2e-4 | 2e-4, constant               |
| stage 2: updates, batch   | 49,000 of 256                         | 200,000 of 128               |
| stage 2: learning rate    | 4e-4, warm-up 2,000, cosine to 0      | 2e-4, constant               |
| both stages on that H200  | 1.55 h, of which 60 % are stage 1     | 1.55 h, of which 18 %        |

The hours assume AdamW and the images/s of batches 1,024 and 256; the paper's smaller batches may be
slower, and Muon adds to each update.

Measured at this size, apart from rates: one run of 2,000 updates in each stage (docs/scores.md)
with our output, noise, b1, flips, clipping and batches, but AdamW alone, a peak of 8e-4, a warm-up
of 100, no decay in stage 1, and another share of the time: FID-768 0.155, against 0.052 of held-out
images. And in the study, on other faces, runs with Muon, our levels, shares and blocks, a masked
batch of 1,024 and a peak of 1.6e-3, against whole images alone with such levels and a peak of
3.2e-3. With 64 whole images: 0.0876 after 96 s against 0.0868 after 120 s (two seeds each); with
128: 0.0756 against 0.0773 after 120 s (one seed). No run of the whole recipe, and none of the
paper's to compare with.

Carried over from the study at 128x128 (docs/study.md, arm drop_60_b32_muon_lr16_levels: U-ViT-S,
300 s of training on an H100, one seed): Muon, stage 1's 60 % of the time, its decay to 0.3 of the
peak, and the noise levels of each stage, moved by ln 2 as the schedule is. Our batches give an
update about as many tokens as 256 and 64 do there (the arm has 256 and 32); its blocks are of 4x4
patches. It reached FID-768 0.128, with uniform levels 0.169 (three seeds); whole images alone, in
the better of two batches, 0.156 with the levels of both stages in turn and 0.183 with uniform ones
(one seed each).

Our choice, measured nowhere: the warm-up of 2,000 and the numbers of updates, with the peak of 4e-4
for so many; the study's is 1.6e-3. A rate that suits minutes may be too high for hours, and over
whole images with the same levels the gain in time fell from 1.64 times at 300 s to 1.43 at 600 s
(one H200; on an H100 it is 1.52 at 300 s); with the best settings found for each it is 1.69 and
1.98 (one H100). In transfer at 64x64 pre-training with a masked start is little better than on
whole images alone: 0.081 and 0.084 with the levels of both stages (two seeds each), 0.100 and 0.102
with uniform ones (one).

For a shorter run, divide the updates of both stages, and the warm-ups, by one number.
"""

from maskdm_jax.config import default_config

RECIPES = {
    "ours": {
        "data.flip": True,
        "diffusion.prediction": "v",
        "diffusion.schedule": "shifted_cosine",
        "diffusion.draw": "logit_normal",
        "diffusion.draw_mean": 1.4,
        "diffusion.draw_std": 1.6,
        "optim.name": "muon",
        "optim.lr_peak": 4e-4,
        "optim.warmup_steps": 2_000,
        "optim.lr_schedule": "cosine",
        "optim.lr_end": 0.3,
        "optim.b1": 0.9,
        "optim.clip_norm": 1.0,
        "train.num_steps": 165_000,
        "train.batch_size": 1024,
    },
    "paper": {
        "diffusion.prediction": "eps",
        "diffusion.schedule": "linear",
        "optim.lr_peak": 2e-4,
        "train.num_steps": 200_000,
        "train.batch_size": 256,
    },
}
ARGUMENTS = tuple(RECIPES)


def get_config(recipe: str = "ours"):
    config = default_config()
    config.data.name = "celeba64"
    config.data.image_size = (64, 64)
    config.data.cache = "device"
    config.model.size = "S"
    config.mask.kind = "block"
    config.mask.ratio = 0.9
    config.mask.block_size = 2
    config.train.sample_every_steps = 0  # a masked model has not seen a whole image
    config.checkpoint.every_steps = 5_000
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
