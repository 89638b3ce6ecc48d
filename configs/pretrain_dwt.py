"""Claim: 256x256 or 512x512 images learnt by the large model on Haar coefficients, masked.

The paper's DWT model (arXiv 2306.11363): an L network on the 12 channels of a one-level Haar
transform, pre-trained with 70 % of the patches hidden for 200k steps.

From the paper: the size L, the transform, 70 %, 200k steps.
Ours, since the sources at hand do not give them: patches of 8 pixels (4x4 places of the 12
channels), 2x2 blocks, and what configs/pretrain_celebahq.py:paper has: the cosine schedule, batch
256, learning rate 2e-4, clipping at 1. 512x512 is the same with 4 times the patches. 256: 309
tokens instead of 1,025; 512: 1,233 instead of 4,097.

Prepare:  python -m maskdm_jax.data.prepare --images FOLDER --name faces256 --size 256
Command:  python main.py --config=configs/pretrain_dwt.py:256 --workdir=W1
Device:   not measured yet; for 512, 16 chips of TPU v5e need --config.model.remat=blocks
Expected: initial weights for configs/finetune_dwt.py; score: not measured yet
"""

from maskdm_jax.config import default_config

ARGUMENTS = ("256", "512")


def get_config(argument):
    config = default_config()
    config.data.name = f"faces{argument}"
    config.data.image_size = (int(argument), int(argument))
    config.model.size = "L"
    config.model.wavelet = "haar"
    config.model.patch_size = 8
    config.mask.kind = "block"
    config.mask.ratio = 0.7
    config.mask.block_size = 2
    config.optim.lr_peak = 2e-4
    config.optim.clip_norm = 1.0
    config.train.num_steps = 200_000
    config.train.batch_size = 256
    config.train.sample_every_steps = 0  # a masked model has not seen a whole image
    config.checkpoint.every_steps = 5_000
    return config
