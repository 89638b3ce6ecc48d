"""W&B with stand-ins for its package and its failures, and, where it is installed, with itself."""

import json
import os
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT

from maskdm_jax import flops, images, train
from maskdm_jax.config import default_config
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import distributed, wandb_mirror
from maskdm_jax.run.telemetry import TRAINING, Telemetry, read_metrics

METRICS = {"loss": 0.5, "lr": 1e-4, "grad_norm": 1.0}
DEFINITION = dict(
    n=12, weights="ema", sampler="ddim", steps=3, spacing="timestep", eta=1.0, guidance_scale=1.0,
    reference_sha256="a" * 64,
)  # fmt: skip
NEEDS_WANDB = "This needs W&B, which `make test EXTRAS=peer` installs."


class FakeRun:
    """A run of W&B: keeps its rows in `rows`, {step: values}; `fails` names a failing method."""

    url = "https://wandb.example/run"

    def __init__(self, folder, rows, fails):
        self.dir, self.rows, self.fails = str(folder / "wandb" / "run" / "files"), rows, fails
        self.starting_step = max(rows, default=-1) + 1
        self.finished = False

    def define_metric(self, name, **options):
        pass

    def log(self, values, step=None):
        if self.fails == "log":
            raise ConnectionResetError("Connection lost")
        for name in values:
            assert name not in self.rows.get(step, {}), f"{name} of step {step} again"
        self.rows.setdefault(step, {}).update(values)

    def finish(self):
        if self.fails == "finish":
            raise TimeoutError("Timed out")
        self.finished = True


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A stand-in for the package; `rows` are what its server has, by step."""
    package = types.SimpleNamespace(rows={}, fails="", logged_in=True, runs=[], inits=[])

    def init(**options):
        package.inits.append(options)
        if package.fails == "init":
            raise OSError("no such\nhost")
        package.runs.append(FakeRun(tmp_path, package.rows, package.fails))
        return package.runs[-1]

    module = types.ModuleType("wandb")
    module.setup = lambda settings: None
    module.Settings = lambda **settings: settings
    module.login = lambda prompt, verify: package.logged_in
    module.Image = lambda path: path
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return package


@pytest.fixture
def config():
    config = default_config()
    config.log.wandb = "online"
    return config


def begin(config, workdir, first_step):
    """The telemetry of a start after `first_step` updates."""
    mirror = wandb_mirror.start(config, workdir)
    work = lambda step: flops.Work(step, step, step)  # noqa: E731
    return Telemetry(workdir, config, first_step, work, None, mirror)


def update(telemetry, workdir, step):
    """Logs a step, its preview, and its scores."""
    telemetry.log(step, METRICS | {"loss": 1 / step})
    path = workdir / "previews" / f"step_{step:07d}.png"
    path.parent.mkdir(exist_ok=True)
    images.save_png(path, np.full((8, 8, 1), step, np.uint8))
    telemetry.preview(step, path)
    telemetry.scores(
        {
            "step": step,
            "key": f"{TRAINING}{step}",
            "scores": {"fid": 10.0 * step},
            "definition": DEFINITION,
            "heldout_loss": {},
        }
    )


def test_a_missing_package_is_one_sentence_before_any_step(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tiny_config.log.wandb = "offline"
    with pytest.raises(ConfigError, match=r"log.wandb is 'offline'.*type pip install '.\[wandb\]'"):
        train.train(tiny_config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_only_process_0_starts_it_and_only_if_it_is_on(config, tmp_path, fake, monkeypatch):
    config.log.wandb = "off"
    assert wandb_mirror.start(config, tmp_path) is None
    config.log.wandb = "online"
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert wandb_mirror.start(config, tmp_path) is None
    assert not fake.inits and not list(tmp_path.iterdir())


def test_w_and_b_gets_metrics_previews_scores_and_config(config, tmp_path, fake):
    telemetry = begin(config, tmp_path, 0)
    update(telemetry, tmp_path, 3)
    telemetry.close()
    (record,) = read_metrics(tmp_path)
    shown = {k: v for k, v in record.items() if k not in ("step", "device")}
    row = fake.rows[3]
    assert {k: row[k] for k in shown} == shown
    assert row["preview"].endswith("previews/step_0000003.png")
    assert row["scores/fid"] == 30 and row["scores/step"] == 3
    assert "n 12; ema" in row["scores/definition"]
    assert row.keys() == shown.keys() | {
        "preview", "scores/fid", "scores/step", "scores/definition",
    }  # fmt: skip
    (options,) = fake.inits
    assert options["config"] == config.to_dict() and options["resume"] == "allow"
    assert (options["project"], options["dir"]) == ("maskdm_jax", str(tmp_path))
    assert fake.runs[0].finished


@pytest.mark.parametrize("num_arrived", [0, 1, 2, 3, 5])
def test_a_resumed_run_sends_what_the_server_lacks_and_nothing_twice(
    config, tmp_path, fake, num_arrived
):
    telemetry = begin(config, tmp_path, 0)
    for step in range(1, 6):
        update(telemetry, tmp_path, step)
    for step in range(num_arrived + 1, 6):  # the process was killed with them
        del fake.rows[step]
    telemetry = begin(config, tmp_path, 2)  # from the checkpoint of step 2
    for step in range(3, 8):
        update(telemetry, tmp_path, step)
    telemetry.close()
    assert sorted(fake.rows) == [1, 2, 3, 4, 5, 6, 7]
    for step, row in fake.rows.items():
        assert row["loss"] == 1 / step and row["scores/fid"] == 10 * step
        assert row["preview"].endswith(f"{step}.png")
    assert len({options["id"] for options in fake.inits}) == 1


def test_an_evaluation_is_a_run_of_its_own_in_the_same_group(config, tmp_path, fake):
    begin(config, tmp_path, 0).close()
    mirror = wandb_mirror.start(config, tmp_path, "evaluate")
    mirror.evaluated(4, {"scores/fid": 1.0}, "n 10")
    mirror.close()
    training, evaluation = fake.inits
    assert training["id"] == training["group"] == evaluation["group"]
    assert evaluation["id"] != training["id"] and evaluation["job_type"] == "evaluate"
    assert fake.rows[None]["scores/step"] == 4


def test_a_new_run_without_login_or_server_is_one_sentence(config, tmp_path, fake):
    fake.logged_in = False
    with pytest.raises(ConfigError, match="no login is known here.*type wandb login, or --config"):
        wandb_mirror.start(config, tmp_path)
    fake.logged_in, fake.fails = True, "init"
    with pytest.raises(ConfigError, match="'online'.*no such host;.*log.wandb=offline$") as error:
        wandb_mirror.start(config, tmp_path)
    assert "\n" not in str(error.value)
    config.log.wandb = "offline"
    with pytest.raises(ConfigError, match="--config.log.wandb=off$"):
        wandb_mirror.start(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_does_without_a_server_and_catches_up_later(config, tmp_path, fake, capsys):
    update(begin(config, tmp_path, 0), tmp_path, 1)
    fake.fails = "init"
    update(begin(config, tmp_path, 1), tmp_path, 2)
    assert "W&B does not start: no such host; the run does without it" in capsys.readouterr().err
    fake.fails = ""
    update(begin(config, tmp_path, 2), tmp_path, 3)
    assert sorted(fake.rows) == [1, 2, 3]


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_failure_of_w_and_b_is_one_remark_and_the_run_continues(
    config, tmp_path, fake, capsys, fails
):
    fake.fails = fails
    telemetry = begin(config, tmp_path, 0)
    for step in (1, 2, 3):
        update(telemetry, tmp_path, step)
    telemetry.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    err = capsys.readouterr().err
    assert err.count("W&B failed") == 1 and "Traceback" not in err


# A start after two steps that is killed after the third.
KILLED = """
import os, pathlib, sys
sys.path.append("tests")
import test_wandb
config = test_wandb.default_config()
config.log.wandb = "offline"
test_wandb.begin(config, pathlib.Path(sys.argv[1]), 2).log(3, test_wandb.METRICS)
os._exit(0)
"""


def records_of(workdir):
    """The records of all offline runs in a workdir, run by run."""
    from wandb.proto import wandb_internal_pb2

    return [
        wandb_internal_pb2.Record.FromString(data)
        for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb"))
        for data in log_records(path.read_bytes())
    ]


def log_records(data):
    """The records of a file in the format of LevelDB's log, after W&B's seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if -at % 2**15 < 7:  # too near to the end of a block for a header
            at += -at % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield record
            record = b""


