"""Two runs in one workdir: the second waits, then refuses; a dead run's lock is taken over."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from maskdm_jax.errors import ConfigError
from maskdm_jax.run import lock

HOLD = """
import sys, time
from maskdm_jax.run import lock
with lock.one_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder():
    """(workdir, seconds) -> a process that holds it for so long."""
    processes = []

    def start(workdir, seconds):
        command = [sys.executable, "-c", HOLD, str(workdir), str(seconds)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_with_who_holds_the_workdir(holder, tmp_path, capsys):
    first = holder(tmp_path / "w", 60)
    before = (tmp_path / "w" / ".run_lock").read_text()
    with pytest.raises(lock.InUse, match="in use by a run on"):
        with lock.one_run(tmp_path / "w", wait_s=0):
            pytest.fail("the lock was given to two")
    assert capsys.readouterr().out == ""
    with pytest.raises(lock.InUse) as error:
        with lock.one_run(tmp_path / "w", wait_s=0.6):
            pytest.fail("the lock was given to two")
    text = str(error.value)
    assert f"process {first.pid}, started 2" in text and os.uname().nodename in text
    assert "is in use by a run on" in capsys.readouterr().out
    assert (tmp_path / "w" / ".run_lock").read_text() == before


def test_a_second_run_waits_for_the_first_to_end(holder, tmp_path, capsys):
    holder(tmp_path, 1.0)
    with lock.one_run(tmp_path):
        out = capsys.readouterr().out
    assert "waiting up to 60 s" in out and "taking over" not in out


def test_the_lock_of_a_killed_run_is_taken_over_with_a_line(holder, tmp_path, capsys):
    first = holder(tmp_path, 60)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with lock.one_run(tmp_path):
        assert f"taking over {tmp_path} from a run on" in capsys.readouterr().out
    with lock.one_run(tmp_path):
        assert capsys.readouterr().out == ""


def test_a_folder_that_a_failed_start_made_is_gone(tmp_path):
    with pytest.raises(ConfigError, match="no data"), lock.one_run(tmp_path / "a" / "w"):
        raise ConfigError("no data")
    assert not (tmp_path / "a" / "w").exists()
    with lock.one_run(tmp_path / "w"):
        (tmp_path / "w" / "metrics.jsonl").touch()
    assert (tmp_path / "w" / "metrics.jsonl").exists()
    (tmp_path / "w" / "metrics.jsonl").unlink()
    with lock.one_run(tmp_path / "w"):
        pass
    assert (tmp_path / "w").exists()  # it was there before


def test_a_second_first_start_holds_the_workdir_that_the_failed_first_one_removed(tmp_path):
    workdir = tmp_path / "w"
    code = HOLD.replace("held", "failed").replace("time.sleep", "sys.stdin.readline(); float")
    fails = subprocess.Popen(
        [sys.executable, "-c", code, str(workdir), "0"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert fails.stdout.readline() == "failed\n"
    waits = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir), "60"],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        assert "waiting up to" in waits.stdout.readline()
        fails.communicate("\n")
        assert waits.stdout.readline() == "held\n"
        # The lock is that of the file in the folder: a third run sees it.
        file = (workdir / ".run_lock").open("a+")
        with file, pytest.raises(BlockingIOError):
            lock.fcntl.flock(file, lock.fcntl.LOCK_EX | lock.fcntl.LOCK_NB)
    finally:
        waits.kill()
        waits.communicate()
