"""The page on runs: what it shows, what it says is missing, and that it needs nothing else."""

import html.parser
import json
import re
import shlex

import numpy as np
import pytest

from configs import finetune_celeba64, finetune_digits, pretrain_digits, scratch_digits
from maskdm_jax import config as config_lib
from maskdm_jax import config_file, images
from maskdm_jax.errors import ConfigError
from maskdm_jax.report import __main__ as command
from maskdm_jax.report import commands, page, plots, runs, scores

STEPS = range(10, 110, 10)
BINS = {"-2 to 0": 0.5, "0 to 2": None, "2 to 4": 0.1}
SECTIONS = (
    "Runs", "Samples", "Scores", "Loss", "Held-out loss by noise level",
    "Previews during training", "Time and cost", "Resume and reproduce",
)  # fmt: skip


def metrics(step, **extra):
    return {
        "step": step,
        "loss": 1 / step,
        "step_s": 0.5,
        "images_per_s": 128.0,
        "model_tflops": 2.0,
        "device": "8 x NVIDIA H200",
        **extra,
    }


def definition(**changes):
    return {
        "n": 64,
        "reference_sha256": "a" * 64,
        "heldout_sha256": "b" * 64,
        "sampler": "ddim",
        "spacing": "timestep",
        "steps": 50,
        "eta": 0.0,
        "guidance_scale": 1.0,
        "weights": "ema",
        "ema_std": 0.0,
    } | changes


def score(value, folder="", **changes):
    loss = {"n": 9, "schedule": "cosine", "num_timesteps": 1000, "mean": 0.3, "bins": BINS}
    return {
        "step": 100,
        "key": str(value),
        "scores": {"swd": value},
        "definition": definition(**changes),
        "warnings": [],
        "heldout_loss": {"ema": loss},
        "images": f"/elsewhere/{folder}",
    }


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def fake_run(workdir, config, **init):
    """A workdir with its config and ten records of metrics."""
    workdir.mkdir()
    config.init.update(init)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    write_jsonl(workdir / "metrics.jsonl", [metrics(step) for step in STEPS])
    return str(workdir)


def add_pictures(workdir):
    folder = workdir / "samples" / "step100_ema"
    folder.mkdir(parents=True)
    (workdir / "previews").mkdir()
    pictures = [folder / name for name in ("000000.png", "000001.png", "grid.png")]
    pictures += [workdir / "previews" / f"step_{step:07d}.png" for step in range(1, 21)]
    for path in pictures:
        images.save_png(path, np.zeros((4, 4, 1), np.uint8))
    settings = {"step": 100, **finetune_digits.get_config().sample.to_dict(), "seed": 5}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def stages(tmp_path):
    """Workdirs of two stages and of the baseline; the last two with samples and scores."""
    pre = fake_run(tmp_path / "pre", pretrain_digits.get_config())
    fine = fake_run(tmp_path / "fine", finetune_digits.get_config(), path=pre)
    scratch = fake_run(tmp_path / "scratch", scratch_digits.get_config())
    for workdir, value in ((fine, 11.25), (scratch, 22.75)):
        folder = add_pictures(tmp_path / workdir)
        write_jsonl(tmp_path / workdir / "scores.jsonl", [score(value, folder.name)])
    return [pre, fine, scratch]


class Outline(html.parser.HTMLParser):
    """Checks that every element is closed in order; collects headings, addresses and text."""

    VOID = {"meta", "link", "img", "br", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.addresses, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open += [tag] * (tag not in self.VOID)
        keys = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.addresses += [value for key, value in attrs if key in keys]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def test_the_page_has_every_section_and_needs_nothing_else(stages, tmp_path):
    out = page.write(stages, tmp_path / "new" / "report.html")
    text = out.read_bytes().decode("ascii")
    outline = Outline(text)
    assert tuple(outline.headings) == SECTIONS
    assert all(address.startswith(("data:", "#")) for address in outline.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert text.count("<svg") == 4 + 1 and "currentColor" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {a.removeprefix("#") for a in outline.addresses if a.startswith("#")} <= set(ids)
    assert "from the weights of pre" in outline.text
    assert "Trained for 100 s: 50 s of its own, the rest in pre." in outline.text
    assert "8 of 20" in outline.text  # previews
    assert outline.text.count("definition 1") == 2  # each set of samples has its score


def test_a_run_without_scores_says_what_to_type(tmp_path):
    workdir = fake_run(tmp_path / "run", scratch_digits.get_config())
    text = Outline(page.make(runs.read([workdir]))).text
    for what, flag in (
        ("run has no samples", "--mode=sample"),
        ("run has no scores", "--mode=evaluate"),
        ("run has no held-out loss", "--mode=evaluate"),
        ("run has no previews", "--config.train.sample_every_steps="),
    ):
        typed = text.split(what, 1)[1].split("python main.py", 1)[1][:300]
        assert flag in typed and f"--workdir={workdir}" in typed


def evaluation_of_a_file(workdir):
    """What evaluating an official file leaves: samples and scores, no config.json."""
    folder = add_pictures(workdir)
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"init_path": "official.pt"}))
    write_jsonl(workdir / "scores.jsonl", [score(33.5, folder.name)])
    return str(workdir)


