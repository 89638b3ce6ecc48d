"""ImageNet at 64x64 with its 1,000 classes: masked pre-training, then whole images.

The argument is the stage: pretrain or finetune. U-ViT-B, patch 4, 2x2 blocks, 90 % hidden: 30
tokens instead of 258.

All is ours; the sources at hand give no recipe of the paper for this set. It is the recommended
recipe of configs/pretrain_celeba64.py and configs/finetune_celeba64.py with another network, the
classes (hidden in 10 % of the examples, for guidance), uniform noise levels and four times the
updates. None of it was measured on these images.

Prepare:  tfds build imagenet_resized/64x64 --file_format=array_record
          after pip install 'maskdm_jax[prepare]', see docs/data.md
Command:  python main.py --config=configs/imagenet64.py:pretrain --workdir=W1
          python main.py --config=configs/imagenet64.py:finetune --workdir=W2
            --config.init.path=W1
          python main.py --config=configs/imagenet64.py:finetune --workdir=W2 --mode=evaluate
            --config.sample.guidance_scale=1.5
Device:   one data-centre GPU; not measured yet
Expected: score: not measured yet
"""

from configs import finetune_celeba64, pretrain_celeba64

ARGUMENTS = ("pretrain", "finetune")


def get_config(stage):
    file = {"pretrain": pretrain_celeba64, "finetune": finetune_celeba64}[stage]
    config = file.get_config("ours")
    config.data.name = "imagenet_resized/64x64"
    config.data.cache = "host"
    config.model.size = "B"
    config.diffusion.draw = "uniform"
    config.model.num_classes = 1000
    config.train.num_steps *= 4
    config.eval.heldout_split = "validation"
    return config
