"""A workdir in a bucket, against an emulator of Google Cloud Storage on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from conftest import BUCKET, ROOT, TINY, Emulator, xla_flags

from configs import finetune_digits, pretrain_digits
from maskdm_jax import checkpoint, evaluate, sample, train
from maskdm_jax.errors import BucketError, ConfigError
from maskdm_jax.run import bucket, bucket_lock, files, lock, telemetry

REQUESTS_END_SOON = """
import sys
from maskdm_jax import main
from maskdm_jax.run import bucket, bucket_lock
bucket.LOST_S = bucket._CHECK_S = 5
bucket_lock._RENEW_S = 1
main.main()
"""


@pytest.fixture(scope="module")
def emulator(storage_emulator):
    """The emulator, and in the environment where its clients look for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", storage_emulator.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", storage_emulator.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        yield storage_emulator


@pytest.fixture
def folder(emulator, request):
    """A folder of the bucket for this test alone."""
    yield files.place(f"gs://{BUCKET}/{request.node.originalname}", "--workdir")
    emulator.fail(0)


@pytest.fixture(scope="module")
def run(emulator, data_dir):
    """(config, workdir in the bucket) of a run that saves every step, after two steps."""
    config = pretrain_digits.get_config()
    config.update_from_flattened_dict(TINY)
    config.data.dir = str(data_dir)
    config.checkpoint.every_steps = 1
    config.train.update(num_steps=2, sample_every_steps=0, log_every_steps=1)
    config.sample.update(batch_size=8, steps=2, num=8, preview_num=4, preview_steps=2)
    workdir = files.place(f"gs://{BUCKET}/run", "--workdir")
    train.train(config, workdir)
    return config, workdir


def listed(folder):
    return set(files.below(folder))


def test_a_resumed_run_is_bit_for_bit_that_of_a_local_disk(run, tmp_path):
    config, workdir = run
    config.train.num_steps = 4
    train.train(config, tmp_path)
    config.train.sample_every_steps = 4
    train.train(config, workdir)
    assert checkpoint.digest(workdir) == checkpoint.digest(tmp_path)
    assert checkpoint.steps(workdir) == checkpoint.steps(tmp_path)
    assert [r["step"] for r in telemetry.read_metrics(workdir)] == [1, 2, 3, 4]
    assert {"config.json", "metrics.jsonl", "previews/step_0000004.png"} <= listed(workdir)


def test_the_second_stage_starts_from_a_bucket_and_draws_and_scores_there(run):
    before, start = run
    config, workdir = finetune_digits.get_config(), start.parent / "tuned"
    config.update_from_flattened_dict(TINY)
    config.data.dir, config.init.path = before.data.dir, str(start)
    config.sample = before.sample
    config.train.update(num_steps=1, sample_every_steps=0)
    train.train(config, workdir)
    drawn = sample.write_samples(config, workdir)
    assert len(listed(drawn)) == config.sample.num + len({"grid.png", "settings.json"})
    assert sample.missing(config, drawn) == []
    (drawn / "000003.png").unlink()
    assert sample.missing(config, drawn) == [3]
    config.eval.update(num=8, metrics=("swd",), heldout_split="")
    (record,) = evaluate.evaluate(config, workdir)
    assert record["scores"]["swd"] > 0
    assert telemetry.read_scores(workdir) == [record]
    assert evaluate.evaluate(config, workdir) == [record]


def test_no_folder_is_named_after_a_bucket(run):
    assert not [name for name in os.listdir() if name.startswith("gs")]


def test_a_checkpoint_counts_from_orbaxs_mark_on_and_a_damaged_one_is_set_aside(run):
    _, workdir = run
    before = checkpoint.steps(workdir)
    newest = checkpoint.directory(workdir) / str(before[-1])
    files.write_text(checkpoint.directory(workdir) / "9" / "state" / "_METADATA", "{}")
    assert checkpoint.steps(workdir) == before
    files.write_text(newest / "state" / "manifest.ocdbt", "other bytes")
    assert checkpoint.find_step(workdir, set_aside=True) == before[-2]
    assert checkpoint.steps(workdir) == before[:-1]
    assert f"{before[-1]}/state/manifest.ocdbt" in listed(workdir / "damaged_checkpoints")


