"""Fixtures that many tests share: a tiny digits config, the golden outputs, and main.py."""

import gc
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request


def xla_flags(num_devices):
    """XLA_FLAGS for a process with `num_devices` CPU devices and fast compilation: most tests
    compile for longer than they compute. The user's own XLA_FLAGS are kept."""
    return (
        f"{os.environ['TEST_XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices} "
        "--xla_cpu_parallel_codegen_split_count=1 "
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    )


# Before JAX is imported: 8 CPU devices, and a compilation cache that processes share. With
# TEST_PLATFORM=cuda (`make test-gpu`) the tests of GPU kernels run on a GPU.
os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The user's own flags, such as --xla_cpu_max_isa=AVX2. A worker inherits them under this name.
os.environ.setdefault("TEST_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
os.environ["XLA_FLAGS"] = xla_flags(8)
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the folder
    _CACHE = tempfile.TemporaryDirectory(prefix="maskdm_xla_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from configs import pretrain_digits  # noqa: E402
from maskdm_jax import sharding, train  # noqa: E402
from maskdm_jax.data import digits  # noqa: E402
from maskdm_jax.model import uvit  # noqa: E402
from maskdm_jax.run import files  # noqa: E402
from maskdm_jax.state import abstract_state  # noqa: E402
from maskdm_jax.weights import torch_io  # noqa: E402

# Tracing makes many small objects, and looking for cycles among them takes a tenth of the suite.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

ROOT = pathlib.Path(__file__).parents[1]
BUCKET = "pod-runs"  # the emulator's
DATA = pathlib.Path(__file__).parent / "data"
NEEDS_TORCH = "This needs PyTorch, which `make test EXTRAS=peer` installs."

# A model that compiles in seconds; as flags for main.py and as fields for the API.
TINY = {"model.width": 32, "model.depth": 3, "model.num_heads": 2, "train.batch_size": 16}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A TFDS folder that holds the digits."""
    folder = tmp_path_factory.mktemp("tfds")
    digits.write_digits(folder)
    return folder


@pytest.fixture
def tiny_config(data_dir):
    """Masked pre-training of a tiny model on the digits."""
    config = pretrain_digits.get_config()
    config.update_from_flattened_dict(TINY)
    config.data.dir = str(data_dir)
    config.optim.warmup_steps = 2
    config.train.log_every_steps = 1
    config.sample.batch_size = 8
    config.sample.steps = 4
    return config


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_dir):
    """The workdir of a tiny model after two steps. Copy it before anything writes into it."""
    config = pretrain_digits.get_config()
    config.update_from_flattened_dict(TINY)
    config.data.dir = str(data_dir)
    config.train.update(num_steps=2, sample_every_steps=0)
    workdir = tmp_path_factory.mktemp("trained")
    train.train(config, workdir)
    return workdir


def zero_state(config):
    """A state of zeros on one device, for tests that give it parameters: nothing is compiled."""
    shapes = abstract_state(config, sharding.make_mesh(config, jax.devices()[:1]))
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)


@pytest.fixture(scope="session")
def golden():
    """Outputs of the official implementation (arrays are NCHW there)."""
    with np.load(DATA / "golden_uvit.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def golden_schedules():
    with np.load(DATA / "golden_schedules.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def official_model():
    """(U-ViT, the weights that gave `golden`)."""
    model = uvit.UViT(num_patches=64, patch_dim=48, width=64, depth=4, num_heads=4)
    with np.load(DATA / "official_uncond_model.npz") as file:
        return model, torch_io.from_official(dict(file))


@pytest.fixture
def run_main(data_dir):
    """Runs main.py in a process of its own: a tiny model on the digits."""

    def run(config, workdir, *flags, wait=True, devices=1, own_group=False):
        command = [sys.executable, "main.py", f"--config=configs/{config}.py"]
        command += [f"--workdir={workdir}", f"--config.data.dir={data_dir}"]
        command += [f"--config.{name}={value}" for name, value in TINY.items()]
        process = subprocess.Popen(
            [*command, *flags],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": xla_flags(devices)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=own_group,
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


class Emulator:
    """An emulator of Cloud Storage, in a process of its own."""

    def __init__(self, folder):
        port_file = folder / "port"
        program = ROOT / "tests" / "bucket_emulator.py"
        command = [sys.executable, str(program), BUCKET, str(port_file)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not (port_file.exists() and port_file.read_text().endswith("\n")):
            assert self.process.poll() is None
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{port_file.read_text().strip()}"

    def fail(self, code, more=""):
        """From now on each request fails with that code; 0: none does."""
        urllib.request.urlopen(f"{self.url}/fail?code={code}{more}").read()


@pytest.fixture(scope="session")
def storage_emulator(tmp_path_factory):
    """An emulator that runs until the last test."""
    pytest.importorskip("gcp_storage_emulator", reason="This needs the extra test.")
    started = Emulator(tmp_path_factory.mktemp("emulator"))
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture
def bucket_dir(storage_emulator, request, monkeypatch):
    """The place of an empty folder in an emulated bucket."""
    import fsspec.config

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage_emulator.url)
    monkeypatch.setitem(fsspec.config.conf, "gcs", {})
    name = re.sub(r"\W+", "_", request.node.name)
    return files.place(f"gs://{BUCKET}/{name}", "folder")
