"""Several processes: how they find each other, what each reads, and what happens when one dies."""

import http.server
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from conftest import xla_flags
from sklearn.datasets import load_digits

from maskdm_jax import checkpoint, errors
from maskdm_jax.data.loader import Order
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import distributed
from maskdm_jax.run.command_line import TRY_AGAIN
from maskdm_jax.run.telemetry import read_metrics

_CLUSTERS = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "GCE_", "CUDA_VISIBLE_DEVICES")
FLAGS = [
    "--config.checkpoint.every_steps=5", "--config.train.log_every_steps=1",
    "--config.sample.preview_steps=2",
]  # fmt: skip
ROOT = pathlib.Path(__file__).parents[1]
STEP = 3  # the step that two_processes.py reads
_TWO_TASKS = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}


@pytest.fixture
def cluster(monkeypatch):
    """(environment) -> arguments of jax.distributed.initialize there; None if it is not called."""
    for name in list(os.environ):
        if name.startswith(_CLUSTERS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    # A cluster's host does not have the tests' platform.
    monkeypatch.setattr(type(jax.config), "jax_platforms", None)

    def started(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
        distributed.start()
        names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
        return {k: v for k, v in calls[0].items() if k in names} if calls else None

    return started


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"SLURM_NTASKS": "8"}, None),  # in a batch script, outside of srun
        (_TWO_TASKS | {"SLURM_NTASKS": "1"}, None),
        (_TWO_TASKS | {"SLURM_STEP_NUM_NODES": "2"}, {"local_device_ids": []}),
        (_TWO_TASKS | {"SLURM_STEP_NUM_NODES": "1"}, {}),
        (
            _TWO_TASKS | {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "0"},
            {"local_device_ids": []},
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
    ],
    ids=[
        "one-host", "slurm-batch", "slurm-one-task", "slurm-task-per-node", "slurm-task-per-gpu",
        "slurm-sees-one-gpu", "mpi-one", "mpi-two", "gke-one-host", "gke-two-hosts", "two-slices",
    ],
)  # fmt: skip
def test_several_processes_are_detected(cluster, environment, expected):
    assert cluster(environment) == expected


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.1"}, None),
        ({"worker-network-endpoints": "u:u:10.0.0.1,u:u:10.0.0.2"}, {}),
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": "MEGASCALE_NUM_SLICES: '2'\n"}, {}),
        ({}, None),
    ],
    ids=["one-host", "two-hosts", "two-slices", "no-tpu"],
)
def test_a_tpu_vm_finds_the_number_of_hosts_in_its_metadata(
    cluster, monkeypatch, attributes, expected
):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = attributes.get(self.path.rpartition("/attributes/")[2])
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args):
            pass

    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name == "libtpu")
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert cluster({"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}) == expected
        server.shutdown()


@pytest.mark.parametrize(
    "given, expected",
    [
        (("node0:1234", 2, None), "--process_id not given"),
        ((None, None, 0), "--coordinator and --num_processes not given"),
        (("node0", 2, 0), "--coordinator is 'node0'; expected the host"),
        (("node0:0", 2, 0), "a port from 1 to 65535; type --coordinator=node0:12345"),
        (("node0:1234", 0, 0), "--num_processes is 0"),
        (("node0:1234", 2, 2), "--process_id is 2; expected 0 to 1"),
    ],
)
def test_incomplete_and_impossible_flags_are_named(given, expected):
    with pytest.raises(ConfigError) as error:
        distributed.start(*given)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="This needs a host without GPU.")
def test_processes_without_the_devices_they_want_each_end_with_one_sentence(
    run_main, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    processes = pair(run_main, tmp_path / "w")
    said = [p.communicate(timeout=60)[1] for p in processes]
    assert [p.returncode for p in processes] == [2, 2], said
    for text in said:
        assert text.startswith("error: JAX_PLATFORMS is 'cuda'") and text.count("\n") == 1
        assert "type JAX_PLATFORMS=cpu before the command" in text
    assert not (tmp_path / "w").exists()


def test_one_process_of_one_starts_nothing():
    distributed.start("node0:1234", 1, 0)
    assert not distributed.several() and distributed.is_main()
    assert distributed.agreed([3, 1]) == [3, 1]


@pytest.mark.parametrize("process_id", [0, 1])
def test_processes_that_do_not_come_together_end_with_one_sentence(process_id):
    code = (
        "from maskdm_jax.run import distributed; distributed._START_S = 1; "
        f"distributed.start('127.0.0.1:{free_port()}', 2, {process_id})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == errors.StartError.exit_code == 70
    assert result.stderr.count("\n") == 1 and "error: the coordinator 127.0.0.1" in result.stderr


def test_each_process_reads_its_own_rows_and_agrees_with_process_0(data_dir, tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_processes", coordinator, str(i), data_dir, tmp_path],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": xla_flags(4)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    output = ended(processes)
    # From the last lines of two_processes.py: a folder that the processes do not share.
    assert processes[1].returncode == 2 and processes[0].returncode != 0, output
    assert "is not the folder that process 0 has there" in output[1]

    order = Order(0, 1797).ids(16 * STEP, 16)
    rows, asked = ([np.load(tmp_path / f"{n}{i}.npy") for i in (0, 1)] for n in ("rows", "asked"))
    assert rows[0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(16))
    for mine, others, read in zip(rows, rows[::-1], asked, strict=True):
        assert set(order[mine]) <= set(read) and not set(order[others]) & set(read)
    digits = load_digits().images
    for images in np.load(tmp_path / "images.npy"):
        np.testing.assert_array_equal(images[..., 0], np.rint(digits[order] * 255 / 16))


def test_two_processes_train_like_one_through_a_sigterm_and_draw(run_main, tmp_path):
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    flags = ["--config.train.num_steps=40", *FLAGS, "--config.checkpoint.every_steps=20"]
    result = run_main("pretrain_digits", alone, *flags, devices=8)
    assert result.returncode == 0, result.stderr

    step = terminate(pair(run_main, stopped, *flags), 1, stopped)
    output = finish(pair(run_main, stopped, *flags, "--config.train.sample_every_steps=40"))
    assert f"resuming from step {step}" in output[0] and "step" not in output[1]
    np.testing.assert_allclose(losses(stopped), losses(alone), rtol=1e-5)
    assert (stopped / "previews" / "step_0000040.png").exists()

    sampling = ["--mode=sample", "--config.sample.num=5", "--config.sample.batch_size=8"]
    finish(pair(run_main, stopped, *sampling, "--config.sample.steps=3"))
    assert len(list(stopped.glob("samples/*/00000?.png"))) == 5
    assert len(list(stopped.glob("samples/*/grid.png"))) == 1


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_resumes_as_if_undisturbed(run_main, tmp_path):
    alone, calm = tmp_path / "alone", tmp_path / "calm"
    flags = ["--config.train.num_steps=40", *FLAGS]
    further = ["--config.train.num_steps=44", *FLAGS]
    assert run_main("pretrain_digits", alone, *further, devices=8).returncode == 0
    finish(pair(run_main, calm, *flags))
    np.testing.assert_allclose(losses(calm), losses(alone)[:40], rtol=1e-5)

    for index in (0, 1):  # process 0 is the coordinator
        killed = tmp_path / f"killed_{index}"
        kill(pair(run_main, killed, *flags), index, killed)
        left = checkpoint.steps(killed)
        finish(pair(run_main, killed, *flags))
        assert losses(killed) == losses(calm)
        assert checkpoint.digest(killed) == checkpoint.digest(calm)
        print(f"\nprocess {index} killed after checkpoints {left}, resumed to "
              f"{checkpoint.digest(killed)}; undisturbed {checkpoint.digest(calm)}; "
              f"{len(losses(calm))} losses equal")  # fmt: skip

    # The same checkpoint resumes in one process, with 8 devices and with 2.
    for devices in (8, 2):
        workdir = tmp_path / f"on_{devices}"
        shutil.copytree(killed, workdir)
        result = run_main("pretrain_digits", workdir, *further, devices=devices)
        assert result.returncode == 0 and "resuming from step 40" in result.stdout, result.stderr
        assert losses(workdir)[:40] == losses(calm)
        np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)
        furthest = np.max(np.abs(np.divide(losses(workdir), losses(alone)) - 1))
        print(f"40 to 44 in one process with {devices} devices: losses within {furthest:.1e}")


def pair(run_main, workdir, *flags):
    """main.py in two processes of 4 CPU devices each."""
    port = free_port()
    return [
        run_main(
            "pretrain_digits", workdir, *flags, f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2", f"--process_id={i}", wait=False, devices=4,
        )
        for i in range(2)
    ]  # fmt: skip


def kill(processes, index, workdir):
    """Kills one with kill -9 after the second checkpoint, and waits for the other to end."""
    try:
        deadline = time.time() + 120
        while (checkpoint.steps(workdir) or [0])[-1] < 10:
            assert all(p.poll() is None for p in processes) and time.time() < deadline
            time.sleep(0.02)
        processes[index].send_signal(signal.SIGKILL)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    ended(processes)
    # 1 and 2 would mean that a person has to act.
    assert processes[1 - index].returncode in (errors.StartError.exit_code, -signal.SIGABRT)
    assert 10 <= checkpoint.steps(workdir)[-1] < 40


def terminate(processes, index, workdir):
    """Sends SIGTERM to one in mid-run; both save and exit with 75. Returns the step of the save."""
    before = len(read_metrics(workdir))
    try:
        deadline = time.time() + 120
        while len(read_metrics(workdir)) <= before:
            assert all(p.poll() is None for p in processes) and time.time() < deadline
            time.sleep(0.02)
        processes[index].send_signal(signal.SIGTERM)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    output = ended(processes)
    assert [p.returncode for p in processes] == [TRY_AGAIN] * 2, output
    stopped, last = map(int, re.search(r"asked to stop at step (\d+) of (\d+)", output[0]).groups())
    assert stopped == checkpoint.steps(workdir)[-1] == read_metrics(workdir)[-1]["step"] < last
    return stopped


def finish(processes):
    output = ended(processes)
    assert all(p.returncode == 0 for p in processes), output
    return output


def ended(processes):
    """The output of each, after all have ended."""
    try:
        return [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()


def losses(workdir):
    return [record["loss"] for record in read_metrics(workdir)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
