"""Does masking pay at equal total cost? Faces of 128x128 pixels, 1,024 patches.

`get_config` is what all arms share; an arm lists its runs, each (share of the seconds, changed
fields), of which the next starts from the weights of the one before. PIECES are the lists of runs
that answer one question each. Data: Labeled Faces in the Wild, aligned, with a train and a test
split by person. A run:

    python -m studies.compute_matched --study=studies/faces128.py --piece=tune_scratch --out=DIR \
        --config.data.name=lfw128.zip --config.data.dir=DATA --config.eval.inception_weights=FILE
"""

from maskdm_jax.config import default_config
from studies.arms import runs


def get_config():
    config = default_config()
    config.data.name = "lfw128.zip"
    config.data.image_size = (128, 128)
    config.data.cache = "device"
    config.data.flip = True
    config.model.size = "S"
    config.mask.ratio = 0.9
    config.diffusion.schedule = "shifted_cosine"
    config.diffusion.prediction = "v"
    config.optim.lr_peak = 8e-4
    config.optim.lr_schedule = "cosine"
    config.optim.warmup_steps = 200
    config.optim.b1 = 0.9
    config.optim.clip_norm = 1.0
    config.train.batch_size = 64
    config.train.log_every_steps = 20
    config.train.sample_every_steps = 0
    config.checkpoint.every_steps = 10**9  # at the end alone
    config.sample.steps = 50
    config.sample.eta = 0.0
    config.sample.batch_size = 256
    config.eval.num = 5_000
    config.eval.metrics = ("fid", "memorisation")
    config.eval.features = 768
    return config


def whole(**fields) -> list:
    """An arm that sees whole images from the start."""
    return [(1.0, {name.replace("__", "."): value for name, value in fields.items()})]


def cheap_first(share: float, first: dict, last: dict | None = None, **fields) -> list:
    """An arm with a cheap first phase, then whole images."""
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    return [(1.0, fields | {"phases": ((share, first), (1 - share, last or {}))})]


def changed(arm: list, **fields) -> list:
    """The same arm with other fields in all its runs."""
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    return [(share, given | fields) for share, given in arm]


DROP = {"mask.kind": "block", "train.batch_size": 256, "optim.lr_end": 0.3}
POOL = DROP | {"mask.hidden": "pool"}
PATCH8 = {"model.patch_size": 8, "train.batch_size": 256, "optim.lr_end": 0.3}

# The first word of a name is its family.
ARMS = (
    {
        "scratch": whole(),
        "scratch_lr4": whole(optim__lr_peak=4e-4),
        "scratch_lr12": whole(optim__lr_peak=1.2e-3, optim__warmup_steps=100),  # diverges
        "scratch_b32": whole(train__batch_size=32),
        "scratch_b16": whole(train__batch_size=16),
        "scratch_b32_lr4": whole(train__batch_size=32, optim__lr_peak=4e-4),
        "scratch_b32_muon": whole(train__batch_size=32, optim__name="muon"),
        "scratch_b32_muon_logit_normal": whole(
            train__batch_size=32, optim__name="muon", diffusion__draw="logit_normal"
        ),
        "scratch_p8": whole(model__patch_size=8),
        "scratch_b32_logit_normal": whole(train__batch_size=32, diffusion__draw="logit_normal"),
        "scratch_b32_perturbed": whole(train__batch_size=32, diffusion__input_perturbation=0.1),
    }
    | {
        f"{name}_{share}": cheap_first(share / 100, first)
        for name, first in (("drop", DROP), ("pool", POOL), ("patch8", PATCH8))
        for share in (30, 50, 60, 75, 80, 90)
    }
    | {
        f"{name}_{share}_b32": cheap_first(share / 100, first, {"train.batch_size": 32})
        for name, first in (("drop", DROP), ("pool", POOL), ("patch8", PATCH8))
        for share in (60, 75, 80, 90)
    }
    | {
        f"{name}_{share}_b32_muon": cheap_first(
            share / 100, first, {"train.batch_size": 32}, optim__name="muon"
        )
        for name, first in (("drop", DROP), ("pool", POOL), ("patch8", PATCH8))
        for share in (15, 30, 50, 60, 75, 80)
    }
)

# A peak learning rate of 16e-4, 32e-4, 64e-4.
ARMS |= {
    f"{name}_lr{rate}": changed(ARMS[name], optim__lr_peak=rate / 1e4)
    for name in ("scratch_b32_muon", "drop_60_b32_muon", "drop_30_b32_muon", "pool_60_b32_muon")
    for rate in (16, 32, 64)
}

_TUNED_AT_120 = [name for name in ARMS if name.startswith("scratch")]


def drawn(mean: float, std: float) -> dict:
    """Fields that draw ln(signal / noise) from that normal distribution."""
    return {
        "diffusion.draw": "logit_normal",
        "diffusion.draw_mean": mean,
        "diffusion.draw_std": std,
    }


