"""Measures a set of images once, and computes its scores with their definition.

`measure` reads the images, of samples or of a reference that is then used again and again; `scores`
compares two measured sets; `definition` is what two scores must share to be compared.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.quality import (
    frechet,
    inception,
    inception_score,
    kid,
    neighbours,
    reference,
    swd,
)

# Metric -> the settings that belong to its definition.
METRICS = {
    "fid": {},
    "kid": {"kid_subset_size": kid.SUBSET_SIZE, "kid_subsets": kid.NUM_SUBSETS},
    "inception_score": {"inception_score_splits": inception_score.NUM_SPLITS},
    "precision_recall": {"precision_recall_k": neighbours.PRECISION_K},
    "density_coverage": {"density_coverage_k": neighbours.DENSITY_K},
    "memorisation": {"memorisation_nearest_share": neighbours.NEAREST_SHARE},
    "swd": {
        "swd_patch": swd.PATCH,
        "swd_patches_per_image": swd.PATCHES_PER_IMAGE,
        "swd_directions": swd.NUM_DIRECTIONS,
        "swd_max_images": swd.MAX_IMAGES,
    },
}
# Their names without the number of features; of the others, lower is better.
HIGHER_IS_BETTER = ("inception_score", "precision", "recall", "density", "coverage")
_COMPARES_FEATURES = {"kid", "precision_recall", "density_coverage", "memorisation"}
_NEEDS_EQUAL = {"precision_recall", "density_coverage"}
_MIN_IMAGES = {
    "inception_score": inception_score.NUM_SPLITS,
    "precision_recall": neighbours.PRECISION_K + 1,
    "density_coverage": neighbours.DENSITY_K + 1,
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the scores need of a set.

    Fields:
      sha256: of the images (`reference.ContentHash`), or of a file of statistics.
      count: number of images; None if a file of statistics does not tell.
      shape: (height, width, channels); None if unknown.
      statistics: {layer: mean and covariance}.
      features: {layer: float32 [N, D]}, if a metric compares them one by one.
      images: uint8 [N, H, W, C], at most swd.MAX_IMAGES, if a metric reads pixels.
    """

    sha256: str
    count: int | None
    shape: tuple[int, int, int] | None
    statistics: dict
    features: dict
    images: np.ndarray | None


def measure(
    batches: Iterable[np.ndarray],
    extract: inception.Extractor | None,
    metrics: Iterable[str],
    name: str,
) -> Measured:
    """Reads a set once.

    Args:
      batches: uint8 [B, H, W, C], at most the extractor's batch size at a time.
      extract: uint8 [B, H, W, C] -> {layer: float32 [B, D]}; None if no metric reads features.
      metrics: names in METRICS; what they do not need is not kept.
      name: of the set, for messages.

    Raises:
      RunError: if a feature is not finite.
    """
    metrics = set(metrics)
    content, moments, features, kept, count = reference.ContentHash(), {}, {}, [], 0
    for batch in batches:
        content.add(batch)
        for layer, x_BD in extract(batch).items() if extract else ():
            if not np.isfinite(x_BD).all():
                raise RunError(
                    f"features {layer} of {name} are not finite near image {count}; run again, and "
                    "if it stays, get the weights of the network again"
                )
            if layer != "logits":
                before = moments.get(layer) or frechet.no_moments(x_BD.shape[1])
                moments[layer] = frechet.add(before, x_BD)
            if layer == "logits" or keeps_features(metrics):
                features.setdefault(layer, []).append(x_BD)
        if "swd" in metrics and count < swd.MAX_IMAGES:
            kept.append(batch)
        count += len(batch)
    return Measured(
        content.hexdigest(),
        count,
        batch.shape[1:],
        {layer: frechet.statistics(m) for layer, m in moments.items()},
        {layer: np.concatenate(parts) for layer, parts in features.items()},
        np.concatenate(kept)[: swd.MAX_IMAGES] if kept else None,
    )