def test_a_bucket_that_does_not_answer_is_no_empty_workdir(folder, monkeypatch):
    assert checkpoint.steps(folder) == []

    async def fails(*args, **options):
        raise ConnectionResetError

    monkeypatch.setattr(bucket.system(), "_info", fails)
    with pytest.raises(ConnectionResetError):
        checkpoint.steps(folder)


def test_metrics_are_in_the_bucket_before_the_checkpoint_of_their_step(
    folder, tiny_config, monkeypatch
):
    # Orbax also saves what a new run hands it first, here at the first preview.
    tiny_config.train.update(num_steps=3, sample_every_steps=2)
    tiny_config.checkpoint.every_steps = 3
    tiny_config.sample.update(preview_num=4, preview_steps=2)
    save, seen, points = checkpoint.Checkpoints.save, {}, {}

    def recorded(self, step, *args, **options):
        seen[step] = [r["step"] for r in telemetry.read_metrics(folder)]
        (events,) = (
            p
            for n, p in files.below(folder).items()
            if n.startswith("tensorboard/events") and not n.endswith(".config")
        )
        points[step] = events.stat().length
        return save(self, step, *args, **options)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", recorded)
    train.train(tiny_config, folder)
    assert seen[2] == [1, 2] and seen[3] == [1, 2, 3]
    assert points[3] > points[2] > 100


def test_a_growing_file_is_copied_when_it_is_due_and_at_the_end(folder, monkeypatch):
    monkeypatch.setattr(bucket, "_COPY_S", 0)
    monkeypatch.setattr(bucket, "_COPY_SHARE", 0)
    growing = files.growing(folder)
    (growing.local / "lines").write_text("a")
    growing.sync()
    growing._pending.result()
    assert (folder / "lines").read_text() == "a"
    monkeypatch.setattr(bucket, "_COPY_S", 60)
    growing.sync(now=True)
    (growing.local / "lines").write_text("ab")
    growing.sync()
    assert growing._pending is None and (folder / "lines").read_text() == "a"
    growing.close()
    assert (folder / "lines").read_text() == "ab"


def test_a_second_run_is_refused_while_the_first_renews_its_lock(folder, monkeypatch):
    monkeypatch.setattr(bucket_lock, "_RENEW_S", 0.1)
    with lock.one_run(folder):
        with pytest.raises(lock.InUse, match=f"in use by a run on {socket.gethostname()}, proc"):
            with lock.one_run(folder, wait_s=1):
                pass
    with lock.one_run(folder):
        pass
    assert not listed(folder)


def test_an_error_is_not_hidden_by_a_lock_that_cannot_be_released(folder, emulator):
    with pytest.raises(ValueError, match="of the run"):
        with lock.one_run(folder):
            emulator.fail(403, "&method=DELETE")
            raise ValueError("of the run")


def test_a_run_that_waits_does_not_give_up_on_a_holder_that_dies_meanwhile(folder, monkeypatch):
    monkeypatch.setattr(bucket_lock, "_RENEW_S", 0.1)
    monkeypatch.setattr(bucket_lock, "_EXPIRES_S", 2)
    facts = {"host": "there", "pid": 1, "started": "then"}
    elsewhere = bucket_lock.Lock(folder / ".run_lock", facts)
    elsewhere._record["machine"] = "another"
    assert elsewhere.acquire() is None
    threading.Timer(0.5, elsewhere._released.set).start()
    with lock.one_run(folder, wait_s=1.5):
        pass


def test_a_lock_that_was_released_never_ends_its_process(folder, monkeypatch):
    monkeypatch.setattr(bucket_lock, "_RENEW_S", 0.1)
    monkeypatch.setattr(bucket, "LOST_S", -1)
    ended, renews, released = [], threading.Event(), threading.Event()
    monkeypatch.setattr(bucket_lock, "_end", ended.append)
    held = bucket_lock.Lock(folder / ".run_lock", {"host": "a", "pid": 1, "started": "now"})

    def unanswered(method, **options):
        if method == "PATCH":
            renews.set()
            released.wait(20)
            raise TimeoutError

    others = threading.enumerate()
    assert held.acquire() is None
    monkeypatch.setattr(held, "_request", unanswered)
    # The emulator has threads of its own.
    (renewal,) = (t for t in threading.enumerate() if t not in others and "_renew" in t.name)
    assert renews.wait(20)
    held.release()
    released.set()
    renewal.join(20)
    assert not ended and not renewal.is_alive()


def held_by(folder):
    return json.loads((folder / ".run_lock").read_text())


