"""Weak scaling: the bare step on one GPU of this host and on all, at the same batch per GPU.

    python -m benchmarks.scaling --data_dir DIR [--bench masked256 whole256:32 ...] [--seconds 4]

whole256:32 is that case at batch 32 per GPU, for cards of 80 GB. The one GPU is the first in
CUDA_VISIBLE_DEVICES. Cards differ by 2 to 3 %, and the slowest sets the pace of all:
CUDA_VISIBLE_DEVICES=1,0 compares with the other. Prints one JSON line per case, then a table, and
adds the rows to results.json.
"""

import json
import os
import re
import shlex
import subprocess
import sys

from benchmarks import cases, measure, run
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import TEXT, Kind, nearest_word
from maskdm_jax.run import command_line

_NAMES = tuple(name for name in cases.NAMES if name != "sample256")  # those that train
# Variables that change the rates, and so belong to the command that a row keeps.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NCCL_NVLS_ENABLE", "XLA_FLAGS")


_CASE = re.compile(rf"({'|'.join(_NAMES)})(?::([1-9]\d*))?")


def case(text: str) -> tuple[str, int]:
    """("whole256", 32) from "whole256:32"; without a number, the case's own batch."""
    name, batch = _CASE.fullmatch(text).groups()
    return name, int(batch or cases.CASES[name][1])


def _nearest_case(text, default):
    name = nearest_word(text.partition(":")[0], _NAMES)
    return f"{name}:{cases.CASES[name][1]}" if name else default


def count_gpus() -> int:
    """How many GPUs JAX sees, counted in another process so that this one holds none of them."""
    code = "import jax; print(sum(d.platform == 'gpu' for d in jax.devices()))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return int(done.stdout)


def bench(name: str, batch: int, num_gpus: int, options: list[str]) -> tuple[dict, dict]:
    """Results of the step at `batch` on one GPU, and at `num_gpus` times `batch` on all."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    one = run.run_ours(name, ["--batch", str(batch), *options], CUDA_VISIBLE_DEVICES=first)
    return one, run.run_ours(name, ["--batch", str(batch * num_gpus), *options])


def row(name: str, one: dict, together: dict, command: str) -> dict:
    """One case's row of results.json. `mfu` and `memory_gib` are per GPU, in the run on all."""
    num_gpus = together["num_devices"]
    fields = ("device", "images_per_s", "mfu", "mfu_datasheet", "matmul_tflops", "model_tflops")
    return {
        "bench": f"{name} on {num_gpus} GPUs",
        **{field: together[field] for field in fields},
        "memory_gib": together["memory_gib"],
        "one_gpu_images_per_s": one["images_per_s"],
        "efficiency": together["images_per_s"] / (num_gpus * one["images_per_s"]),
        "num_gpus": num_gpus,
        "batch": together["batch"],
        "versions": together["versions"],
        "command": command,
        "date": measure.today(),
    }


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | GPUs | batch per GPU | images/s on one | images/s on all | efficiency per GPU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['bench'].split()[0]} | {r['num_gpus']} | {r['batch'] // r['num_gpus']} | "
        f"{r['one_gpu_images_per_s']:,.1f} | {r['images_per_s']:,.1f} | {r['efficiency']:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main():
    parser = command_line.Parser(__doc__, "python -m benchmarks.scaling --data_dir=DIR")
    expected = f"{', '.join(_NAMES)}, or, with a batch, whole256:32"
    kind = Kind(expected, lambda text: bool(_CASE.fullmatch(text)), _nearest_case)
    parser.flag("--bench", kind, "the cases, as CASE or CASE:BATCH", list(_NAMES), many=True)
    parser.flag("--data_dir", TEXT, "folder of the sets", "~/tensorflow_datasets")
    parser.flag("--seconds", cases.SECONDS, "timed work of each", 4.0)
    args = parser.parse()
    chosen = [case(text) for text in args.bench]
    num_gpus = count_gpus()
    if num_gpus < 2:
        raise ConfigError(
            f"JAX sees {num_gpus} GPUs; expected at least 2; type CUDA_VISIBLE_DEVICES=0,1 before "
            "the command on a host that has them"
        )
    options = ["--data_dir", args.data_dir, "--seconds", str(args.seconds)]
    settings = [f"{k}={shlex.quote(os.environ[k])}" for k in _VARIABLES if k in os.environ]
    command = [*settings, "python -m benchmarks.scaling --bench"]
    command += [f"{name}:{batch}" for name, batch in chosen]
    command = " ".join([*command, f"--seconds {args.seconds:g}"])
    rows = []
    for name, batch in chosen:
        rows.append(row(name, *bench(name, batch, num_gpus, options), command))
        run.keep(rows[-1:])
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