def _better(share: float, first: dict, last: dict, **fields) -> list:
    """A cheap first phase, with Muon, and batch 32 on whole images unless `last` has another."""
    last = {"train.batch_size": 32} | last
    return cheap_first(share, first, last, optim__name="muon", optim__lr_peak=1.6e-3, **fields)


# What might help the best of each, tried at 300 s, where seeds differ little. With `_levels`, the
# last phase sees fewer levels of the strongest noise, and a masked phase, which is fast at details,
# more of little noise. Uniform draws have a mean of -0.7 and a standard deviation of 1.5.
EARLY, LATE = drawn(0.7, 1.6), drawn(-0.5, 1.4)
_MORE_EARLY, _MORE_LATE = drawn(1.4, 1.6), drawn(-0.5, 1.2)  # further apart
# For the last phase, whose 1,800 to 3,300 updates (at 300 s) make a warm-up of 200 long.
_KEPT = {"optim.moments_at_phase": "keep", "optim.warmup_steps": 20}
_SCRATCH = ARMS["scratch_b32_muon_lr32"]
BETTER_SCRATCH = {
    "scratch_b64_muon_lr32": changed(_SCRATCH, train__batch_size=64),
    "scratch_b16_muon_lr32": changed(_SCRATCH, train__batch_size=16),
    "scratch_b32_muon_lr32_perturbed": changed(_SCRATCH, diffusion__input_perturbation=0.1),
    "scratch_b32_muon_lr32_levels": changed(_SCRATCH, **LATE),
    "scratch_b64_muon_lr32_levels": changed(_SCRATCH, train__batch_size=64, **LATE),
} | {
    # The levels of both phases, and no mask.
    f"scratch_b{batch}_muon_lr32_levels_{what}": changed(
        _SCRATCH,
        train__batch_size=batch,
        phases=((0.6, early | {"optim.lr_end": 0.3}), (0.4, late)),
    )
    for batch, what, early, late in (
        (32, "both", EARLY, LATE),
        (32, "both_kept", EARLY, LATE | _KEPT),
        (64, "both", EARLY, LATE),
        (64, "more_both", _MORE_EARLY, _MORE_LATE),
        (64, "more_both_kept", _MORE_EARLY, _MORE_LATE | _KEPT),
    )
}
BETTER_DROP = (
    {
        f"drop_{share}_b32_muon_lr16{what}": _better(share / 100, DROP | first, last)
        for share, what, first, last in (
            (75, "", {}, {}),
            (60, "_last8", {}, {"optim.lr_peak": 8e-4}),
            (60, "_last32", {}, {"optim.lr_peak": 3.2e-3}),
            (60, "_kept", {}, _KEPT),
            (60, "_ratio75", {"mask.ratio": 0.75, "train.batch_size": 128}, {}),
            (60, "_blocks2", {"mask.block_size": 2}, {}),
            (60, "_blocks8", {"mask.block_size": 8}, {}),
            (60, "_first128", {"train.batch_size": 128}, {}),
            (60, "_levels_kept", EARLY, LATE | _KEPT),
            (60, "_levels_early", EARLY, {}),
            (60, "_levels_late", {}, LATE),
            (60, "_levels_more", _MORE_EARLY, _MORE_LATE),
            (60, "_levels_blocks2", EARLY | {"mask.block_size": 2}, LATE),
            (60, "_levels_blocks8", EARLY | {"mask.block_size": 8}, LATE),
        )
    }
    | {
        f"drop_60_b64_muon_lr16_levels{what}": _better(
            0.6, DROP | first, last | {"train.batch_size": 64}
        )
        for what, first, last in (
            ("", EARLY, LATE),
            ("_blocks2", EARLY | {"mask.block_size": 2}, LATE),
            ("_more_blocks2", _MORE_EARLY | {"mask.block_size": 2}, _MORE_LATE),
            ("_more_blocks2_kept", _MORE_EARLY | {"mask.block_size": 2}, _MORE_LATE | _KEPT),
        )
    }
    | {
        "drop_40_half_30_b32_muon_lr16": [
            (
                1.0,
                {
                    "optim.name": "muon",
                    "optim.lr_peak": 1.6e-3,
                    "phases": (
                        (0.4, DROP),
                        (0.3, DROP | {"mask.ratio": 0.5, "train.batch_size": 64}),
                        (0.3, {"train.batch_size": 32}),
                    ),
                },
            )
        ]
    }
)
# The levels of both phases at each share, for dropping and for pooling.
SHARES = {
    f"{name}_{share}_b32_muon_lr16_levels": _better(share / 100, first | EARLY, LATE)
    for name, first in (("drop", DROP), ("pool", POOL))
    for share in (30, 60, 75, 90)
}
_POOLED_PATCH8 = POOL | PATCH8 | {"mask.block_size": 2, "mask.pool_size": 2}
BETTER_PATCH8 = {
    "patch8_50_b32_muon_lr16_levels": _better(0.5, PATCH8 | EARLY, LATE),
    "patch8_pool_60_b32_muon_lr16_levels": _better(0.6, _POOLED_PATCH8 | EARLY, LATE),
}
BETTER_POOL = {
    f"pool_60_b32_muon_lr16_levels_{what}": _better(0.6, POOL | EARLY | first, LATE)
    for what, first in (
        ("blocks8", {"mask.block_size": 8}),
        ("blocks8_pool8", {"mask.block_size": 8, "mask.pool_size": 8}),
        ("ratio75", {"mask.ratio": 0.75, "train.batch_size": 128}),
        ("weight0", {"mask.pool_weight": 0.0}),
        ("weight1", {"mask.pool_weight": 1.0}),
    )
}
# Coarse tokens where the noise is strong; masked phases have them for every fourth image.
_SIZES = {"coarse": ((2, 1.0), (4, 2.5)), "coarse4": ((4, 2.5),)}
COARSE = {
    f"scratch_b32_muon_lr32_{name}": changed(_SCRATCH, model__coarse=pairs)
    for name, pairs in _SIZES.items()
} | {
    f"drop_60_b32_muon_lr16_{name}": _better(
        0.6, DROP | {"diffusion.coarse_every": 4}, {}, model__coarse=pairs
    )
    for name, pairs in _SIZES.items()
}
ARMS |= BETTER_SCRATCH | BETTER_DROP | SHARES | BETTER_POOL | BETTER_PATCH8 | COARSE

