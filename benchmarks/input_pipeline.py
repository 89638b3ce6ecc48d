"""Images/s of each data cache at 64 and 256 pixels, against what the training step needs.

    python -m benchmarks.input_pipeline --data_dir DIR [--bench masked64 masked256] [--need 50000]

Prints one JSON line per cache: `ratio` is the rate at which batches reach the devices, as uint8
images, over what the step consumes: --need, or the latest rate of that case in results.json. Below
1, the step waits. Nothing else runs meanwhile, so a step that keeps the host busy gets less.
"""

import argparse
import functools
import json
import os
import sys
import time

import jax

from benchmarks import cases, run
from maskdm_jax import sharding
from maskdm_jax.data import batch as batch_lib
from maskdm_jax.data import loader, sources
from maskdm_jax.run import command_line

_BENCHES = ("masked64", "masked256")  # the steps that consume most images at each size
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_pipeline", description=__doc__
    )
    parser.add_argument("--bench", nargs="*", default=_BENCHES, choices=cases.NAMES[:-1])
    parser.add_argument("--data_dir", default="~/tensorflow_datasets")
    parser.add_argument(
        "--caches", nargs="*", help="default: none, host and, on a GPU or TPU, device"
    )
    parser.add_argument("--need", type=float, help="images/s of the step")
    parser.add_argument("--seconds", type=float, default=6.0, help="timed work of each")
    parser.add_argument("--set", nargs="*", default=[], help="fields, such as data.name=faces.zip")
    args = parser.parse_args(argv)
    on_cpu = jax.devices()[0].platform == "cpu"
    caches = args.caches or ["none", "host"] + ["device"] * (not on_cpu)

    def measure():
        for bench in args.bench:
            need = args.need or needed(bench)
            for cache in caches:
                fields = cases.parse_fields([*args.set, f"data.cache={cache}"])
                config = cases.config(bench, args.data_dir, fields=fields)
                result = rate(config, args.seconds)
                row = {"bench": bench, "image_size": config.data.image_size[0], "cache": cache}
                row |= {"ratio": result["images_per_s"] / need, "needed_images_per_s": need}
                row |= {"device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
                print(json.dumps(row | result), flush=True)

    return command_line.exit_code(measure)


if __name__ == "__main__":
    sys.exit(main())
