"""Claim: faces at 256x256 from a tenth or a hundredth of CelebA-HQ, with weights of another set.

The argument is the share of CelebA-HQ: 0.1 (3,000 images) or 0.01 (300). In the paper (arXiv
2306.11363), FID after pre-training on VGGFace2 is 46 % better at 0.1 than from fresh weights. Fresh
weights: the same command without --config.init.path.

From the paper's recipe: U-ViT-S, batch 64, learning rate 5e-5 without warm-up or clipping, cosine
schedule, flips. Ours, since the sources at hand do not give them: 50,000 steps, and which images
are taken (docs/data.md, Fractions).

Prepare:  python -m maskdm_jax.data.prepare --images FOLDER --name celebahq --size 256
Command:  python main.py --config=configs/transfer_celebahq.py:0.1 --workdir=W2
            --config.init.path=W1
          where W1 is the --workdir of configs/pretrain_vggface2.py
Device:   one data-centre GPU; not measured yet
Expected: score: not measured yet
"""

from configs import finetune_celebahq

ARGUMENTS = ("0.1", "0.01")


def get_config(argument):
    config = finetune_celebahq.get_config("paper")
    config.data.fraction = float(argument)
    config.data.flip = True
    config.model.size = "S"
    config.optim.lr_peak = 5e-5
    config.optim.warmup_steps = 0
    config.optim.clip_norm = 0.0
    config.train.num_steps = 50_000
    config.train.batch_size = 64
    return config
