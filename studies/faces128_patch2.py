"""Does masking pay at 4,096 patches? The faces of faces128.py at patch 2.

The cost is that of 256x256 pixels at patch 4. A block of 4x4 patches is 8 pixels wide here, not 16.
Scoring is of 2,000 images in 25 steps, since a step takes long, so scores compare with each other
alone. A run:

    python -m studies.compute_matched --study=studies/faces128_patch2.py --piece=longest --out=DIR \
        --config.data.name=lfw128.zip --config.data.dir=DATA --config.eval.inception_weights=FILE
"""

from studies import faces128
from studies.arms import runs

_LEVELS = ["scratch_b32_muon_lr32_levels_both", "drop_60_b32_muon_lr16_levels"]
_KEPT = [f"{name}_kept" for name in _LEVELS]
ARMS = {
    f"{name}_b32_muon_lr{rate}": faces128.ARMS[f"{name}_b32_muon_lr{rate}"]
    for name in ("scratch", "drop_60", "pool_60")
    for rate in (16, 32)
} | {
    name: faces128.ARMS[name]
    for name in (
        *faces128.COARSE,
        *_LEVELS,
        *_KEPT,
        "scratch_b16_muon_lr32",
    )
}
PIECES = {
    "longest": runs(
        ["scratch_b32_muon_lr32", "drop_60_b32_muon_lr16", "scratch_b32_muon_lr16"], 600
    ),
    "half": runs([f"drop_60_b32_muon_lr16{what}" for what in ("", "_levels", "_coarse")], 300),
    "levels": [run for seconds in (600, 300) for run in runs(_LEVELS, seconds)]
    + runs(_LEVELS[1:], 150),
    "kept": runs(_KEPT, 600) + runs(_KEPT[1:], 300),
    "better_scratch": runs(["scratch_b16_muon_lr32"], 600),
}


def get_config():
    config = faces128.get_config()
    config.model.patch_size = 2
    config.sample.steps = 25
    config.sample.batch_size = 64
    config.eval.num = 2_000
    return config
