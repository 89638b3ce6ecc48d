"""Scores from end to end, their definitions, and combinations that are refused."""

import json

import numpy as np
import pytest
from test_inception import random_params, write_npz
from test_reference import pixels, write_folder

from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.quality import frechet, inception, measure, score

EVERY = ("fid", "kid", "precision_recall", "density_coverage", "memorisation", "swd")


def as_features(images_BHWC):
    """A stand-in for the network: six features, and "logits"."""
    x = images_BHWC.reshape(len(images_BHWC), -1).astype(np.float32) / 255
    projection = np.random.default_rng(0).normal(size=(x.shape[1], 6)).astype(np.float32)
    return {6: x @ projection, "logits": 5 * x @ projection[:, :4]}


def measured(images, metrics, extract=as_features, batch=7):
    batches = (images[i : i + batch] for i in range(0, len(images), batch))
    return measure.measure(batches, extract, metrics, "the samples")


@pytest.fixture
def sets():
    return [np.stack([pixels(i, 8, 8) for i in range(n, n + 20)]) for n in (0, 100, 200)]


def test_every_metric_is_computed_from_one_reading_of_each_set(sets):
    metrics = (*EVERY, "inception_score")
    samples, training, heldout = (measured(x, metrics) for x in sets)
    found = measure.scores(samples, training, metrics, heldout)
    names = {"fid", "kid", "precision", "recall", "density", "coverage"}
    names |= {"memorisation_ratio", "memorisation_share"}
    assert set(found) == {f"{name}6" for name in names} | {
        "inception_score", "inception_score_std", "swd", "swd_8",
    }  # fmt: skip
    same = measure.scores(samples, samples, metrics, heldout)
    assert same["fid6"] == pytest.approx(0, abs=1e-9) and same["swd"] == 0
    assert same["memorisation_ratio6"] == 0 and same["memorisation_share6"] == 1
    assert found["fid6"] > 0.01 and found["memorisation_ratio6"] > 0.5


def test_statistics_do_not_depend_on_the_batches(sets):
    one, many = (measured(sets[0], ["fid"], batch=b) for b in (20, 3))
    assert one.count == many.count == 20 and one.sha256 == many.sha256
    np.testing.assert_allclose(one.statistics[6].sigma_DD, many.statistics[6].sigma_DD, rtol=1e-6)
    expected = np.cov(as_features(sets[0])[6].astype(np.float64), rowvar=False)
    np.testing.assert_allclose(one.statistics[6].sigma_DD, expected, rtol=1e-6)


def test_only_what_the_metrics_need_is_kept(sets):
    fid = measured(sets[0], ["fid"])
    assert list(fid.features) == ["logits"] and fid.images is None
    swd = measured(sets[0], ["swd"], extract=None)
    assert not swd.statistics and (swd.images == sets[0]).all()


def test_the_layers_are_those_that_the_metrics_read():
    assert measure.layers(["swd"], [2048]) == ()
    assert measure.layers(["inception_score", "swd"], [2048]) == ("logits",)
    assert measure.layers(["kid", "inception_score"], [768, 64]) == (768, 64, "logits")


def test_features_that_are_not_finite_end_the_run_in_one_sentence(sets):
    def broken(images):
        features = as_features(images)
        features[6][2, 3] = np.nan
        return features

    with pytest.raises(RunError, match="features 6 of the samples are not finite near image 0"):
        measured(sets[0], ["fid"], broken)


def test_scores_of_different_definitions_are_refused_in_one_table(sets):
    weights = inception.Weights({}, 768, "a" * 64)
    small, large = measured(sets[0][:10], ["fid"]), measured(sets[0], ["fid"])
    ref, other = measured(sets[1], ["fid"]), measured(sets[2], ["fid"])

    def record(name, *args):
        return {"images": name, "definition": measure.definition(*args, ["fid"], weights)}

    measure.check_same_definition([record("A", large, ref), record("B", other, ref)])
    with pytest.raises(ConfigError, match="A and B .*: n is 10 and 20; score both"):
        measure.check_same_definition([record("A", small, ref), record("B", large, ref)])
    with pytest.raises(ConfigError, match="reference_sha256 is"):
        records = [record("A", large, ref), record("B", large, ref), record("C", large, other)]
        measure.check_same_definition(records)
    mixed = record("A", large, ref)
    mixed["definition"] |= {"network_sha256": "b" * 64}
    with pytest.raises(ConfigError, match="network_sha256 is bbb"):
        measure.check_same_definition([mixed, record("B", large, ref)])


def test_fewer_images_than_features_give_a_warning_with_the_number(sets):
    few, enough = measured(sets[0][:6], ["fid"]), measured(sets[1], ["fid"])
    (warning,) = measure.bias_warnings(few, enough)
    assert "FID-6 of 6 samples is biased" in warning
    assert measure.bias_warnings(enough, enough) == []


def test_too_few_images_for_a_metric_are_refused():
    measure.check_enough("the samples", 6, EVERY)
    with pytest.raises(ConfigError, match="density_coverage of .* at least 6 images, not 5"):
        measure.check_enough("the samples", 5, EVERY)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.npz"
    return write_npz(path, random_params(768), np.float16)


@pytest.fixture
def folders(tmp_path):
    paths = {}
    for name, first in (("drawn", 0), ("train", 100), ("unseen", 200)):
        images = [pixels(i, 16, 16) for i in range(first, first + 9)]
        paths[name] = write_folder(tmp_path / name, images)
    return paths


