"""Claim: faces at 256x256 of one large set, as a start for another, small set (arXiv 2306.11363).

U-ViT-S, patch 4, 4x4 blocks, 90 % hidden: 417 tokens instead of 4097.

All values are of the paper's recipe: batch 256, learning rate 2e-4 without warm-up, clipping at 1,
cosine schedule, no flips, 200k steps.

Prepare:  python -m maskdm_jax.data.prepare --images FOLDER --name vggface2 --size 256
          where FOLDER holds VGGFace2's train and test; the set is withdrawn, see docs/data.md
Command:  python main.py --config=configs/pretrain_vggface2.py --workdir=W1
Device:   one GPU; not measured yet
Expected: initial weights for configs/transfer_celebahq.py; score: not measured yet
"""

from configs import pretrain_celebahq


def get_config():
    config = pretrain_celebahq.get_config("paper")
    config.data.name = "vggface2"
    config.data.cache = "none"  # millions of images: decoded, they fill some 600 GB
    config.model.size = "S"
    return config
