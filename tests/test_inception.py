"""The FID network against pytorch-fid's own class and stored features, and its weight files."""

import functools
import hashlib
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile

import jax
import numpy as np
import pytest
from close import assert_close
from conftest import NEEDS_TORCH
from PIL import Image

from maskdm_jax.errors import ConfigError
from maskdm_jax.quality import inception, inception_weights, score


def random_params(last, seed=0):
    """Parameters of the right shapes, under which activations keep their size."""
    generator = np.random.default_rng(seed)

    def draw(shape):
        fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 100
        return (generator.normal(size=shape) * (2 / fan_in) ** 0.5).astype(np.float32)

    return jax.tree.map(lambda x: draw(x.shape), inception.expected_params(last))


def graph_names():
    """{layer of the TensorFlow graph: layer of ours}, spelled out as a second source."""
    names = {f"conv{s}": n for s, n in zip(["", "_1", "_2", "_3", "_4"], (
        "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
    ), strict=True)}  # fmt: skip
    small = ["branch1x1", "branch5x5_1", "branch5x5_2"]
    small += [f"branch3x3dbl_{i}" for i in (1, 2, 3)]
    theirs = ["conv", "tower_conv", "tower_conv_1"]
    theirs += ["tower_1_conv", "tower_1_conv_1", "tower_1_conv_2"]
    for block, name in (("mixed", "5b"), ("mixed_1", "5c"), ("mixed_2", "5d")):
        pairs = zip([*theirs, "tower_2_conv"], [*small, "branch_pool"], strict=True)
        names |= {f"{block}_{a}": f"Mixed_{name}.{b}" for a, b in pairs}
    names |= {"mixed_3_conv": "Mixed_6a.branch3x3", "mixed_3_tower_conv": "Mixed_6a.branch3x3dbl_1"}
    names |= {f"mixed_3_tower_conv_{i}": f"Mixed_6a.branch3x3dbl_{i + 1}" for i in (1, 2)}
    for block, name in (("4", "6b"), ("5", "6c"), ("6", "6d"), ("7", "6e")):
        wide = {"conv": "branch1x1", "tower_conv": "branch7x7_1", "tower_2_conv": "branch_pool"}
        wide |= {f"tower_conv_{i}": f"branch7x7_{i + 1}" for i in (1, 2)}
        wide |= {"tower_1_conv": "branch7x7dbl_1"}
        wide |= {f"tower_1_conv_{i}": f"branch7x7dbl_{i + 1}" for i in (1, 2, 3, 4)}
        names |= {f"mixed_{block}_{a}": f"Mixed_{name}.{b}" for a, b in wide.items()}
    return names


def write_npz(path, params, dtype=np.float32, **more):
    theirs = {ours: name for name, ours in graph_names().items()}
    arrays = {f"{theirs[k]}/w": v["kernel"].astype(dtype) for k, v in params.items()}
    arrays |= {f"{theirs[k]}/b": v["bias"].astype(dtype) for k, v in params.items()}
    np.savez(path, **arrays, **more)
    return str(path)


@functools.cache
def pictures(n, height=40, width=48, channels=3):
    return np.random.default_rng(7).integers(0, 256, (n, height, width, channels), np.uint8)


@pytest.fixture(scope="module")
def extractor():
    weights = inception.Weights(random_params(768), 768, "0" * 64)
    return inception.Extractor(weights, (768, 64), 8)


