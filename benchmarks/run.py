"""Measures ours and the PyTorch peer in turn on one card: a table, and rows in results.json.

    python -m benchmarks.run --data_dir DIR [--bench masked256 ...] [--batch N] [--seconds 6]

DIR holds the sets celebahq (256x256) and celeba64 (64x64), as maskdm_jax.data.prepare writes them.
Each measurement is a process of its own, so neither framework holds memory that the other needs.
--config.FIELD=VALUE changes the cases for both.
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys

from benchmarks import cases, measure
from maskdm_jax.config import FIELDS
from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.fields import COUNT, TEXT, one_of
from maskdm_jax.run import command_line

RESULTS = pathlib.Path(__file__).with_name("results.json")


def run_peer(bench: str, batch: int, options: list[str]) -> dict:
    """The peer's result at `batch`, halved until it fits in memory."""
    while True:
        done = _run("benchmarks.peer_torch", bench, ["--batch", str(batch), *options])
        if done.returncode == 0:
            return _last_line(done)
        if "out of memory" not in done.stderr.lower() or batch == 1:
            raise failure(f"the peer at {bench}", done.returncode, done.stderr)
        batch //= 2


def run_ours(bench: str, options: list[str], **env: str) -> dict:
    """The result of our step, or our sampler, with the environment variables `env` set."""
    module = "benchmarks.sampling" if bench == "sample256" else "benchmarks.train_step"
    done = _run(module, bench, options, **env)
    if done.returncode:
        raise failure(f"{module} at {bench}", done.returncode, done.stderr)
    return _last_line(done)


def failure(what: str, code: int, said: str) -> ConfigError | RunError:
    """The error of a program that ended with exit code `code` and these last words."""
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    if code == ConfigError.exit_code:
        return ConfigError(last.removeprefix("error: "))
    return RunError(f"{what} ended with status {code}: {last}; type its command to see all of it")


def row(bench: str, ours: dict, peer: dict, command: str) -> dict:
    """One case's row of results.json. `mfu` is relative to this card's measured matmul rate."""
    # Samplers are compared by network evaluations, since their runs may have any length.
    rate = "evaluations_per_s" if bench == "sample256" else "images_per_s"
    ratio = ours[rate] / peer[rate]
    fields = ("device", "images_per_s", "mfu", "mfu_datasheet", "matmul_tflops", "model_tflops")
    return {
        "bench": bench,
        **{name: ours[name] for name in fields},
        "memory_gib": ours.get("memory_gib"),
        "set_up_s": ours["set_up_s"],
        "peer_images_per_s": ours["images_per_s"] / ratio,
        "peer_batch": peer["batch"],
        "peer_memory_gib": peer["memory_gib"],
        "ratio": ratio,
        "batch": ours["batch"],
        "versions": {**ours["versions"], **peer["versions"]},
        "command": command,
        "date": measure.today(),
    }


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | batch | images/s | MFU over the measured matmul rate | over the datasheet's | "
        "PyTorch images/s (batch) | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        datasheet = f"{r['mfu_datasheet']:.1%}" if r["mfu_datasheet"] else "not known"
        lines.append(
            f"| {r['bench']} | {r['batch']} | {r['images_per_s']:,.4g} | {r['mfu']:.1%} of "
            f"{r['matmul_tflops']:.0f} TFLOP/s | {datasheet} | {r['peer_images_per_s']:,.4g} "
            f"({r['peer_batch']}) | {r['ratio']:.2f} |"
        )
    return "\n".join(lines)


def keep(rows: list[dict]) -> None:
    """Adds rows to results.json."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps(before + rows, indent=1) + "\n")


def main():
    parser = command_line.Parser(__doc__, "python -m benchmarks.run --data_dir=DIR", FIELDS)
    names = list(cases.NAMES)
    parser.flag("--bench", one_of(*names, *cases.POOLED), "the cases", names, many=True)
    parser.flag("--data_dir", TEXT, "folder of the sets", "~/tensorflow_datasets")
    parser.flag("--batch", COUNT, "images; each case's own if not given")
    parser.flag("--seconds", cases.SECONDS, "timed work of each", 6.0)
    args = parser.parse()
    options = ["--seconds", f"{args.seconds:g}", *(f"--config.{change}" for change in args.changes)]
    batch = ["--batch", str(args.batch)] if args.batch else []
    command = shlex.join(
        ["python", "-m", "benchmarks.run", "--bench", *args.bench, *batch, *options]
    )
    options += ["--data_dir", args.data_dir]
    rows = []
    for bench in args.bench:
        ours = run_ours(bench, [*batch, *options])
        peer = run_peer(bench, ours["batch"], options)
        rows.append(row(bench, ours, peer, command))
        keep(rows[-1:])
        print(table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[-1], flush=True)


def _run(module, bench, options, **env):
    command = [sys.executable, "-m", module, "--bench", bench, *options]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


def _last_line(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
