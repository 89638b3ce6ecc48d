"""A 2-D swiss roll: masked pre-training and fine-tuning against scratch at equal seconds.

    python -m studies.swiss_roll --out=DIR [--seconds 60] [--seeds 3]

Every arm trains for as many steps as fit in `--seconds`; the step times are measured first, in
turn, so that a load that comes and goes does not favour one arm. Writes the true and the drawn
points (swiss_roll.png) and one JSON line per run (swiss_roll.jsonl). The distance is the sliced
Wasserstein-1 distance to the test points. Needs matplotlib: pip install 'maskdm_jax[demo]'.
"""

import importlib
import json
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

from maskdm_jax import checkpoint, draw, phases, sharding, state, step, train
from maskdm_jax.data import loader, sources, toy
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import COUNT, TEXT, number
from maskdm_jax.run import command_line, files
from maskdm_jax.run.progress import say

# arm: its stages, each a config and the share of the seconds it gets
ARMS = {
    "pre-trained on single coordinates": {"pretrain": 0.3, "finetune": 0.7},
    "scratch": {"scratch": 1.0},
}
_ROUNDS, _STEPS_PER_ROUND = 7, 20


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, num_directions: int = 64) -> float:
    """The Wasserstein-1 distance of two sets of points [N, 2] projected on a line, as the mean over
    lines of evenly spaced directions."""
    angles = np.pi * np.arange(num_directions) / num_directions
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.abs(np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)).mean())


def config_of(stage: str, data_dir: pathlib.Path, seed: int):
    config = importlib.import_module(f"configs.{stage}_swiss_roll").get_config()
    config.data.dir, config.seed, config.sample.seed = str(data_dir), seed, seed
    return config


def step_seconds(stages: list[str], data_dir: pathlib.Path) -> dict[str, float]:
    """Seconds of a training step of each stage, measured in turn."""
    runs = {}
    for stage in stages:
        config = config_of(stage, data_dir, 0)
        mesh = sharding.make_mesh(config)
        feed = loader.Loader(config, sources.open_source(config), mesh)
        phase = phases.phases(config)[0]
        runs[stage] = [step.jit_train_step(phase, mesh), state.init_state(config, mesh, None)]
        runs[stage] += [feed.arrays, feed.batches(0), step.planned(phase, mesh)]
    seconds = {stage: [] for stage in stages}
    for _ in range(_ROUNDS):
        for stage, run in runs.items():
            update, now, arrays, batches, plan = run
            start = time.perf_counter()
            for _ in range(_STEPS_PER_ROUND):
                now, metrics = update(now, arrays, next(batches), plan)
                float(metrics["loss"])  # as the training loop does
            run[1] = now
            seconds[stage].append((time.perf_counter() - start) / _STEPS_PER_ROUND)
    return {stage: statistics.median(times[1:]) for stage, times in seconds.items()}


def run_arm(arm: str, out: pathlib.Path, seed: int, seconds: float, times: dict) -> np.ndarray:
    """Trains an arm, and returns the points [N, 2] that it draws."""
    before = ""
    for stage, share in ARMS[arm].items():
        config = config_of(stage, out / "data", seed)
        config.train.num_steps = max(round(share * seconds / times[stage]), 1)
        config.init.path = before
        workdir = out / f"{stage}_seed{seed}"
        train.train(config, workdir)
        before = str(workdir)
    return draw_points(config, workdir)


def draw_points(config, workdir: pathlib.Path) -> np.ndarray:
    """As many points [N, 2] as there are test points, from the EMA weights of a finished run."""
    mesh = sharding.make_mesh(config)
    abstract = draw.abstract_params(config, mesh)
    params = checkpoint.restore_item(workdir, config.train.num_steps, "ema", abstract)
    jitted = draw.jit_draw(config, mesh, sharding.batch_sharding(mesh))
    size, count = config.sample.batch_size, len(toy.points("test"))
    drawn = [
        np.asarray(jitted(params, np.arange(first, first + size, dtype=np.int32)))
        for first in range(0, count, size)
    ]
    return toy.to_points(np.concatenate(drawn)[:count])


def plot(panels: dict[str, np.ndarray], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 4.2), layout="constrained"
    )
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        axis.plot(*points[:4000].T, ".", markersize=1, alpha=0.5)
        axis.set(title=title, xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def study(out: pathlib.Path, seconds: float, num_seeds: int) -> None:
    """Runs every arm with every seed, and writes swiss_roll.jsonl and swiss_roll.png to `out`."""
    times = step_seconds([stage for stages in ARMS.values() for stage in stages], out / "data")
    say(", ".join(f"{stage}: {1e3 * times[stage]:.3g} ms a step" for stage in times))
    true, other = (toy.to_points(toy.to_pixels(toy.points(split))) for split in ("test", "train"))
    floor = sliced_wasserstein(other[: len(true)], true)
    say(f"floor, training against test points: {floor:.4f}")
    panels = {"test points": true}
    for seed in range(num_seeds):
        for arm, stages in ARMS.items():
            points = run_arm(arm, out, seed, seconds, times)
            distance = sliced_wasserstein(points, true)
            if seed == 0:
                panels[f"{arm}: {distance:.4f}"] = points
            row = {"arm": arm, "seed": seed, "seconds": seconds}
            row |= {"step_ms": {stage: 1e3 * times[stage] for stage in stages}}
            row |= {"sliced_wasserstein": distance, "points": len(points), "floor": floor}
            with open(out / "swiss_roll.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            say(f"seed {seed}, {arm}: {distance:.4f}")
    plot(panels, out / "swiss_roll.png")


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser(__doc__, "python -m studies.swiss_roll --out=DIR")
    parser.flag("--out", TEXT, "folder for all that this writes", required=True)
    parser.flag("--seconds", number(0.01), "of training, for each arm", 60.0)
    parser.flag("--seeds", COUNT, "runs of each arm", 3)
    args = parser.parse(argv)
    out = files.out_folder(args.out, "--out")
    if any(out.iterdir()):  # its runs would resume, with the step times of another day
        raise ConfigError(f"--out {out} is not empty; type --out=FOLDER with a new one")
    jax.config.update("jax_compilation_cache_dir", str(out / "xla_cache"))
    study(out, args.seconds, args.seeds)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
