"""Scores of several runs or checkpoints in one table, and a plot.

    python -m maskdm_jax.compare --runs W1 W2 --over=step --plot=fid.png
    python -m maskdm_jax.compare --runs W --over=ema_std --plot=ema.png
    python -m maskdm_jax.compare --runs W1 W2 --over=step --ema_std=0.05
    python -m maskdm_jax.compare --runs W1 W2 --over=ema_std --step=400000

Reads the scores.jsonl that --mode=evaluate and `eval.every_steps` write. Scores of different
definitions are refused. The plot needs matplotlib: pip install 'maskdm_jax[demo]'.
"""

import pathlib
import sys

from maskdm_jax import fields
from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import measure
from maskdm_jax.run import command_line, files, progress
from maskdm_jax.run.telemetry import read_scores

_OVER = {
    "step": lambda record: record["step"],
    "ema_std": lambda record: record["definition"]["ema_std"],
    "steps": lambda record: record["definition"]["steps"],
    "guidance_scale": lambda record: record["definition"]["guidance_scale"],
}


def compare(
    runs: list[str],
    over: str = "step",
    score: str = "",
    num: int | None = None,
    plot: str = "",
    step: int | None = None,
    ema_std: float | None = None,
) -> str:
    """A Markdown table of the runs' scores.

    Args:
      runs: workdirs.
      over: what differs between a run's records: "step", "ema_std", or another field of the sampler
        that `_OVER` has.
      score: the score to plot, such as "fid768"; "" for the first.
      num: only records of that many samples; None for the largest number.
      plot: a picture to draw `score` into; "" for none.
      step: only records of that checkpoint; None for all.
      ema_std: only records of an average of that length, 0 for the EMA; None for all.

    Raises:
      ConfigError: if a run holds no scores, none is left, or they have different definitions.
    """
    records = {run: read_scores(files.place(run, "--runs")) for run in runs}
    for run, found in records.items():
        if not found:
            typed = command_line.typed_mode("evaluate", f"--config=... --workdir={run}")
            raise ConfigError(
                f"{run} holds no scores.jsonl; expected the --workdir of a run that was scored; "
                f"type {typed} first"
            )
    records = _selected(records, step, ema_std)
    num = num or max(r["definition"]["n"] for found in records.values() for r in found)
    records = {
        run: sorted((r for r in found if r["definition"]["n"] == num), key=_OVER[over])
        for run, found in records.items()
    }
    shown = [(run, record) for run, found in records.items() for record in found]
    if not shown:
        raise ConfigError(f"no scores of {num} samples in {', '.join(runs)}; type another --num")
    if without := [run for run, found in records.items() if not found]:
        progress.remark(f"{', '.join(without)}: left out, with no such scores of {num} samples")
    measure.check_same_definition(
        [{"images": f"{run}, step {r['step']}", **r} for run, r in shown], besides=(over,)
    )
    names = [k for k in shown[0][1]["scores"] if all(k in r["scores"] for _, r in shown)]
    score = score or names[0]
    if score not in names:
        raise ConfigError(
            f"--score is {score!r}; expected one of {', '.join(names)}; type --score={names[0]}"
        )
    if plot:
        _plot(records, over, score, num, files.local_path(plot, "--plot"))
    return _table(shown, over, names)


def _selected(records, step, ema_std):
    """{run: its records of that step and that length of the average}; None selects all."""
    for over, wanted in (("step", step), ("ema_std", ema_std)):
        there = sorted({_OVER[over](r) for found in records.values() for r in found})
        if wanted is not None and wanted not in there:
            raise ConfigError(
                f"--{over} is {wanted}, but the scores are of {', '.join(map(_shown, there))}; "
                f"type --{over}={_shown(there[-1])}"
            )
        records = {
            run: [r for r in found if wanted in (None, _OVER[over](r))]
            for run, found in records.items()
        }
    return records


def _shown(number):
    return f"{number:.12g}"  # all digits of a step, and 0.05 for a length


def _table(shown, over, names):
    losses = sorted({name for _, record in shown for name in record["heldout_loss"]})
    head = ["run", over, *names, *[f"held-out loss ({name})" for name in losses]]
    rows = [head, ["---"] * len(head)]
    for run, record in shown:
        values = [f"{record['scores'][name]:.4g}" for name in names]
        means = [record["heldout_loss"].get(name, {}).get("mean") for name in losses]
        values += ["-" if mean is None else f"{mean:.5f}" for mean in means]
        rows.append([pathlib.Path(run).name, _shown(_OVER[over](record)), *values])
    definition = {k: v for k, v in shown[0][1]["definition"].items() if k != over}
    said = ", ".join(f"{k} {v}" for k, v in definition.items())
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{said}"


def _plot(records, over, score, num, path):
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib; type: pip install 'maskdm_jax[demo]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for run, found in records.items():
        axis.plot(
            [_OVER[over](r) for r in found],
            [r["scores"][score] for r in found],
            marker="o",
            label=pathlib.Path(run).name,
        )
    axis.set(xlabel=over, ylabel=f"{score} ({num:,} samples)")
    axis.grid(alpha=0.3)
    axis.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path} cannot be written: {error}; expected a picture in a folder that "
            "exists; type --plot=scores.png"
        ) from error
    finally:
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    example = "python -m maskdm_jax.compare --runs W1 W2 --over=step --plot=fid.png"
    parser = command_line.Parser(__doc__, example)
    parser.flag("--runs", fields.TEXT, "workdirs with scores", [], required=True, many=True)
    parser.flag("--over", fields.one_of(*_OVER), "what differs within a run", "step")
    parser.flag("--score", fields.TEXT, "what to plot; the first score if not given", "")
    parser.flag("--num", fields.whole(2), "only scores of NUM samples; the most if not given")
    parser.flag("--plot", fields.TEXT, "a picture to draw", "")
    parser.flag("--step", fields.whole(0), "only scores of this checkpoint")
    parser.flag("--ema_std", fields.number(0, 0.28), "only averages of this length; 0 for the EMA")

    def run():
        args = parser.parse(argv)
        print(
            compare(args.runs, args.over, args.score, args.num, args.plot, args.step, args.ema_std)
        )

    return command_line.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