def torch_state(seed=0):
    """A state dict under pytorch-fid's names: {name: array}, with batch norm that matters."""
    generator = np.random.default_rng(seed)
    state = {}
    for layer, leaves in random_params("logits", seed).items():
        kernel = leaves["kernel"]
        if layer == "fc":
            state |= {"fc.weight": kernel.T, "fc.bias": np.ones(1008, np.float32)}
            continue
        channels = kernel.shape[-1]
        state[f"{layer}.conv.weight"] = kernel.transpose(3, 2, 0, 1)
        state[f"{layer}.bn.weight"] = generator.uniform(0.7, 1.2, channels).astype(np.float32)
        state[f"{layer}.bn.bias"] = leaves["bias"]
        state[f"{layer}.bn.running_mean"] = leaves["bias"][::-1].copy()
        # Some near the epsilon of 0.001, which then shows.
        state[f"{layer}.bn.running_var"] = generator.uniform(0.4, 1.5, channels).astype(np.float32)
        state[f"{layer}.bn.running_var"][:2] = 0.01
        state[f"{layer}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    return state


_KEPT = []  # names of operators end with the object that defined them


def name_missing_operators(torch):
    """Lets torchvision be imported beside another build of PyTorch than its own.

    Its compiled operators do not load then. The layers that pytorch-fid takes from it need none of
    them, but the import needs their names.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None:
        return
    check = "import torchvision"
    if subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0:
        return
    library = torch.library.Library("torchvision", "DEF")
    source = (pathlib.Path(found.origin).parent / "_meta_registrations.py").read_text()
    for name in sorted(set(re.findall(r'(?:torchvision::|register_meta\(")(\w+)', source))):
        library.define(f"{name}(Tensor a) -> Tensor")
    _KEPT.append(library)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(pytorch-fid's Inception module, its weights, their file), with random weights."""
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    name_missing_operators(torch)
    theirs = pytest.importorskip("pytorch_fid.inception", reason=NEEDS_TORCH)
    state = {name: torch.from_numpy(x.copy()) for name, x in torch_state().items()}
    path = str(tmp_path_factory.mktemp("published") / "weights.pth")
    torch.save(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: state)
        yield theirs, state, path


def test_the_network_is_pytorch_fids_with_the_same_weights(published):
    import torch

    theirs, state, path = published
    images = pictures(2)
    model = theirs.InceptionV3([0, 1, 2, 3]).eval()
    found = model(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    expected = {x.shape[1]: x.mean(dim=(2, 3)).numpy() for x in found}
    expected["logits"] = expected[2048] @ state["fc.weight"].numpy().T

    weights = inception_weights.load(path)
    assert weights.last == "logits"
    extract = inception.Extractor(weights, inception.LAYERS, 2, jax.devices()[:1])
    ours = extract(images)
    assert list(ours) == list(inception.LAYERS)
    for layer in inception.LAYERS:
        assert_close(ours[layer], expected[layer], 1e-4)


@pytest.mark.filterwarnings("ignore")  # scipy, on how pytorch-fid calls it
def test_the_fid_of_two_folders_is_pytorch_fids(published, tmp_path):
    from pytorch_fid import fid_score

    *_, weights = published
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        generator = np.random.default_rng(seed)
        for i in range(24):
            noise = generator.integers(0, 60 + 40 * seed, (24, 24, 3), np.uint8)
            Image.fromarray(noise + np.uint8(i)).save(tmp_path / name / f"{i}.png")
    paths = [str(tmp_path / name) for name in "ab"]
    expected = fid_score.calculate_fid_given_paths(paths, 12, "cpu", 64, num_workers=0)
    found = score.score(*paths, features=(64,), weights_path=weights, batch_size=16)
    assert found["fid64"] == pytest.approx(expected, rel=1e-4)


def test_stored_features_of_real_images_are_reproduced():
    if not (root := os.environ.get("INCEPTION_GOLDEN")):
        pytest.skip("INCEPTION_GOLDEN names no folder with weights/, golden/ and data/")
    root = pathlib.Path(root)
    weights = inception_weights.load(root / "weights/inception_2015_12_05_to_mixed_7.npz")
    with np.load(root / "golden/inception_features.npz") as golden:
        with zipfile.ZipFile(root / "data/celeba64/celeba64.zip") as archive:
            files = [io.BytesIO(archive.read(name)) for name in golden["names"]]
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        found = inception.Extractor(weights, (64, 192, 768), 8)(images)
        for dims in (64, 192, 768):
            assert_close(found[dims], golden[f"f{dims}"], 1e-4)


def test_a_padded_batch_over_8_devices_gives_the_features_of_each_image(extractor):
    images = pictures(8)
    whole = extractor(images)
    assert extractor.batch_size == 8 and set(whole) == {64, 768}
    assert whole[768].shape == (8, 768) and whole[768].dtype == np.float32
    for layer, features in extractor(images[3:6]).items():
        assert_close(features, whole[layer][3:6], 1e-5)


def test_every_product_is_in_full_float32_on_any_device():
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    params = {"params": inception.expected_params("logits")}
    program = jax.jit(inception.InceptionV3("logits").apply).lower(params, image).as_text()
    products = [
        line
        for line in program.splitlines()
        if re.search(r"= stablehlo\.(convolution|dot_general)", line)
    ]
    assert len(products) >= 95
    assert all(line.count("HIGHEST") == 2 for line in products)


def test_the_batch_size_is_rounded_up_to_the_devices():
    weights = inception.Weights(random_params(64), 64, "0" * 64)
    assert inception.Extractor(weights, (64,), 9).batch_size == 16


def test_grey_images_have_the_features_of_the_same_images_in_rgb(extractor):
    grey = pictures(2, channels=1)
    as_rgb = extractor(np.repeat(grey, 3, axis=-1))
    assert_close(extractor(grey), as_rgb, 1e-6)


def test_the_npz_of_the_graph_is_read_under_its_names_in_float16_too(tmp_path):
    params = random_params(768)
    exact = inception_weights.load(write_npz(tmp_path / "w.npz", params))
    jax.tree.map(np.testing.assert_array_equal, exact.params, params)
    assert exact.last == 768
    assert exact.sha256 == hashlib.sha256((tmp_path / "w.npz").read_bytes()).hexdigest()
    half = inception_weights.load(write_npz(tmp_path / "h.npz", params, np.float16))
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype(np.float32)}
    assert_close(half.params, params, 1e-3)
    assert half.sha256 != exact.sha256


def test_the_names_of_the_graph_are_mapped_one_to_one():
    assert len(graph_names()) == len(inception.expected_params(768))
    for theirs, ours in graph_names().items():
        assert inception_weights._torch_name(theirs) == ours
    for other in ("mixed_8_conv", "mixed_3_tower_1_conv", "dense", "mixed_9_tower_conv"):
        assert inception_weights._torch_name(other) == other


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


def test_another_network_is_refused_with_the_first_difference(tmp_path):
    params = random_params(768)
    params["Mixed_6e.branch1x1"]["kernel"] = np.zeros((3, 3, 768, 192), np.float32)
    with pytest.raises(ConfigError) as error:
        inception_weights.load(write_npz(tmp_path / "other.npz", params))
    one_sentence(error, "another network", "Mixed_6e.branch1x1", "(3, 3, 768, 192)", "type ")
    np.savez(tmp_path / "mlp.npz", dense=np.zeros((3, 4)))
    with pytest.raises(ConfigError) as error:
        inception_weights.load(str(tmp_path / "mlp.npz"))
    one_sentence(error, "another network")
    content = (tmp_path / "mlp.npz").read_bytes()
    for place in (150, content.index(b"PK\x01\x02")):  # among the zeros; the zip's directory
        damaged = bytearray(content)
        damaged[place] ^= 1
        (tmp_path / "mlp.npz").write_bytes(damaged)
        with pytest.raises(ConfigError) as error:
            inception_weights.load(str(tmp_path / "mlp.npz"))
        one_sentence(error, "is damaged", "type ")


def test_torch_files_of_other_networks_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDS_TORCH)
    state = {"layer.conv.weight": torch.zeros(2, 3, 3, 3), "layer.weight": torch.zeros(3)}
    torch.save(state, tmp_path / "other.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for name, part in (
        ("other", "another network"),
        ("tensor", "holds a Tensor"),
        ("text", "is not a PyTorch checkpoint"),
    ):
        with pytest.raises(ConfigError) as error:
            inception_weights.load(str(tmp_path / f"{name}.pth"))
        one_sentence(error, part)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    params = random_params(768)
    params["Mixed_5b.branch1x1"]["bias"][3] = np.nan
    with pytest.raises(ConfigError) as error:
        inception_weights.load(write_npz(tmp_path / "nan.npz", params))
    one_sentence(error, "damaged: Mixed_5b.branch1x1 is not finite")


