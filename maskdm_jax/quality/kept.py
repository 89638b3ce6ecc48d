"""Keeps what was measured of a data set in a file, for the next start.

The file holds the features, mean and covariance. Pixels, which the sliced Wasserstein distance
reads, are not in it: decoding them again takes less time than their features did.
"""

import hashlib
import json
import pathlib

import numpy as np

from maskdm_jax.quality import frechet, inception, measure
from maskdm_jax.run import files, lock, progress

_FORMAT = 1


def path_of(
    keep_as: pathlib.Path, count: int, metrics: tuple, layers: tuple, network_sha256: str
) -> pathlib.Path:
    """The file of what `metrics` need of the first `count` images.

    Args:
      keep_as: see `reference.Images`.
      count: number of images.
      metrics: names in measure.METRICS.
      layers: of the network, which are read.
      network_sha256: of the network's weights.
    """
    facts = [_FORMAT, count, measure.keeps_features(metrics), list(map(str, layers))]
    facts += [network_sha256, inception.RESIZE]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return keep_as.with_name(f"{keep_as.name}-{key}.npz")


def read(path: pathlib.Path) -> measure.Measured | None:
    """What `write` wrote, without pixels; None if it is not there, or damaged, with a remark."""
    if not path.exists():
        return None
    try:
        with np.load(path) as stored:  # every array has a checksum
            found = {name: stored[name] for name in stored.files}
        facts = json.loads(str(found.pop("facts")))
        layers = {str(layer): layer for layer in inception.LAYERS}
        parts = {kind: {} for kind in ("mu", "sigma", "features")}
        for name, array in found.items():
            kind, _, layer = name.partition("_")
            parts[kind][layers[layer]] = array
        statistics = {
            layer: frechet.Statistics(mu_D, parts["sigma"][layer], facts["count"])
            for layer, mu_D in parts["mu"].items()
        }
        shape = tuple(facts["shape"])
        return measure.Measured(
            facts["sha256"], facts["count"], shape, statistics, parts["features"], None
        )
    except (KeyError, *frechet.BAD_NPZ) as error:
        progress.remark(f"{path} is damaged ({error}); measuring these images again")
        return None


def write(path: pathlib.Path, measured: measure.Measured) -> None:
    """Writes what was measured, and removes what was measured of the set's earlier versions.

    If that fails, as in a folder that is not writable, a remark says so and nothing is kept.
    """
    arrays = {f"features_{layer}": x_ND for layer, x_ND in measured.features.items()}
    for layer, statistics in measured.statistics.items():
        arrays |= {f"mu_{layer}": statistics.mu_D, f"sigma_{layer}": statistics.sigma_DD}
    gib = sum(x.nbytes for x in arrays.values()) / 2**30
    facts = {name: getattr(measured, name) for name in ("sha256", "count", "shape")}
    version, *_ = path.name.rpartition("-")
    variant, *_ = version.rpartition("-")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock.hold(path.parent, ".measured_lock") as held:
            if held:
                files.remove_leftovers(path.parent, f"{variant}-*.npz")
            for other in path.parent.glob(f"{variant}-*.npz"):
                if not other.name.startswith(f"{version}-"):
                    other.unlink()
            with files.whole(path) as unfinished, unfinished.open("wb") as file:
                np.savez(file, facts=json.dumps(facts), **arrays)
    except OSError as error:
        progress.remark(f"{path} cannot be written ({error}): the next start measures again")
    else:
        progress.remark(f"kept what was measured, {gib:.2f} GiB, in {path}")
