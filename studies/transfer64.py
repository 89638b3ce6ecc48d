"""What part of a transfer is due to masking? Faces of 64x64 pixels, 256 patches.

The model is wanted for a tenth of one set of faces (900 images of celeba64), and another set
(11,634 images of lfw64) is there to pre-train on, for 80 % of the seconds: with 90 % of the blocks
dropped, on whole images, or first the one and then the other. All of them have the same peak and
decay to 0.3 of it, and the fine-tuning starts from their raw weights. Scratch trains on the 900
alone, for the seconds of all (piece `scratch`) or for those of the fine-tuning (`scratch_short`,
best with an --out of its own, since the page compares with the best scratch of any seconds). Scores
are to all 8,997 training images of celeba64. A run:

    python -m studies.compute_matched --study=studies/transfer64.py --piece=transfer --out=DIR \
        --config.data.dir=DATA --config.eval.inception_weights=FILE
"""

from studies import faces128
from studies.arms import runs

OTHER_SET = {"data.name": "lfw64.zip", "data.fraction": 1.0, "optim.lr_end": 0.3}
MASKED = {"mask.kind": "block", "train.batch_size": 1024}


def get_config():
    config = faces128.get_config()
    config.data.name = "celeba64.zip"
    config.data.fraction = 0.1
    config.data.image_size = (64, 64)
    config.mask.block_size = 2
    config.optim.name = "muon"
    config.optim.lr_peak = 1.6e-3
    config.train.batch_size = 128
    config.sample.batch_size = 512
    return config


# How the other set is trained on.
PRE_TRAINED = {
    "masked": MASKED,
    "dense": {},
    "both": {"phases": ((0.6, MASKED), (0.4, {}))},
}
# The peak of the fine-tuning, or of scratch: 4e-4, 16e-4, 32e-4.
ARMS = {
    f"{name}_lr{rate}": [(0.8, OTHER_SET | first), (0.2, {"optim.lr_peak": rate / 1e4})]
    for name, first in PRE_TRAINED.items()
    for rate in (4, 16)
} | {f"scratch_lr{rate}": faces128.whole(optim__lr_peak=rate / 1e4) for rate in (16, 32)}
# The noise levels of faces128's drop_60_b32_muon_lr16_levels, moved by ln 2 as the schedule is.
EARLY, LATE = faces128.drawn(1.4, 1.6), faces128.drawn(0.2, 1.4)
ARMS |= {
    f"{name}_lr4_levels": [(0.8, OTHER_SET | first), (0.2, {"optim.lr_peak": 4e-4} | LATE)]
    for name, first in (
        ("masked", MASKED | EARLY),
        ("dense", {"phases": ((0.6, EARLY), (0.4, LATE))}),
        ("both", {"phases": ((0.6, MASKED | EARLY), (0.4, LATE))}),
    )
} | {
    f"scratch_lr32_levels{what}": faces128.whole(
        optim__lr_peak=3.2e-3, phases=((0.6, EARLY | first), (0.4, LATE))
    )
    for what, first in (("", {"optim.lr_end": 0.3}), ("_end0", {}))
}

PIECES = {
    "transfer": runs([f"{name}_lr{rate}" for rate in (4, 16) for name in PRE_TRAINED], 150),
    "levels": runs([f"{name}_lr4_levels" for name in PRE_TRAINED] + ["scratch_lr32_levels"], 150),
    "scratch": runs(["scratch_lr16", "scratch_lr32"], 150),
    "scratch_short": runs(["scratch_lr16", "scratch_lr32"], 30),
}