def test_a_missing_file_is_refused_with_where_to_get_it(tmp_path):
    with pytest.raises(ConfigError) as error:
        inception_weights.load(str(tmp_path / "no.npz"), "--config.eval.inception_weights")
    one_sentence(error, "--config.eval.inception_weights", inception_weights.URL)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "maskdm_jax" / inception_weights.NAME


def test_without_internet_the_error_names_the_file_and_the_flag(cache, monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(ConfigError) as error:
        inception_weights.load()
    one_sentence(error, inception_weights.URL, "type --inception_weights=FILE", "no route to host")
    assert not list(cache.parent.iterdir())


def test_the_published_file_is_downloaded_once_and_checked(cache, monkeypatch):
    calls = []

    def reply(url, timeout):
        calls.append(url)
        return io.BytesIO(b"the weights")

    monkeypatch.setattr(urllib.request, "urlopen", reply)
    with pytest.raises(ConfigError) as error:
        inception_weights._published("--inception_weights")
    one_sentence(error, "SHA-256", inception_weights.SHA256[:16])
    assert not list(cache.parent.iterdir())  # a wrong download is not kept
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(b"the weights").hexdigest())
    for _ in range(2):
        path = inception_weights._published("--inception_weights")
    assert path == cache and cache.read_bytes() == b"the weights" and len(calls) == 2
    cache.write_bytes(b"damaged")
    with pytest.raises(ConfigError) as error:
        inception_weights._published("--inception_weights")
    one_sentence(error, "delete it and run again")