def test_a_folder_with_samples_and_scores_alone_shows_them(tmp_path):
    text = page.make(runs.read([evaluation_of_a_file(tmp_path / "file")]))
    outline = Outline(text)
    assert outline.headings == ["Runs", "Samples", "Scores", "Held-out loss by noise level"]
    assert "samples or scores alone, of official.pt" in outline.text and "33.5" in outline.text
    assert "data:image/png" in text and "file, step 100: 2 samples" in outline.text
    assert "Trained for" not in outline.text and "main.py" not in outline.text
    (tmp_path / "file" / "scores.jsonl").unlink()
    text = Outline(page.make(runs.read([str(tmp_path / "file")]))).text
    assert "file has no scores." in text and "file has no held-out loss." in text


def test_a_folder_with_samples_alone_stands_beside_runs(stages, tmp_path):
    alone = evaluation_of_a_file(tmp_path / "file")
    found = runs.read([alone, *stages])
    assert [run.name for run in found] == ["pre", "fine", "scratch", "file"]
    outline = Outline(page.make(found))
    assert tuple(outline.headings) == SECTIONS
    assert outline.text.count("file, step 100") == 2  # its samples, its held-out loss


def test_a_set_that_has_no_held_out_images_is_sent_to_no_command(tmp_path):
    config = scratch_digits.get_config()
    config.eval.heldout_split = ""
    workdir = fake_run(tmp_path / "run", config)
    write_jsonl(tmp_path / "run" / "scores.jsonl", [score(1.5) | {"heldout_loss": {}}])
    text = Outline(page.make(runs.read([workdir]))).text
    assert "run was scored without held-out images.Previews" in text


def test_a_run_that_has_not_trained_says_so(tmp_path):
    workdir = fake_run(tmp_path / "run", pretrain_digits.get_config())
    (tmp_path / "run" / "metrics.jsonl").unlink()
    text = Outline(page.make(runs.read([workdir]))).text
    assert "run has not trained yet" in text and "0 of " in text


def test_names_and_values_of_runs_are_escaped(tmp_path):
    config = scratch_digits.get_config()
    config.data.name = "</td><script>alert(1)</script>&amp;"
    workdir = fake_run(tmp_path / '<b>"&', config)
    text = page.make(runs.read([workdir]))
    assert "<script" not in text and "<b>&" not in text
    outline = Outline(text)
    assert config.data.name in outline.text and '<b>"&' in outline.text


def test_scores_of_different_definitions_never_share_a_table(tmp_path):
    workdir = fake_run(tmp_path / "run", scratch_digits.get_config())
    records = [score(1.5), score(2.5, steps=250), score(3.5)]
    write_jsonl(tmp_path / "run" / "scores.jsonl", records)
    found = runs.read([workdir])
    first, second = scores._by_definition(found)
    assert [record["scores"]["swd"] for _, record in first] == [1.5, 3.5]
    assert [record["scores"]["swd"] for _, record in second] == [2.5]
    text = Outline(page.make(found)).text
    before, after = text.split("Definition 2")
    assert "1.5" in before and "ddim 50 timestep" in before
    assert "2.5" in after and "ddim 250 timestep" in after


def test_totals_are_sums_over_the_records(tmp_path):
    config = scratch_digits.get_config()
    workdir = fake_run(tmp_path / "run", config)
    spent = runs.cost(*runs.read([workdir]))
    assert spent.seconds == pytest.approx(100 * 0.5)
    assert spent.images == 100 * config.train.batch_size
    assert spent.flops == pytest.approx(50 * 2e12)
    assert spent.device_seconds == pytest.approx(50 * 8)


def test_a_record_that_counts_its_images_is_believed(tmp_path):
    workdir = fake_run(tmp_path / "run", scratch_digits.get_config())
    write_jsonl(tmp_path / "run" / "metrics.jsonl", [metrics(10, images=7), metrics(20, images=9)])
    assert list(runs.progress(*runs.read([workdir])).images) == [7, 9]


def test_old_records_without_rates_and_devices_are_unknown(tmp_path):
    workdir = fake_run(tmp_path / "run", scratch_digits.get_config())
    write_jsonl(tmp_path / "run" / "metrics.jsonl", [{"step": 10, "loss": 1.0}])
    text = Outline(page.make(runs.read([workdir]))).text
    assert "Trained" not in text and "an unknown time" in text and "not recorded" in text


def test_weights_are_followed_back_through_checkpoints_and_in_circles(tmp_path):
    a = fake_run(tmp_path / "a", scratch_digits.get_config(), path=str(tmp_path / "c"))
    b = fake_run(tmp_path / "b", scratch_digits.get_config(), path=f"{a}/checkpoints/7")
    c = fake_run(tmp_path / "c", scratch_digits.get_config(), path=b)
    found = runs.read([a, b, c])
    assert [run.name for run in runs.before(found[2], found)] == ["a", "b"]


