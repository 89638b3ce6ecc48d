"""Times main.py's training loop against the bare step, for each data cache, and its start-up.

    python -m benchmarks.loop --bench masked64 --data_dir DIR [--caches device host none]

Prints one JSON line per cache: `ratio` is the loop's rate over the bare step's, in turn on the same
card. `first_step_s` is the time from the start of the process to the first finished update: with an
empty compilation cache in the first run, with a filled one in the others.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import cases, run
from maskdm_jax.fields import TEXT, one_of
from maskdm_jax.run import command_line, telemetry

_MAIN = pathlib.Path(__file__).parents[1] / "main.py"


def bench(name: str, data_dir: str, cache: str, steps: int, cache_home: str) -> dict:
    """Rate of main.py's loop over the last two thirds of `steps`, and time to the first step."""
    config, batch = cases.CASES[name]
    every = max(steps // 12, 1)
    fields = {
        "data.dir": data_dir,
        "data.cache": cache,
        "train.batch_size": batch,
        "train.num_steps": steps,
        "train.log_every_steps": every,
        "train.sample_every_steps": 0,
        "checkpoint.every_steps": 10 * steps,
        "init.path": "",
    }
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, str(_MAIN), f"--workdir={workdir}"]
        command += [f"--config={_MAIN.parent / 'configs' / config}.py:{cases.RECIPE}"]
        command += [f"--config.{field}={value}" for field, value in fields.items()]
        start = time.perf_counter()
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                command,
                env={**os.environ, "XDG_CACHE_HOME": cache_home},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None and not telemetry.read_metrics(workdir):
                time.sleep(0.05)
            first_step_s = time.perf_counter() - start
            if code := process.wait():
                said.seek(0)
                raise run.failure("main.py", code, said.read())
        records = telemetry.read_metrics(workdir)
    rates = [r["images_per_s"] for r in records if r["step"] > steps // 3]
    return {
        "bench": name,
        "cache": cache,
        "batch": batch,
        "images_per_s": statistics.median(rates),
        "first_step_s": first_step_s,
    }


def main():
    example = "python -m benchmarks.loop --bench=masked64 --data_dir=DIR"
    parser = command_line.Parser(__doc__, example)
    names, caches = cases.NAMES[:-1], ["device", "host", "none"]
    parser.flag("--bench", one_of(*names), "the case", required=True)
    parser.flag("--data_dir", TEXT, "folder of the sets", "~/tensorflow_datasets")
    parser.flag("--caches", one_of(*caches), "values of data.cache", caches, many=True)
    parser.flag("--seconds", cases.SECONDS, "timed work of each loop, roughly", 12.0)
    args = parser.parse()
    options = ["--data_dir", args.data_dir, "--seconds", str(args.seconds / 2)]
    bare = run.run_ours(args.bench, options)["images_per_s"]
    steps = max(int(args.seconds * bare / cases.CASES[args.bench][1]), 24)
    with tempfile.TemporaryDirectory() as cache_home:
        for cache in args.caches:
            result = bench(args.bench, args.data_dir, cache, steps, cache_home)
            ratio = result["images_per_s"] / bare
            print(json.dumps({**result, "bare_images_per_s": bare, "ratio": ratio}), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
