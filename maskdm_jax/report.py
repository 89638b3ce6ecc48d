"""One page on a two-stage run: loss curves, samples and figures.

    python -m maskdm_jax.report --pretrain=W1 --finetune=W2 --out=DIR

Needs matplotlib: pip install 'maskdm_jax[demo]'.
"""

import contextlib
import json
import pathlib
import shutil
import sys

import numpy as np

from maskdm_jax import flops, phases
from maskdm_jax.config import load_json
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import TEXT, quoted
from maskdm_jax.run import command_line, files
from maskdm_jax.run.telemetry import read_metrics

_PRETRAIN = "masked pre-training"
_FINETUNE = "fine-tuning on whole images"


def write_report(
    pretrain: str | pathlib.Path, finetune: str | pathlib.Path, out: str | pathlib.Path
) -> pathlib.Path:
    """Writes report.md and its pictures to `out`, from the workdirs of both stages.

    Returns:
      The report's path.

    Raises:
      ConfigError: if a workdir holds no metrics, or the second one no samples.
    """
    stages = {_PRETRAIN: _read(pretrain, "--pretrain"), _FINETUNE: _read(finetune, "--finetune")}
    grids = sorted(
        files.local_path(finetune, "--finetune").glob("samples/*/grid.png"),
        key=lambda path: path.stat().st_mtime,
    )
    if not grids:
        raise ConfigError(
            f"{finetune} holds no samples; type: python main.py --config=configs/NAME.py "
            f"--workdir={quoted(finetune)} --mode=sample"
        )
    out = files.local_path(out, "--out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written to: {error}; expected a folder; type --out=FOLDER"
        ) from error
    shutil.copyfile(grids[-1], out / "samples.png")
    _plot(stages, out / "loss.png")
    rows = "\n".join(_row(name, *stage) for name, stage in stages.items())
    sampled = grids[-1].parent
    count = len(list(sampled.glob("[0-9]*.png")))
    config = stages[_FINETUNE][0]
    with _damage_explained(sampled / "settings.json"):
        settings = json.loads((sampled / "settings.json").read_text())
        step, weights = settings["step"], settings["weights"]
    files.write_text(
        out / "report.md",
        f"""# Two-stage training on {config.data.name}

Stage 1 sees only the visible patches of each image; stage 2 starts from its weights and sees whole
images. The losses of the two stages are means over different patches, so they are not comparable
with each other.

| stage | tokens per image | training GFLOP per image | steps | images/s | last loss |
| --- | --- | --- | --- | --- | --- |
{rows}

Images/s is the median over the records; the last loss is the mean of the last ten records.

## Samples

{count} images, drawn from the {weights} weights of step {step} (`{sampled.name}`).

![samples](samples.png)

## Loss

![loss of both stages](loss.png)
""",
    )
    return out / "report.md"


def _read(workdir, flag):
    workdir = files.local_path(workdir, flag)
    records = read_metrics(workdir)
    if not records:
        raise ConfigError(
            f"{workdir} holds no metrics.jsonl; expected the --workdir of a run that has trained; "
            "type another --pretrain or --finetune"
        )
    with _damage_explained(workdir / "config.json"):
        return load_json(workdir / "config.json"), records


@contextlib.contextmanager
def _damage_explained(path):
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read: {' '.join(str(error).split())[:200]}; expected the file that "
            "training or sampling wrote; type the command that wrote it again"
        ) from error


def _row(name, config, records):
    last = np.mean([r["loss"] for r in records[-10:]])
    rate = np.median([r["images_per_s"] for r in records])
    configs = [phase.config for phase in phases.phases(config)]
    tokens = ", ".join(str(flops.tokens_per_image(each)) for each in configs)
    gflop = ", ".join(f"{flops.training_flops(each) / 1e9:.4g}" for each in configs)
    return f"| {name} | {tokens} | {gflop} | {records[-1]['step']:,} | {rate:,.0f} | {last:.4f} |"


def _plot(stages, path):
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "the report needs matplotlib; type: pip install 'maskdm_jax[demo]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(stages), figsize=(10, 3.5), layout="constrained")
    for axis, (name, (_, records)) in zip(axes, stages.items(), strict=True):
        axis.plot([r["step"] for r in records], [r["loss"] for r in records])
        axis.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    example = "python -m maskdm_jax.report --pretrain=W1 --finetune=W2 --out=DIR"
    parser = command_line.Parser(__doc__, example)
    parser.flag("--pretrain", TEXT, "workdir of stage 1", required=True)
    parser.flag("--finetune", TEXT, "workdir of stage 2, with samples", required=True)
    parser.flag("--out", TEXT, "folder for report.md and its pictures", required=True)

    def write():
        args = parser.parse(argv)
        print(f"report: {write_report(args.pretrain, args.finetune, args.out)}")

    return command_line.exit_code(write)


if __name__ == "__main__":
    sys.exit(main())