@pytest.mark.parametrize("in_checkout", [True, False])
def test_the_command_line_gives_the_config_of_the_run(tmp_path, monkeypatch, in_checkout):
    config = finetune_digits.get_config()
    config.update_from_flattened_dict(
        {"data.image_size": (16, 24), "init.path": "a b", "init.ignore": ("x", "y/.*")}
    )
    workdir = fake_run(tmp_path / "finetune", config)
    if not in_checkout:
        monkeypatch.chdir(tmp_path)
    typed = commands.train(*runs.read([workdir]), commands.shipped())
    program = "python main.py" if in_checkout else "maskdm train"
    assert typed.startswith(f"{program} --config=configs/finetune_digits.py --workdir=")
    drawn = commands.mode(*runs.read([workdir]), commands.shipped(), "sample")
    assert drawn.endswith(" --mode=sample") == in_checkout != drawn.startswith("maskdm sample ")
    flags = [part.removeprefix("--") for part in shlex.split(typed) if part.startswith("--")]
    file = next(flag for flag in flags if flag.startswith("config=")).removeprefix("config=")
    changes = [flag.removeprefix("config.") for flag in flags if flag.startswith("config.")]
    assert config_file.load(file, changes) == config


def test_the_command_line_of_the_papers_recipe_names_it(tmp_path):
    workdir = fake_run(tmp_path / "w", finetune_celeba64.get_config("paper"))
    typed = commands.train(*runs.read([workdir]), commands.shipped())
    assert typed.startswith("python main.py --config=configs/finetune_celeba64.py:paper --workdir")
    assert "--config." not in typed


def test_a_field_that_every_phase_sets_is_not_typed(tmp_path):
    config = finetune_digits.get_config()
    config.optim.lr_peak = 5e-4  # without effect, and main.py refuses the flag
    config.phases = ((1, {"optim.lr_peak": 1e-3}), (1, {"optim.lr_peak": 2e-3}))
    workdir = fake_run(tmp_path / "finetune", config)
    typed = commands.train(*runs.read([workdir]), commands.shipped())
    flags = [part.removeprefix("--config.") for part in shlex.split(typed) if ".phases=" in part]
    assert "--config.optim.lr_peak" not in typed
    assert config_file.load("configs/finetune_digits.py", flags).phases == config.phases


def test_of_equal_config_files_the_one_named_like_the_workdir_is_typed(stages):
    for run, name in zip(runs.read(stages), ("pretrain", "finetune", "scratch"), strict=True):
        typed = commands.train(run, commands.shipped())
        assert f"--config=configs/{name}_digits.py" in typed


def test_samples_are_drawn_again_with_their_own_settings(stages, tmp_path):
    fine = runs.read(stages)[1]
    assert "--config.sample.seed=5" in commands.mode(fine, commands.shipped(), "sample")


def test_large_pictures_are_reduced(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (1500, 750, 3), np.uint8)
    images.save_png(tmp_path / "large.png", noise)
    images.save_png(tmp_path / "small.png", noise[:64, :64])
    kind, content = runs.picture(tmp_path / "large.png")
    assert kind == "image/jpeg" and len(content) < (tmp_path / "large.png").stat().st_size / 3
    assert runs.picture(tmp_path / "small.png")[0] == "image/png"


def test_large_numbers_on_an_axis_can_be_read():
    def ticks(top):
        x, y = np.linspace(0, top, 10), np.ones(10)
        svg = plots.loss([("#000000", x, y)], "images", "Loss")
        return {text.strip() for text in svg.itertext()}

    assert {"0.5", "1"} <= ticks(1.2)
    assert {"20,000", "100,000"} <= ticks(100_000)
    assert {"2 T", "10 T"} <= ticks(1e13)


def test_a_smoothed_curve_keeps_a_constant_and_skips_nan():
    y = np.full(200, 3.0)
    y[50] = np.nan
    np.testing.assert_allclose(plots.smoothed(y), 3.0)
    noise = np.random.default_rng(0).normal(size=200)
    assert plots.smoothed(noise).std() < noise.std() / 2
    assert list(plots.smoothed(np.array([2.0]))) == [2.0]


def test_a_folder_that_is_not_a_run_is_named(tmp_path, capsys):
    assert command.main([str(tmp_path), f"--out={tmp_path}/report.html"]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_a_picture_that_is_not_whole_is_named(stages, tmp_path):
    grid = tmp_path / "fine" / "samples" / "step100_ema" / "grid.png"
    images.save_png(grid, np.random.default_rng(0).integers(0, 255, (32, 32, 1), np.uint8))
    grid.write_bytes(grid.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"grid\.png cannot be read.*type"):
        page.make(runs.read(stages))
