"""Images/s of each data cache at 64 and 256 pixels, against what the training step needs.

    python -m benchmarks.input_pipeline --data_dir=DIR [--bench masked64 masked256] [--need=50000]

Prints one JSON line per cache: `ratio` is the rate at which batches reach the devices, as uint8
images, over what the step consumes: --need, or the latest rate of that case in results.json. Below
1, the step waits. Nothing else runs meanwhile, so a step that keeps the host busy gets less.
"""

import functools
import json
import os
import sys
import time

import jax

from benchmarks import cases, run
from maskdm_jax import config_file, sharding
from maskdm_jax.config import FIELDS, validate
from maskdm_jax.data import batch as batch_lib
from maskdm_jax.data import loader, sources
from maskdm_jax.fields import TEXT, number, one_of
from maskdm_jax.run import command_line

_BENCHES = ["masked64", "masked256"]  # the steps that consume most images at each size
_CACHES = ["none", "host", "device"]
_WARM_UP = 6  # batches: more than are prefetched


def rate(config, seconds: float) -> dict:
    """Images/s of the loader of a config, as uint8 images on the devices, and the set-up time."""
    mesh = sharding.make_mesh(config)
    start = time.perf_counter()
    feed = loader.Loader(config, sources.open_source(config), mesh)
    images = jax.jit(functools.partial(batch_lib.materialize, config))
    batches = feed.batches(0)
    for _ in range(_WARM_UP):
        jax.block_until_ready(images(feed.arrays, next(batches)))
    begun, count = time.perf_counter(), 0
    while (now := time.perf_counter()) < begun + seconds or not count:
        jax.block_until_ready(images(feed.arrays, next(batches)))
        count += 1
    rate = count * config.train.batch_size / (now - begun)
    return {"images_per_s": rate, "set_up_s": begun - start}


def needed(bench: str) -> float:
    """Images/s of the step of a case, by its latest row in results.json."""
    rows = json.loads(run.RESULTS.read_text())
    return [row["images_per_s"] for row in rows if row["bench"] == bench][-1]


def main(argv: list[str] | None = None) -> None:
    example = "python -m benchmarks.input_pipeline --data_dir=DIR"
    parser = command_line.Parser(__doc__, example, FIELDS)
    parser.flag("--bench", one_of(*cases.NAMES[:-1]), "the cases", _BENCHES, many=True)
    parser.flag("--data_dir", TEXT, "folder of the sets", "~/tensorflow_datasets")
    parser.flag("--caches", one_of(*_CACHES), "values of data.cache", _CACHES, many=True)
    parser.flag("--need", number(0.01), "images/s of the step; by results.json if not given")
    parser.flag("--seconds", cases.SECONDS, "timed work of each", 6.0)
    args = parser.parse(argv)
    for bench in args.bench:
        need = args.need or needed(bench)
        for cache in args.caches:
            config = cases.config(bench, args.data_dir, fields={"data.cache": cache})
            for change in args.changes:
                config_file.set_field(config, change)
            validate(config)
            result = rate(config, args.seconds)
            row = {"bench": bench, "image_size": config.data.image_size[0], "cache": cache}
            row |= {"ratio": result["images_per_s"] / need, "needed_images_per_s": need}
            row |= {"device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
            print(json.dumps(row | result), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