# The best settings found for each.
_BEST = [
    "scratch_b64_muon_lr32_levels_more_both_kept",
    "drop_60_b64_muon_lr16_levels_more_blocks2_kept",
]
# Share or pooling: what is close, and their controls.
_CLOSE_AT_120 = [
    "drop_60_b32_muon_lr16_levels",
    "drop_75_b32_muon_lr16_levels",
    "pool_60_b32_muon_lr16_levels",
    "pool_60_b32_muon_lr16_levels_blocks8_pool8",
    "drop_60_b32_muon_lr16_levels_blocks8",
    "scratch_b64_muon_lr32_levels_both",
]
PIECES = {
    "tune_scratch": runs(_TUNED_AT_120, 120),
    "shares": runs(
        [f"{name}_{share}" for share in (60, 75, 30, 90) for name in ("drop", "pool")], 120
    ),
    "patch8": runs(["patch8_80", "patch8_50"], 120),
    "muon": runs(
        [f"{name}_b32_muon" for name in ("scratch", "drop_60", "drop_30", "patch8_50", "pool_60")],
        120,
    ),
    "muon_lr": runs(
        [f"{name}_b32_muon_lr{rate}" for rate in (16, 32, 64) for name in ("scratch", "drop_60")],
        120,
    ),
    "pool_lr": runs([f"pool_60_b32_muon_lr{rate}" for rate in (16, 32, 64)], 120),
    # What was best of each at 120 s.
    "longer": runs(["scratch_b32_muon_lr32", "drop_60_b32_muon_lr16"], 300, (0, 1, 2)),
    "share_lr": runs(["drop_30_b32_muon_lr16", "drop_30_b32_muon_lr32"], 120),
    "better_scratch": runs(["scratch_b32_muon_lr16", *BETTER_SCRATCH], 300),
    "better_drop": runs(list(BETTER_DROP), 300),
    "shares_levels": runs(list(SHARES), 120) + runs(["pool_60_b32_muon_lr16_levels"], 300),
    "better_pool": runs(list(BETTER_POOL), 120),
    "better_patch8": runs(list(BETTER_PATCH8), 120),
    "second_seeds": runs(_CLOSE_AT_120, 120, (0, 1)),
    "coarse": runs(list(COARSE), 300),
    "levels": runs(["drop_60_b32_muon_lr16_levels", "scratch_b64_muon_lr32_levels_both"], 120)
    + runs(["drop_60_b32_muon_lr16_levels", "scratch_b64_muon_lr32_levels_both"], 300, (0, 1, 2)),
    "longest": runs(["scratch_b32_muon_lr32", "drop_60_b32_muon_lr16"], 600)
    + runs(["drop_60_b32_muon_lr16_levels", "scratch_b64_muon_lr32_levels_both"], 600),
    "best": runs(_BEST[:1], 600, (0, 1, 2))
    + runs(_BEST[1:], 300, (0, 1, 2))
    + runs(_BEST[:1], 300, (0, 1, 2))
    + runs(_BEST[1:], 600)
    + runs(_BEST[1:], 150),
}
