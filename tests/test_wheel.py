"""The package as it is installed without a checkout: what a wheel holds, and that it trains."""

import importlib.metadata
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

import maskdm_jax

# All that a wheel is built from.
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "maskdm_jax", "configs"]


@pytest.fixture
def sources(tmp_path):
    """A copy of them, since a build leaves files in its folder."""
    pytest.importorskip("setuptools", reason="This needs setuptools.")
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def run(*command, cwd, path=None):
    """What a command prints; it finds the package in `path`."""
    env = {**os.environ, "PYTHONPATH": str(path)} if path else os.environ
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_installed_package_finds_its_configs_without_a_checkout(sources, tmp_path):
    built = tmp_path / "built"
    run(sys.executable, "setup.py", "-q", "build", f"--build-lib={built}", cwd=sources)
    package = built / "maskdm_jax"
    assert names(package / "configs") == names(ROOT / "configs")
    assert names(package) == names(ROOT / "maskdm_jax") | {
        f"configs/{name}" for name in names(ROOT / "configs")
    }
    assert (package / "py.typed").exists()
    load = "from maskdm_jax import config_file as c; print(*[c.load(p).seed for p in c.shipped()])"
    said = run(sys.executable, "-c", load, cwd=tmp_path, path=built)
    assert len(said.split()) == len(names(ROOT / "configs")) - 1  # all but __init__.py


def test_setup_py_and_the_citation_name_the_version_of_the_package(sources):
    said = run(sys.executable, "setup.py", "--version", cwd=sources)
    assert said.split()[-1] == maskdm_jax.__version__
    assert f"\nversion: {maskdm_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_a_wheel_trains_samples_and_reports_from_any_folder(sources, tmp_path, data_dir):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", sources, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    run(*pip, "install", "--no-deps", f"--target={installed}", wheel, cwd=tmp_path)

    (found,) = importlib.metadata.distributions(name="maskdm_jax", path=[str(installed)])
    assert found.version == maskdm_jax.__version__
    assert found.metadata["License"] == "Apache-2.0"
    assert any(path.name == "LICENSE" for path in found.files)
    assert found.metadata["Requires-Python"] == ">=3.11"
    assert found.metadata.get_payload().startswith("# maskdm_jax\n")

    maskdm = [installed / "bin" / "maskdm"]
    tiny = [f"--config.{name}={value}" for name, value in TINY.items()]
    tiny += [f"--config.data.dir={data_dir}", "--workdir=W", "--config.train.num_steps=2"]
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    said = run(*maskdm, "train", "--config=scratch_digits", *tiny, cwd=folder, path=installed)
    assert "is at step 2" in said
    few = ["--config.sample.num=2", "--config.sample.steps=2"]
    run(*maskdm, "sample", "--config=scratch_digits", *tiny, *few, cwd=folder, path=installed)
    assert len(list(folder.glob("W/samples/*/00000?.png"))) == 2
    run(*maskdm, "report", "W", "--out=report.html", cwd=folder, path=installed)
    page = (folder / "report.html").read_text()
    assert "maskdm train --config=configs/" in page
    assert "--test_share" in run(*maskdm, "prepare", "--help", cwd=folder, path=installed)
    assert run(*maskdm, "digest", "W", cwd=folder, path=installed).startswith("step 2 sha256 ")


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