def test_of_two_processes_one_gets_the_lock(folder):
    facts = {"host": "a", "pid": os.getpid(), "started": "now"}
    locks = [bucket_lock.Lock(folder / ".run_lock", facts) for _ in range(8)]
    held = []
    threads = [threading.Thread(target=lambda one=one: held.append(one.acquire())) for one in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held.count(None) == 1
    assert bucket_lock.Lock(folder / ".run_lock", facts).acquire() == {**facts, **held_by(folder)}
    for one in locks:  # else it would end this process once the emulator is gone
        one._released.set()


def test_the_lock_of_a_dead_process_is_taken_over_at_once_and_a_silent_one_later(
    folder, monkeypatch, capsys
):
    dead = subprocess.Popen(["true"])
    dead.wait()
    facts = {"host": "here", "pid": dead.pid, "started": "then"}
    monkeypatch.setattr(bucket_lock, "_RENEW_S", 1000)
    here = bucket_lock.Lock(folder / ".run_lock", facts)
    assert here.acquire() is None
    with lock.one_run(folder):
        assert "taking over" in capsys.readouterr().out
    elsewhere = bucket_lock.Lock(folder / ".run_lock", facts)
    elsewhere._record["machine"] = "another"
    assert elsewhere.acquire() is None
    monkeypatch.setattr(bucket_lock, "_EXPIRES_S", 2)
    start = time.monotonic()
    with lock.one_run(folder):
        assert time.monotonic() - start > 2
    for one in (here, elsewhere):
        one._released.set()


def test_a_run_whose_lock_was_taken_over_ends(folder, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(bucket_lock, "_RENEW_S", 0.1)
    held = bucket_lock.Lock(folder / ".run_lock", {"host": "a", "pid": 1, "started": "now"})
    monkeypatch.setattr(bucket_lock, "_end", lambda _: (ended.set(), held._released.set()))
    assert held.acquire() is None
    (folder / ".run_lock").unlink()
    assert ended.wait(20)


@pytest.mark.parametrize(
    "path", ["s3://bucket/run", "az://bucket/run", "file:///tmp/run", "gs:/run", "hdfs://a/b"]
)
def test_other_urls_are_refused(path):
    with pytest.raises(ConfigError, match="or gs://BUCKET/FOLDER in Google Cloud Storage; type"):
        files.place(path, "--workdir")


@pytest.mark.parametrize("path", ["gs://", "gs://x/run", "gs://Upper/run", "gs://bucket//run"])
def test_what_cannot_be_a_bucket_is_refused(path):
    with pytest.raises(ConfigError, match="expected gs://BUCKET/FOLDER"):
        files.place(path, "--workdir")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (404, "there is no bucket named-so-{code}; type"),
        (401, "no Google credentials that are valid are found here; type gcloud auth"),
        (403, "may not use it .* expected the role Storage Object User on the bucket; type gcl"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_refused_at_once(emulator, code, said):
    emulator.fail(code)
    start = time.monotonic()
    try:
        with pytest.raises(ConfigError, match=said.format(code=code)):
            files.place(f"gs://named-so-{code}/run", "--workdir")
    finally:
        emulator.fail(0)
    assert time.monotonic() - start < 20


def test_expired_credentials_are_refused_before_a_request(folder, monkeypatch):
    import gcsfs.retry

    def expired():
        raise gcsfs.retry.HttpError({"code": 401, "message": "Invalid Credentials"})

    monkeypatch.setattr(bucket.system().credentials, "maybe_refresh", expired)
    with pytest.raises(ConfigError, match="no Google credentials that are valid"):
        files.place("gs://another-bucket/run", "--workdir")


def test_a_bucket_that_can_only_be_read_is_refused(emulator, folder):
    emulator.fail(403, "&method=POST")
    with pytest.raises(ConfigError, match="cannot be written to .* Storage Object User"):
        with lock.one_run(folder):
            pass


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"type pip install '.\[gcs\]'"):
        files.place("gs://some-bucket/run", "--workdir")


def test_requests_are_repeated_while_the_bucket_answers_503(emulator, folder):
    emulator.fail(503)
    threading.Timer(1, emulator.fail, (0,)).start()
    files.write_text(folder / "note", "kept")
    assert (folder / "note").read_text() == "kept"


def test_after_a_while_a_lost_bucket_is_one_sentence(monkeypatch):
    pytest.importorskip("gcsfs", reason="This needs the extra test.")
    monkeypatch.setattr(bucket, "LOST_S", 2)
    tried = []

    def fails():
        tried.append(0)
        raise TimeoutError("no answer")

    with pytest.raises(BucketError, match="does not answer .no answer.* the same command resumes"):
        bucket.retried(fails)
    assert len(tried) > 1
    assert BucketError.exit_code == 75


def test_a_local_run_loads_nothing_for_buckets(data_dir, tmp_path):
    flags = ["--config=configs/pretrain_digits.py", f"--workdir={tmp_path / 'w'}"]
    flags += [f"--config.data.dir={data_dir}", "--config.train.num_steps=1"]
    flags += [f"--config.{name}={value}" for name, value in TINY.items()]
    code = (
        "import sys; from maskdm_jax import main; main.main()\n"
        "print([m for m in ('gcsfs', 'aiohttp') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, *flags]
    assert subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-1] == "[]"


def big(run_main, workdir, *flags, **options):
    """A run whose saves take long enough to be interrupted."""
    return run_main(
        "pretrain_digits",
        workdir,
        "--config.model.width=128",
        "--config.checkpoint.every_steps=5",
        "--config.train.log_every_steps=1",
        "--config.train.sample_every_steps=0",
        *flags,
        **options,
    )


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_save_resumes_from_the_one_before(run_main, folder):
    process = big(run_main, folder, "--config.train.num_steps=500", wait=False)

    def is_saving():
        begun = {name.split("/")[1] for name in listed(folder) if name.startswith("checkpoints/")}
        return len(checkpoint.steps(folder)) > 1 and len(begun) > len(checkpoint.steps(folder))

    wait_for(is_saving, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    whole = checkpoint.steps(folder)
    assert [r["step"] for r in telemetry.read_metrics(folder)][: whole[-1]] == list(
        range(1, whole[-1] + 1)
    )
    last = whole[-1] + 5
    again = big(run_main, folder, f"--config.train.num_steps={last}")
    assert again.returncode == 0, again.stderr
    assert "taking over" in again.stdout and "resuming from step" in again.stdout
    assert checkpoint.steps(folder)[-1] == last
    assert [r["step"] for r in telemetry.read_metrics(folder)] == list(range(1, last + 1))


@pytest.mark.slow
def test_two_processes_share_a_workdir_in_a_bucket(run_main, folder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--config.mesh.fsdp=2"]
    flags += ["--config.train.num_steps=10", "--config.model.num_heads=2"]
    processes = [
        big(run_main, folder, *flags, f"--process_id={i}", wait=False, devices=2) for i in (0, 1)
    ]
    for process in processes:
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
    assert checkpoint.steps(folder)[-1] == 10
    assert checkpoint.digest(folder)[0] == 10


def small(folder, data_dir, *flags):
    command = [sys.executable, "-c", REQUESTS_END_SOON, "--config=configs/pretrain_digits.py"]
    command += [f"--workdir={folder}", f"--config.data.dir={data_dir}", *flags]
    command += [f"--config.{name}={value}" for name, value in TINY.items()]
    command += ["--config.train.num_steps=100000", "--config.checkpoint.every_steps=20"]
    env = {**os.environ, "XLA_FLAGS": xla_flags(1)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["503", "gone"])
def test_a_run_that_loses_its_bucket_ends_with_75_and_the_bucket_stays_whole(
    how, data_dir, tmp_path, monkeypatch, folder, emulator
):
    own = emulator
    if how == "gone":
        own = Emulator(tmp_path)
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            monkeypatch.setenv(name, own.url)
    process = small(folder, data_dir, "--config.train.sample_every_steps=0")
    if how == "gone":
        time.sleep(1)
        wait_for(lambda: _has(own, "commit_success.txt"), process)
        own.process.kill()
    else:
        wait_for(lambda: len(checkpoint.steps(folder)) > 1, process)
        own.fail(503)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert err.strip().splitlines()[-1].startswith("error: the bucket does not answer")
    assert "Traceback" not in err
    if how == "503":
        own.fail(0)
        # The newest may lack its hashes, and then counts as unfinished.
        assert checkpoint.find_step(folder) in checkpoint.steps(folder)[-2:]
        assert telemetry.read_metrics(folder)[-1]["step"] >= checkpoint.steps(folder)[-1]


def _has(emulator, text):
    return text in urllib.request.urlopen(f"{emulator.url}/b/{BUCKET}/o").read().decode()
