"""Official files against PyTorch itself: a textbook U-ViT there, and strict loading."""

import collections

import numpy as np
import pytest
from close import assert_close
from conftest import NEEDS_TORCH
from test_torch_io import KINDS, assert_same, exported, tiny

import maskdm_jax
from maskdm_jax.diffusion import ddpm
from maskdm_jax.weights import torch_file, torch_io

torch = pytest.importorskip("torch", reason=NEEDS_TORCH)

import textbook_torch  # noqa: E402


def peer(kind):
    """A textbook U-ViT of a kind of `KINDS`, with random weights, none of them zero."""
    options = {name.removeprefix("model."): value for name, value in KINDS[kind].items()}
    torch.manual_seed(0)
    network = textbook_torch.UViT(**options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def tables():
    betas = ddpm.make_betas("cosine", 1000, (16, 16)).astype(np.float32)
    return {"betas": betas}


def write(path, network, dtype=torch.float32, **options):
    """An official checkpoint, by PyTorch; lr is a NumPy scalar, as the official code leaves it."""
    optimizer = torch.optim.AdamW(network.parameters())
    sum(p.sum() for p in network.parameters()).backward()
    optimizer.step()  # which makes its moments
    optimizer.zero_grad()
    state = textbook_torch.Diffusion(network, tables()).state_dict()
    state = collections.OrderedDict((k, v.to(dtype)) for k, v in state.items())
    optimizer.param_groups[0]["lr"] = np.float64(2e-4)
    ema = {f"ema_model.{k}": v for k, v in state.items()}
    tree = {"step": 7, "model": state, "opt": optimizer.state_dict(), "ema": ema, "scaler": None}
    torch.save(tree, path, **options)
    return state


def outputs(network, num_classes):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 16, 16, generator=generator)
    t = torch.tensor([0, 3, 400, 999])
    label = torch.tensor([0, 2, 4, 5]) if num_classes else None  # the last is "no class"
    with torch.no_grad():
        eps = network(x, t, label).numpy()
    label = None if label is None else label.numpy()
    return x.movedim(1, -1).numpy(), t.numpy(), label, np.moveaxis(eps, 1, -1)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_pytorch_gives_pytorchs_outputs(tmp_path, kind, zipped):
    network = peer(kind)
    path = tmp_path / "official.pt"
    write(path, network, _use_new_zipfile_serialization=zipped)
    model = maskdm_jax.load(path, fields={"model.num_heads": 4, "model.dtype": "float32"})
    x, t, label, eps = outputs(network, model.num_classes)
    assert_close(model.predict(x, t, label)[1], eps, 1e-5)


def test_bfloat16_tensors_of_pytorch_are_read(tmp_path):
    network = peer("all")
    state = write(tmp_path / "half.pt", network, torch.bfloat16)
    found = torch_io.load_official(str(tmp_path / "half.pt"), "raw").params
    kernel = state["model.encoder.mid_block.attn.qkv.weight"]
    assert kernel.dtype == torch.bfloat16
    np.testing.assert_array_equal(found["mid_block"]["qkv"]["kernel"], kernel.float().numpy().T)


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_loads_an_exported_file_strictly_bit_for_bit(tmp_path, kind):
    config = tiny(**KINDS[kind])
    path, params, ema = exported(tmp_path, config)
    tree = torch.load(path, weights_only=True)
    assert list(tree) == ["step", "model", "opt", "ema", "scaler"] and tree["step"] == 9
    betas = {k: v.numpy() for k, v in tree["model"].items() if not k.startswith("model.")}
    diffusion, average = (textbook_torch.Diffusion(peer(kind), betas) for _ in range(2))
    diffusion.load_state_dict(tree["model"], strict=True)
    both = textbook_torch.Average(diffusion, average)
    both.load_state_dict(tree["ema"], strict=True)
    assert both.initted.item() is True and both.step.item() == 9
    optimizer = torch.optim.AdamW(diffusion.parameters())
    optimizer.load_state_dict(tree["opt"])
    assert optimizer.param_groups[0]["lr"] == config.optim.lr_peak
    assert list(tree["model"]) == list(diffusion.state_dict())
    for model, expected in ((diffusion, params), (average, ema)):
        state = {k: v.numpy() for k, v in model.state_dict().items()}
        assert_same(torch_io.from_official(state), expected)
        model = model.model
        x, t, label, eps = outputs(model, config.model.num_classes)
        weights = "raw" if expected is params else "ema"
        ours = maskdm_jax.load(tmp_path / "run", weights=weights, fields={"model.dtype": "float32"})
        assert_close(ours.predict(x, t, label)[1], eps, 1e-5)


def test_a_file_of_pytorch_comes_back_with_its_bytes(tmp_path):
    network = peer("all")
    state = write(tmp_path / "official.pt", network)
    official = torch_io.load_official(str(tmp_path / "official.pt"), "raw")
    made = torch_io.to_official(official.params, official.patch_size, official.channels)
    torch_file.save(str(tmp_path / "again.pt"), {"model": made})
    again = torch.load(tmp_path / "again.pt", weights_only=True)["model"]
    expected = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    assert list(again) == list(expected)
    for name, tensor in again.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
