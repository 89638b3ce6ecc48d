"""LSUN Church at 256x256 (arXiv 2306.11363): masked pre-training, then whole images.

The argument is the stage: pretrain or finetune. U-ViT-B, patch 4.

From the paper's recipe, for finetune: batch 64, learning rate 1e-4 after 5k steps of warm-up,
clipping at 1, linear schedule, flips. Ours, since the sources at hand do not give them: the 550k
steps of configs/finetune_celebahq.py:paper, and the whole of pretrain, which is
configs/pretrain_celebahq.py:paper with finetune's schedule and flips.

Prepare:  download and unpack LSUN's lmdb, see docs/data.md; it needs maskdm_jax[lmdb]
Command:  python main.py --config=configs/lsun_church.py:pretrain --workdir=W1
          python main.py --config=configs/lsun_church.py:finetune --workdir=W2
            --config.init.path=W1
Device:   one data-centre GPU; not measured yet
Expected: score: not measured yet
"""

from configs import finetune_celebahq, pretrain_celebahq

ARGUMENTS = ("pretrain", "finetune")


def get_config(stage):
    file = {"pretrain": pretrain_celebahq, "finetune": finetune_celebahq}[stage]
    config = file.get_config("paper")
    config.data.name = "church_outdoor_train_lmdb"
    config.data.crop = "center"
    config.data.flip = True
    config.diffusion.schedule = "linear"
    config.eval.heldout_split = ""  # the lmdb is one split
    if stage == "finetune":
        config.optim.lr_peak = 1e-4
        config.train.batch_size = 64
    return config