def scores(
    samples: Measured, ref: Measured, metrics: Iterable[str], heldout: Measured | None = None
) -> dict[str, float]:
    """{name: score}; names of scores of features end in the number of features.

    Args:
      samples: the images to score.
      ref: what they are compared with; for "memorisation", the training images.
      metrics: names in METRICS.
      heldout: images that the model has not seen, for "memorisation".
    """
    found = {}
    for dims in samples.statistics:
        values = {}
        if "fid" in metrics:
            values["fid"] = frechet.distance(samples.statistics[dims], ref.statistics[dims])
        if keeps_features(metrics):
            x_ND, y_MD = samples.features[dims], ref.features[dims]
        if "kid" in metrics:
            values |= kid.kid(x_ND, y_MD)
        if _NEEDS_EQUAL & set(metrics):
            equal = _equal(x_ND, y_MD)
        if "precision_recall" in metrics:
            values |= neighbours.precision_recall(*equal)
        if "density_coverage" in metrics:
            values |= neighbours.density_coverage(*equal)
        if "memorisation" in metrics:
            values |= neighbours.memorisation(x_ND, y_MD, heldout.features[dims])
        found |= {f"{name}{dims}": value for name, value in values.items()}
    if "inception_score" in metrics:
        found |= inception_score.inception_score(samples.features["logits"])
    if "swd" in metrics:
        found |= swd.swd(samples.images, ref.images)
    return found


def keeps_features(metrics: Iterable[str]) -> bool:
    """Whether a metric compares features one by one, so that all of them are kept."""
    return bool(_COMPARES_FEATURES & set(metrics))


def _equal(*sets):
    """As many rows of each set as the smallest has, at random with a fixed seed: a ball round a
    neighbour is smaller in a larger set."""
    size = min(map(len, sets))
    generator = np.random.default_rng(0)
    return [x[np.sort(generator.choice(len(x), size, replace=False))] for x in sets]


def layers(metrics: Iterable[str], features: Iterable[int]) -> tuple:
    """Layers of the network that the metrics read; none if they read pixels alone."""
    metrics = set(metrics)
    dims = tuple(features) if metrics & {"fid", *_COMPARES_FEATURES} else ()
    return dims + (("logits",) if "inception_score" in metrics else ())


def definition(
    samples: Measured,
    ref: Measured,
    metrics: Iterable[str],
    weights: inception.Weights | None,
    heldout: Measured | None = None,
) -> dict:
    """What two scores must share to be compared, as plain values."""
    shape = samples.shape or ref.shape
    found = {
        "n": samples.count,
        "reference_n": ref.count,
        "reference_sha256": ref.sha256,
        "image_size": list(shape[:2]) if shape else None,
        "channels": shape[2] if shape else None,
    }
    if heldout:
        found |= {"heldout_n": heldout.count, "heldout_sha256": heldout.sha256}
    if weights:
        found |= {
            "features": [str(layer) for layer in samples.statistics],
            "network": "FID Inception-v3 of 2015-12-05",
            "network_sha256": weights.sha256,
            "resize": inception.RESIZE,
        }
    for metric in metrics:
        found |= METRICS[metric]
    return found


def check_same_definition(records: list[dict], besides: Iterable[str] = ()) -> None:
    """Refuses to put scores of different definitions into one table.

    Args:
      records: each with a "definition" and, for the message, "images".
      besides: entries of the definition that may differ, since the table shows them.

    Raises:
      ConfigError: with the fields that differ and their values.
    """
    first, *others = records
    for other in others:
        a, b = first["definition"], other["definition"]
        differ = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
        differ = [k for k in differ if k not in besides]
        if differ:
            listed = "; ".join(f"{k} is {a.get(k)} and {b.get(k)}" for k in differ)
            raise ConfigError(
                f"the scores of {first.get('images')} and {other.get('images')} have different "
                f"definitions: {listed}; score both in the same way, or type them into two tables"
            )


def check_enough(name: str, count: int, metrics: Iterable[str]) -> None:
    """Refuses a set that is too small for a metric.

    Raises:
      ConfigError: with the number that is needed.
    """
    for metric in metrics:
        needed = _MIN_IMAGES.get(metric, 2)
        if count < needed:
            raise ConfigError(
                f"{metric} of {name} needs at least {needed} images, not {count}; type a larger "
                "set, or leave this metric out"
            )


def bias_warnings(samples: Measured, ref: Measured) -> list[str]:
    """A sentence for each Fréchet distance from fewer images than features."""
    found = []
    for dims in samples.statistics:
        for name, count in (("samples", samples.count), ("reference images", ref.count)):
            if count is not None and count <= dims:
                found.append(
                    f"FID-{dims} of {count} {name} is biased: fewer images than features leave the "
                    f"covariance singular; use more images, or fewer features"
                )
    return found
