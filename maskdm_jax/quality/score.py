"""Scores a set of images against a reference set, and prints one line of JSON.

    python -m maskdm_jax.quality.score --images A --reference B --features 768 \\
        --inception_weights FILE

The line holds every score under a name that ends in its features (`fid768`), and the definition
that it shares with the scores it may be compared with. docs/scores.md explains each.
"""

import hashlib
import importlib.metadata
import platform
import sys
import time

import jax

from maskdm_jax import fields
from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import frechet, inception, inception_weights, measure, reference
from maskdm_jax.run import command_line, distributed, files, progress, telemetry

_FEATURES = (64, 192, 768, 2048)
_PACKAGES = ("maskdm_jax", "jax", "numpy", "pillow")


def score(
    images: str,
    reference_path: str,
    *,
    features: tuple[int, ...] = (2048,),
    metrics: tuple[str, ...] = ("fid",),
    weights_path: str = "",
    heldout_path: str = "",
    save_reference: str = "",
    num: int | None = None,
    batch_size: int = 64,
) -> dict:
    """The record of `images` against the reference: scores, definition, seconds, device.

    Args:
      images: what to score: a path as `reference.open_set` takes it.
      reference_path: what to compare with, likewise.
      features: numbers of features, of 64, 192, 768 and 2048.
      metrics: names in `measure.METRICS`.
      weights_path: file of the network's weights; empty for pytorch-fid's, downloaded once.
      heldout_path: images that the model has not seen, for "memorisation"; the reference is then
        what it was trained on.
      save_reference: an .npz to write the reference's statistics to, as pytorch-fid's.
      num: use only the first `num` images of both sets.
      batch_size: images that the network takes at a time, over all devices.

    Raises:
      ConfigError: if a set, the weights or their combination cannot give the score.
    """
    start = time.perf_counter()
    paths = {"--images": images, "--reference": reference_path}
    if ("memorisation" in metrics) != bool(heldout_path):
        raise ConfigError(
            "memorisation compares with images that the model has not seen; type both --metrics "
            "memorisation and --heldout SET, or neither"
        )
    if save_reference and (len(features) > 1 or "fid" not in metrics):
        raise ConfigError(
            f"--save_reference {save_reference} holds the statistics of one kind of features for "
            "fid; type one number after --features"
        )
    sets = {flag: reference.open_set(path, flag, num) for flag, path in paths.items()}
    if heldout_path:
        sets["--heldout"] = reference.open_set(heldout_path, "--heldout")
    _check(sets, paths, metrics)
    layers = measure.layers(metrics, features)
    weights = load_weights(weights_path, layers) if layers else None
    if save_reference:
        statistics = _statistics_path(save_reference)
    measured = _measure_all(sets, layers, metrics, weights, batch_size)

    samples, ref, heldout = (measured.get(f) for f in ("--images", "--reference", "--heldout"))
    if save_reference:
        made_by = {
            "sha256": ref.sha256,
            "shape": ref.shape,
            "features": features[0],
            "network_sha256": weights.sha256,
        }
        frechet.write(statistics, ref.statistics[features[0]]._replace(made_by=made_by))
    warnings = measure.bias_warnings(samples, ref) if "fid" in metrics else []
    for warning in warnings:
        progress.remark(f"warning: {warning}")
    return {
        **measure.scores(samples, ref, metrics, heldout),
        "definition": measure.definition(samples, ref, metrics, weights, heldout),
        "images": images,
        "images_sha256": samples.sha256,
        "reference": reference_path,
        "warnings": warnings,
        "seconds": round(time.perf_counter() - start, 1),
        "device": _devices(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
    }


def _check(sets, paths, metrics):
    """Refuses sets that cannot be compared, before any work."""
    statistics = [flag for flag, s in sets.items() if isinstance(s, frechet.Statistics)]
    if statistics and set(metrics) != {"fid"}:
        raise ConfigError(
            f"{statistics[0]} {paths.get(statistics[0], '')} holds statistics, which give fid "
            "alone; type --metrics fid, or a folder, zip or prepared set of images"
        )
    images = {flag: s for flag, s in sets.items() if flag not in statistics}
    for flag, opened in images.items():
        reference.check_comparable(next(iter(images.values())), opened)
        measure.check_enough(f"{flag} {opened.path}", opened.count, metrics)


def load_weights(path: str, layers: tuple, flag: str = "--inception_weights") -> inception.Weights:
    """The network's weights, checked to reach the deepest of `layers`.

    Args:
      path: a file; empty for pytorch-fid's, downloaded once.
      layers: some of inception.LAYERS.
      flag: what the path was typed for.

    Raises:
      ConfigError: if the file is missing, of another network, or ends before that layer.
    """
    weights = inception_weights.load(path, flag)
    order = inception.LAYERS.index
    deepest = max(layers, key=order)
    if order(deepest) > order(weights.last):
        features = flag.replace("inception_weights", "features")
        raise ConfigError(
            f"{flag} {path} ends at features {weights.last}, but {deepest} are asked "
            f"for; type {features}={weights.last} (and no inception_score), or the path of "
            f"{inception_weights.NAME}"
        )
    return weights


def _measure_all(sets, layers, metrics, weights, batch_size):
    """{flag: measure.Measured}."""
    images = {flag: s for flag, s in sets.items() if isinstance(s, reference.Images)}
    extract, size = None, batch_size
    if layers and images:
        size = min(batch_size, max(s.count for s in images.values()))
        extract = inception.Extractor(weights, layers, size)
        shape = next(iter(images.values())).shape
        total = sum(s.count for s in images.values())
        seconds = total * extract.seconds_per_image(shape)
        progress.remark(
            f"features of {total:,} images on {_devices()}: about {progress.clock(seconds)}"
        )
    measured = {}
    for flag, opened in sets.items():
        if flag not in images:
            measured[flag] = from_statistics(opened, flag, layers, weights)
            continue
        batches = opened.batches(size)
        num_batches = -(-opened.count // size)
        tracked = progress.track(batches, num_batches, f"reading {flag}", f"batches of {size}")
        measured[flag] = measure.measure(tracked, extract, metrics, opened.path)
    return measured


def from_statistics(
    stats: frechet.Statistics, flag: str, layers: tuple, weights: inception.Weights
) -> measure.Measured:
    """A file of statistics as a measured set.

    Raises:
      ConfigError: if other features made it.
    """
    dims, made_by = len(stats.mu_D), stats.made_by
    network = made_by.get("network_sha256", weights.sha256)
    if (dims,) != layers or network != weights.sha256:
        asked = " and ".join(map(str, layers))
        raise ConfigError(
            f"{flag} holds statistics of {dims} features of the network {network[:8]}, but "
            f"{asked} of {weights.sha256[:8]} are asked for; type --features {dims} with that "
            "network's weights, or make the statistics again"
        )
    content = hashlib.sha256(stats.mu_D.tobytes() + stats.sigma_DD.tobytes()).hexdigest()
    sha256, shape = made_by.get("sha256", content), made_by.get("shape")
    return measure.Measured(sha256, stats.count, shape, {dims: stats}, {}, None)


def _statistics_path(path):
    path = files.local_path(path, "--save_reference")
    if path.suffix != ".npz":
        raise ConfigError(f"--save_reference {path} is not an .npz; type {path.stem}.npz")
    try:
        files.make_folder(path.parent)
        is_file = not path.is_dir()
    except OSError as error:
        raise ConfigError(
            f"--save_reference {path} cannot be written: {error.strerror}; expected a file in a "
            "folder of your own; type another --save_reference"
        ) from error
    if not is_file:
        raise ConfigError(f"--save_reference {path} is a folder; type {path}/reference.npz")
    return path


def _devices():
    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    example = "python -m maskdm_jax.quality.score --images=FOLDER --reference=FOLDER"
    parser = command_line.Parser(__doc__, example)
    text = fields.TEXT
    parser.flag(
        "--images", text, "folder, .zip[/FOLDER], prepared set[/SPLIT], or .npz", None, True
    )
    parser.flag("--reference", text, "likewise", required=True)
    parser.flag("--features", fields.choice(*_FEATURES), "one or several", [2048], many=True)
    parser.flag("--metrics", fields.one_of(*measure.METRICS), "some of them", ["fid"], many=True)
    parser.flag("--inception_weights", text, "downloaded once if not given", "")
    parser.flag("--heldout", text, "for memorisation: unseen images", "")
    parser.flag("--save_reference", text, "an .npz for the reference's statistics", "")
    parser.flag("--num", fields.whole(2), "use only the first NUM images of each set")
    parser.flag("--batch_size", fields.COUNT, "images at a time, over all devices", 64)

    def print_scores():
        args = parser.parse(argv)
        distributed.mute_libtpu()
        found = score(
            args.images,
            args.reference,
            features=tuple(args.features),
            metrics=tuple(args.metrics),
            weights_path=args.inception_weights,
            heldout_path=args.heldout,
            save_reference=args.save_reference,
            num=args.num,
            batch_size=args.batch_size,
        )
        print(telemetry.to_json(found))

    return command_line.exit_code(print_scores)


if __name__ == "__main__":
    sys.exit(main())