@pytest.fixture
def run(folders, weights, capsys):
    def run(*flags, images=folders["drawn"], ref=folders["train"]):
        flags = ("--images", images, "--reference", ref, "--batch_size", "8", *flags)
        code = score.main([*flags, "--inception_weights", weights])
        return code, *capsys.readouterr()

    return run


def test_the_command_prints_one_line_with_the_scores_and_their_definition(run, folders):
    metrics = ["--metrics", *EVERY, "--heldout", folders["unseen"]]
    code, out, err = run("--features", "64", *metrics)
    assert code == 0, err
    record = json.loads(out)
    assert out.count("\n") == 1
    assert record["fid64"] > 0 and {"kid64", "recall64", "coverage64", "swd_16"} <= set(record)
    definition = record["definition"]
    assert (definition["n"], definition["reference_n"], definition["heldout_n"]) == (9, 9, 9)
    assert definition["image_size"] == [16, 16] and definition["channels"] == 3
    assert definition["precision_recall_k"] == 3 and len(definition["network_sha256"]) == 64
    assert record["images_sha256"] != definition["reference_sha256"]
    assert record["device"] == "8 x cpu" and record["versions"]["jax"] and record["seconds"] > 0
    assert "features of 27 images on 8 x cpu: about 0:" in err
    assert len(record["warnings"]) == 2 and "warning: FID-64 of 9 samples is biased" in err


def test_statistics_of_the_reference_give_the_same_score(run, tmp_path):
    stats = str(tmp_path / "train.npz")
    code, out, _ = run("--features", "64", "--save_reference", stats)
    from_images = json.loads(out)
    code, out, err = run("--features", "64", ref=stats)
    assert code == 0, err
    from_file = json.loads(out)
    assert from_file["fid64"] == pytest.approx(from_images["fid64"])
    measure.check_same_definition([from_images, from_file])
    both = run("--features", "64", images=stats, ref=stats)
    assert json.loads(both[1])["fid64"] == pytest.approx(0, abs=1e-9)


def fails(result, *parts):
    code, out, err = result
    last = err.strip().splitlines()[-1]
    assert code == 2 and not out and last.startswith("error: "), err
    assert all(part in last for part in parts), last


def test_statistics_of_other_features_or_another_network_are_refused(run, tmp_path):
    stats = frechet.Statistics(np.zeros(192), np.eye(192), 9)
    frechet.write(tmp_path / "s.npz", stats)
    path = str(tmp_path / "s.npz")
    fails(run("--features", "64", ref=path), "192 features", "type --features 192")
    stats = stats._replace(made_by={"network_sha256": "f" * 64})
    frechet.write(path, stats)
    fails(run("--features", "192", ref=path), "of the network ffffffff")
    fails(run("--metrics", "fid", "kid", ref=path), "statistics, which give fid alone")


def test_features_beyond_the_weights_are_refused(run):
    fails(run(), "ends at features 768, but 2048 are asked for", "type --features=768")
    fails(run("--metrics", "inception_score"), "needs at least 10 images, not 9")


def test_a_score_that_is_no_number_is_printed_as_null(folders, capsys, monkeypatch):
    monkeypatch.setattr(score.measure, "scores", lambda *_: {"swd": float("nan")})
    flags = ["--images", folders["drawn"], "--reference", folders["train"], "--metrics", "swd"]
    assert score.main(flags) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["swd"] is None


def test_pixels_alone_need_no_weights(folders, capsys):
    flags = ["--images", folders["drawn"], "--reference", folders["train"], "--metrics", "swd"]
    assert score.main([*flags, "--inception_weights", "/none"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "network" not in record["definition"] and record["swd"] > 0


def test_combinations_that_give_no_score_are_refused(run, folders, tmp_path, monkeypatch):
    fails(run("--metrics", "memorisation"), "type both --metrics memorisation and --heldout")
    fails(run("--heldout", folders["unseen"]), "or neither")
    stats = ["--save_reference", str(tmp_path / "s.npz")]
    fails(run("--features", "64", "192", *stats), "type one number after --features")
    fails(run("--features", "64", "--save_reference", "s.txt"), "type s.npz")
    grey = write_folder(tmp_path / "grey", [pixels(0, 16, 16, 1)] * 2)
    fails(run("--features", "64", images=grey), "is grey, but", "is colour")
    monkeypatch.setattr(score, "_measure_all", lambda *_: pytest.fail("the sets are read first"))
    below = str(tmp_path / "grey/a/s.npz")
    (tmp_path / "grey/a").write_text("")
    fails(run("--features", "64", "--save_reference", below), f"{below} cannot be written")
    (tmp_path / "d.npz").mkdir()
    fails(run("--features", "64", "--save_reference", f"{tmp_path}/d.npz"), "d.npz/reference.npz")
    large = write_folder(tmp_path / "large", [pixels(0, 20, 20)] * 2)
    fails(run("--features", "64", ref=large), "16x16", "20x20", "--size 16x16")


def test_sets_of_another_size_are_cut_to_compare_neighbours(sets):
    x = np.random.default_rng(0).normal(size=(1200, 4)).astype(np.float32)
    few, many = (
        measure.Measured("", len(z), (8, 8, 3), {4: None}, {4: z}, None) for z in (x[:200], x[200:])
    )
    found = measure.scores(few, many, ("density_coverage", "precision_recall"))
    assert found["coverage4"] > 0.85 and found["precision4"] > 0.5