def test_an_offline_run_has_each_step_once_over_all_its_starts(config, tmp_path):
    pytest.importorskip("wandb", reason=NEEDS_WANDB)
    config.log.wandb = "offline"
    telemetry = begin(config, tmp_path, 0)
    for step in (1, 2):
        update(telemetry, tmp_path, step)
    telemetry.close()
    # With a service process of its own, as another command has.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    killed = [sys.executable, "-c", KILLED, str(tmp_path)]
    subprocess.run(killed, cwd=ROOT, env=env, check=True)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    telemetry = begin(config, tmp_path, 2)
    for step in (3, 4):
        update(telemetry, tmp_path, step)
    telemetry.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2  # without the killed one
    rows = [r.history for r in records_of(tmp_path) if r.HasField("history")]
    assert [row.step.num for row in rows] == [1, 2, 3, 4]
    for row in rows:
        values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item}
        step = row.step.num
        assert values["loss"] == 1 / step and values["scores/fid"] == 10 * step
        assert "n 12; ema" in values["scores/definition"] and "device" not in values
    shown = list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))
    pixels = {int(images.read_png(path, 1)[0, 0, 0]) for path in shown}
    assert pixels == {1, 2, 3, 4}


def test_an_offline_run_holds_the_config_and_nothing_of_the_machine(config, tmp_path):
    pytest.importorskip("wandb", reason=NEEDS_WANDB)
    config.log.wandb = "offline"
    telemetry = begin(config, tmp_path, 0)
    update(telemetry, tmp_path, 1)
    telemetry.close()
    records = records_of(tmp_path)
    run = next(r.run for r in records if r.HasField("run"))
    told = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert told["optim"] == config.optim.to_dict()
    assert (run.project, run.display_name) == ("maskdm_jax", tmp_path.name)
    assert not run.host and not run.git.remote_url
    kinds = {r.WhichOneof("record_type") for r in records}
    assert {"run", "history"} <= kinds and not kinds & {"environment", "output_raw", "stats"}
    content = b"".join(record.SerializeToString() for record in records)
    for private in (sys.executable, os.getcwd(), os.path.expanduser("~/")):
        assert private.encode() not in content, private
    sent = {path.suffix for path in tmp_path.glob("wandb/offline-run-*/files/**/*.*")}
    assert sent == {".png"}


def test_online_without_a_login_ends_main_with_one_sentence(run_main, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason=NEEDS_WANDB)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = run_main("pretrain_digits", tmp_path / "w", "--config.log.wandb=online")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: log.wandb is 'online', but W&B does not")
    assert "Traceback" not in done.stderr and "type wandb login" in done.stderr
