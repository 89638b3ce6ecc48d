"""Does masking pay at 256 patches? The faces of faces128.py at 64x64 pixels, patch 4.

Attention is a small part of the cost here, so masking saves less than with more patches: the
aim is scratch's score in 0.8 of its seconds, not in half. A run:

    python -m studies.compute_matched --study=studies/faces64.py --piece=tune --out=DIR \
        --config.data.dir=DATA --config.eval.inception_weights=FILE
"""

from studies import faces128
from studies.arms import runs
from studies.transfer64 import EARLY, LATE, MASKED


def get_config():
    config = faces128.get_config()
    config.data.name = "lfw64.zip"
    config.data.image_size = (64, 64)
    config.mask.block_size = 2
    config.optim.name = "muon"
    config.sample.batch_size = 512
    return config


# Levels of both phases without a mask, as in faces128, and uniform ones.
_LEVELS = {"phases": ((0.6, EARLY | {"optim.lr_end": 0.3}), (0.4, LATE))}
ARMS = {
    f"scratch_b{batch}_lr{rate}{what}": faces128.whole(
        train__batch_size=batch, optim__lr_peak=rate / 1e4, **fields
    )
    for batch, rate in ((64, 32), (128, 32), (128, 16))
    for what, fields in (("", {}), ("_levels_both", _LEVELS))
} | {
    f"drop_60_b{batch}_lr16{what}": faces128.cheap_first(
        0.6,
        MASKED | {"optim.lr_end": 0.3} | first,
        {"train.batch_size": batch} | last,
        optim__lr_peak=1.6e-3,
    )
    for batch in (64, 128)
    for what, first, last in (("", {}, {}), ("_levels", EARLY, LATE))
}
_SCRATCH = [name for name in ARMS if name.startswith("scratch")]
_DROP = [name for name in ARMS if name.startswith("drop")]

PIECES = {
    "tune": runs([*_SCRATCH, *_DROP], 120),
    "longer": runs(["scratch_b64_lr32_levels_both", "drop_60_b64_lr16_levels"], 300)
    + runs(["drop_60_b64_lr16_levels"], 240),
}
