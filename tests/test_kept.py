"""What is kept of a measured set: the same numbers, and nothing that is damaged or out of date."""

import dataclasses
import pathlib

import numpy as np
import pytest
from test_reference import pixels
from test_score import measured

from maskdm_jax.quality import kept

METRICS = ("fid", "kid")


def path_of(folder, version="v1", count=20, metrics=METRICS):
    keep_as = pathlib.Path(folder) / f"train-measured-{version}"
    return kept.path_of(keep_as, count, metrics, (64, "logits"), "ab" * 32)


@pytest.fixture(scope="module")
def images():
    found = measured(np.stack([pixels(i, 8, 8) for i in range(20)]), METRICS)
    return dataclasses.replace(
        found,
        statistics={64: found.statistics[6]},
        features={64: found.features[6], "logits": found.features["logits"]},
    )


def test_what_is_kept_is_what_was_measured(images, tmp_path, capsys):
    path = path_of(tmp_path)
    assert kept.read(path) is None
    kept.write(path, images)
    found = kept.read(path)
    assert (found.sha256, found.count, found.shape) == (images.sha256, 20, (8, 8, 3))
    assert found.features.keys() == {64, "logits"} and found.statistics.keys() == {64}
    for layer, x_ND in images.features.items():
        np.testing.assert_array_equal(found.features[layer], x_ND)
    for ours, theirs in zip(found.statistics[64], images.statistics[64], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert f"kept what was measured, 0.00 GiB, in {path}" in capsys.readouterr().err


@pytest.mark.parametrize("at", [0, 0.5, -30])
def test_a_damaged_file_is_measured_again_with_a_remark(images, tmp_path, capsys, at):
    path = path_of(tmp_path)
    kept.write(path, images)
    data = bytearray(path.read_bytes())
    place = int(at * len(data)) if 0 < at < 1 else at
    data[place] ^= 0xFF
    path.write_bytes(data)
    assert kept.read(path) is None
    path.write_bytes(data[: len(data) // 2])
    assert kept.read(path) is None
    assert capsys.readouterr().err.count("measuring these images again") == 2


def test_other_images_layers_or_networks_have_files_of_their_own(tmp_path):
    paths = {path_of(tmp_path), path_of(tmp_path, "v2"), path_of(tmp_path, count=19)}
    assert len(paths | {path_of(tmp_path, metrics=("fid",))}) == 4
    # Metrics that need the same of a set share one.
    assert path_of(tmp_path, metrics=("fid", "density_coverage", "swd")) in paths


def test_earlier_versions_of_the_set_and_unfinished_files_are_removed(images, tmp_path):
    old, other = path_of(tmp_path, "v0"), tmp_path / "train-part-measured-v0-1.npz"
    for path in (old, other, tmp_path / f".{old.name}.host-1"):
        path.write_bytes(b"")
    few = path_of(tmp_path, count=19)
    kept.write(few, images)
    kept.write(path_of(tmp_path), images)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {few.name, path_of(tmp_path).name, other.name, ".measured_lock"}


def test_a_folder_that_cannot_be_written_is_no_error(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    kept.write(path_of(tmp_path / "file"), images)
    assert "the next start measures again" in capsys.readouterr().err
