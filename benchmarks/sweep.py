"""How the cost of a step grows with the mask ratio, the image size and the batch.

    python -m benchmarks.sweep --data_dir DIR [--part ratio size batch] >> rows.jsonl
    python -m benchmarks.sweep --plot rows.jsonl

U-ViT-B, patch 4, on the celebahq set, resized for other sizes. Prints one JSON line per point;
--plot draws docs/images/step_cost.png from these lines, and prints them as a table.
"""

import concurrent.futures
import json
import pathlib
import sys

import jax

from benchmarks import cases, measure, train_step
from maskdm_jax import flops
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import TEXT, one_of
from maskdm_jax.run import command_line, distributed, memory

# part: (case, batch, fields) of each point
_PARTS = {
    "ratio": [
        ("whole256", 32, {}),
        ("masked256", 64, {"mask.ratio": 0.5}),
        ("masked256", 128, {"mask.ratio": 0.75}),
        ("masked256", 256, {"mask.ratio": 0.9}),
        ("masked256", 256, {"mask.ratio": 0.95}),
    ],
    "size": [
        (case, max(batch * 64**2 // size**2, 1), {"data.image_size": (size, size)})
        for case, batch in (("masked256", 4096), ("whole256", 1024))
        for size in (64, 128, 256, 512)
    ],
    "batch": [
        *(("masked256", batch, {}) for batch in (16, 64, 256, 512)),
        *(("whole256", batch, {}) for batch in (4, 16, 32, 64)),
    ],
}
_PLOT = pathlib.Path(__file__).parents[1] / "docs" / "images" / "step_cost.png"


def points(parts: list[str]):
    """(case, batch, fields) of the parts, each once."""
    seen = []
    for point in (point for part in parts for point in _PARTS[part]):
        if point not in seen:
            seen.append(point)
            yield point


def bench(case: str, config, compiled, seconds: float) -> dict:
    """One point: rates of the bare step, without the card's matmul rate."""
    batch = config.train.batch_size
    call = train_step.start(config, compiled)
    step_s = measure.seconds_per_call(call, seconds, warm_up=2)
    tflops = batch / step_s * flops.training_flops(config) / 1e12
    datasheet = flops.peak_tflops(jax.devices()[0])
    return {
        "case": case,
        "image_size": config.data.image_size[0],
        "hidden": 0.0 if config.mask.kind == "none" else config.mask.ratio,
        "tokens": flops.tokens_per_image(config),
        "batch": batch,
        "step_ms": step_s * 1e3,
        "images_per_s": batch / step_s,
        "model_tflops": tflops,
        "mfu_datasheet": datasheet and tflops / datasheet,
        "memory_gib": memory.bytes_needed(compiled) / 2**30,
    }


def read_rows(path: str) -> list[dict]:
    """The JSON lines that an earlier call printed to a file."""
    try:
        return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path} cannot be read: {error}; expected lines that this program printed; "
            "type python -m benchmarks.sweep --data_dir=DIR >> rows.jsonl to make them"
        ) from error


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| image | hidden | tokens | batch | ms a step | images/s | model TFLOP/s | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['image_size']} | {r['hidden']:.0%} | {r['tokens']} | {r['batch']} | "
        f"{r['step_ms']:.1f} | {r['images_per_s']:,.4g} | {r['model_tflops']:.0f} | "
        f"{r['memory_gib']:.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def plot(rows: list[dict]) -> None:
    """Plots the time per image, and model TFLOP/s, against tokens per image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (cost, rate) = plt.subplots(1, 2, figsize=(10, 4))
    for hidden in sorted({r["hidden"] for r in rows}):
        line = sorted((r for r in rows if r["hidden"] == hidden), key=lambda r: r["tokens"])
        tokens = [r["tokens"] for r in line]
        label = f"{hidden:.0%} hidden"
        cost.loglog(tokens, [r["step_ms"] / r["batch"] for r in line], "o", label=label)
        rate.semilogx(tokens, [r["model_tflops"] for r in line], "o", label=label)
    cost.set(xlabel="tokens per image", ylabel="ms per image", title="Cost of one image's update")
    rate.set(xlabel="tokens per image", ylabel="model TFLOP/s", ylim=(0, None), title="Rate")
    cost.legend()
    figure.tight_layout()
    figure.savefig(_PLOT, dpi=110)


def main():
    parser = command_line.Parser(__doc__, "python -m benchmarks.sweep --data_dir=DIR")
    parts = list(_PARTS)
    parser.flag("--part", one_of(*parts), "what is varied", parts, many=True)
    parser.flag("--data_dir", TEXT, "folder of the sets", "~/tensorflow_datasets")
    parser.flag("--seconds", cases.SECONDS, "timed steps per point", 1.5)
    parser.flag("--plot", TEXT, "draw the rows of this file, and stop")
    args = parser.parse()
    if args.plot:
        rows = read_rows(args.plot)
        plot(rows)
        print(table(rows))
        return
    distributed.num_devices()
    memory.set_gpu_memory_fraction()
    names, configs = [], []
    for case, batch, fields in points(args.part):
        names.append(case)
        configs.append(cases.config(case, args.data_dir, batch, fields))
    # Compiling takes longer than measuring, so all points compile in parallel.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = list(pool.map(train_step.compile_step, configs))
    for case, config, step in zip(names, configs, compiled, strict=True):
        print(json.dumps(bench(case, config, step, args.seconds)), flush=True)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
