"""Every implementation is softmax attention; kernels run in interpret mode on the CPU."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import assert_close
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maskdm_jax import sharding
from maskdm_jax.model import attention, uvit
from maskdm_jax.model.attention import Plan, attend, plan
from maskdm_jax.model.kernels import short_attention, splash_attention
from maskdm_jax.model.kernels.short_attention import MAX_LENGTH


def qkv(length, num_heads=2, head_dim=16, batch=1):
    shape = (3, batch, length, num_heads, head_dim)
    return np.random.default_rng(length).normal(size=shape).astype(np.float32)


def softmax_attention(q, k, v, num_valid):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("blkh,bmkh->bklm", q, k[:, :num_valid]) / q.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bklm,bmkh->blkh", weights, v[:, :num_valid])


def short(q, k, v, num_valid):
    return short_attention.short_attention(jnp.stack([q, k, v], axis=2), num_valid, True)


def long(q, k, v, num_valid):
    return splash_attention.splash_attention(q, k, v, num_valid, True)


def by_xla(q, k, v, num_valid):
    return attend(q, k, v, Plan("xla", q.shape[1], num_valid, None))


@pytest.mark.parametrize("padding", [0, 3])
# 1,025 takes the same path as 4,097: several blocks of 384 tokens, the last partly padding.
@pytest.mark.parametrize("length", [5, 17, 417, 1025])
@pytest.mark.parametrize("implementation", [by_xla, short, long])
def test_every_implementation_is_softmax_attention(implementation, length, padding):
    if implementation is short and length > MAX_LENGTH:
        length = MAX_LENGTH - padding
    q, k, v = qkv(length + padding, num_heads=1)
    out = jax.jit(implementation, static_argnums=3)(q, k, v, length)
    expected = softmax_attention(q, k, v, length)
    assert_close(out[:, :length], expected[:, :length], 1e-5)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    "kernel, length, num_valid",
    [
        (short, 29, 29),
        (short, 53, 50),
        (short, 86, 86),
        (long, 512, 512),
        (long, 417, 417),
        (long, 768, 760),
    ],
)
def test_the_kernels_gradients_are_those_of_xla(kernel, length, num_valid):
    q, k, v = qkv(length)
    dout = np.zeros_like(q)
    dout[:, :num_valid] = qkv(length)[0][:, :num_valid]

    def gradients(implementation):
        _, pullback = jax.vjp(lambda *a: implementation(*a, num_valid), q, k, v)
        return pullback(dout)

    for ours, xla in zip(gradients(kernel), gradients(by_xla), strict=True):
        assert_close(ours, xla, 1e-5)


@pytest.mark.parametrize("batch", [8, 3])
@pytest.mark.parametrize(
    "implementation, kernel, length",
    [("pallas", "short_attention", 29), ("splash", "splash_attention", 261)],
)
def test_on_a_mesh_each_device_runs_the_kernel_on_its_own_images(
    monkeypatch, implementation, kernel, length, batch
):
    module = attention._kernels(kernel)
    original = getattr(module, kernel)
    batches_seen = []

    def interpreted(*args, num_valid):
        batches_seen.append(args[0].shape[0])
        return original(*args, num_valid, True)

    monkeypatch.setattr(module, kernel, interpreted)
    monkeypatch.setattr(attention, "_misses", lambda *args: "")
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    spec = PartitionSpec(("data", "fsdp")) if batch == 8 else PartitionSpec()
    q, k, v = jax.device_put(
        qkv(length, batch=batch), NamedSharding(mesh, PartitionSpec(None, *spec))
    )

    def loss(q, k, v, implementation, mesh):
        out = attend(q, k, v, Plan(implementation, length, length - 2, mesh))
        return jnp.sum(jnp.square(out[:, : length - 2]))  # a sum without cancellation

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=(3, 4))
    value, grads = gradients(q, k, v, implementation, mesh)
    assert set(batches_seen) == {1 if batch == 8 else 3}  # 3 do not divide: each device runs all
    assert all(grad.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4) for grad in grads)
    expected_value, expected_grads = gradients(q, k, v, "xla", None)
    assert_close((value, grads), (expected_value, expected_grads), 1e-5)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_packed_and_split_qkv_give_the_same_loss_and_gradients(monkeypatch, qkv_bias):
    original = short_attention.short_attention
    monkeypatch.setattr(
        short_attention, "short_attention", lambda x, num_valid: original(x, num_valid, True)
    )
    monkeypatch.setattr(attention, "_misses", lambda *args: "")
    x_BVP = jax.random.normal(jax.random.key(0), (2, 16, 12))
    t_B = jnp.array([3, 40])
    fields = dict(num_patches=16, patch_dim=12, width=32, depth=3, num_heads=2, qkv_bias=qkv_bias)
    packed, split = (uvit.UViT(**fields, attention=name) for name in ("pallas", "xla"))
    # No bias stays zero; a constant added to all weights would cost digits in every norm.
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape),
        uvit.init_params(split, jax.random.key(1)),
    )

    def loss(params, model):
        return jnp.sum(jnp.square(uvit.apply(model, params, x_BVP, t_B)))

    compute = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    assert_close(compute(params, packed), compute(params, split), 1e-5)


@pytest.mark.parametrize("kernel", ["cudnn", "pallas", "hopper", "splash"])
def test_a_kernel_that_the_machine_lacks_falls_back_with_one_warning(kernel):
    attention._warn_once.cache_clear()
    q, k, v = qkv(17)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = (attend(q, k, v, plan(kernel, 17, 16, q.dtype)) for _ in range(2))
    assert_close(first, softmax_attention(q, k, v, 17), 1e-5)
    np.testing.assert_array_equal(first, second)
    assert len(caught) == 1 and kernel in str(caught[0].message)


def mesh_of(**device):
    devices = np.array([types.SimpleNamespace(**device)])
    return types.SimpleNamespace(devices=devices, size=1)


def test_on_a_gpu_the_length_decides_the_kernel_and_its_padding():
    a100 = mesh_of(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    h200 = mesh_of(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")

    def planned(implementation, length, head_dim, gpu, dtype=jnp.bfloat16):
        made = plan(implementation, length, head_dim, dtype, gpu)
        assert made.num_valid == length
        return made.kernel, made.length - length, made.packed

    for gpu in (a100, h200):
        assert planned("auto", 29, 64, gpu) == ("pallas", 0, True)
        assert planned("auto", 128, 64, gpu) == ("cudnn", 0, False)
        assert planned("auto", 4097, 72, gpu) == ("cudnn", 1, False)
        assert planned("auto", 4097, 64, gpu, jnp.float32) == ("xla", 0, False)
        assert planned("xla", 4097, 64, gpu) == ("xla", 0, False)
        assert planned("cudnn", 417, 64, gpu) == ("cudnn", 1, False)
    assert planned("auto", 4097, 64, a100) == ("cudnn", 1, False)
    assert planned("auto", 418, 64, a100) == ("cudnn", 0, False)
    assert planned("auto", 4097, 64, h200) == ("hopper", 0, True)
    # Visible patches, pooled tokens and the time.
    for length in (143, 170, 185, 647):
        assert planned("auto", length, 64, h200) == ("hopper", 0, True)
        assert planned("auto", length, 64, a100) == ("cudnn", length % 2, False)
    for gpu in (a100, h200):
        assert planned("auto", 86, 64, gpu) == ("pallas", 0, True)


# What Colab and clouds rent: (device_kind as JAX names it, compute capability).
T4, A100, A10, L4, RTX_4090 = (
    mesh_of(platform="gpu", device_kind=kind, compute_capability=capability)
    for kind, capability in (
        ("Tesla T4", "7.5"),
        ("NVIDIA A100-SXM4-40GB", "8.0"),
        ("NVIDIA A10G", "8.6"),
        ("NVIDIA L4", "8.9"),
        ("NVIDIA GeForce RTX 4090", "8.9"),
    )
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_gpu_older_than_hopper_has_a_kernel_for_every_recipe(dtype):
    for length in (10, 18, 29, 65, 257, 417, 4097):
        assert plan("auto", length, 64, dtype, T4)[:3] == ("xla", length, length)
        for gpu in (A100, A10, L4, RTX_4090):
            found = plan("auto", length, 64, dtype, gpu)
            fused = ("pallas", length) if length < 128 else ("cudnn", length + length % 2)
            assert found[:2] == (("xla", length) if dtype == jnp.float32 else fused)


def test_cards_with_little_shared_memory_leave_wide_heads_to_xla():
    for gpu in (A10, L4, RTX_4090):
        assert plan("auto", 104, 128, jnp.bfloat16, gpu).kernel == "xla"
        assert plan("auto", 64, 128, jnp.bfloat16, gpu).kernel == "pallas"
        assert plan("auto", 127, 64, jnp.bfloat16, gpu).kernel == "pallas"
    assert plan("auto", 104, 128, jnp.bfloat16, A100).kernel == "pallas"


def test_a_gpu_without_bfloat16_attends_in_float32():
    x = jnp.asarray(qkv(9)[0], jnp.bfloat16)
    for gpu in (T4, A100):
        traced = str(jax.make_jaxpr(lambda x, gpu=gpu: attend(x, x, x, Plan("xla", 9, 9, gpu)))(x))
        assert ("BF16_BF16_F32" in traced) == (gpu is A100)
        assert attend(x, x, x, Plan("xla", 9, 9, gpu)).dtype == jnp.bfloat16


def test_only_gpus_older_than_ampere_are_told_that_bfloat16_gains_nothing():
    v100, amd = (
        mesh_of(platform="gpu", device_kind=kind, compute_capability=capability)
        for kind, capability in (("Tesla V100-SXM2-16GB", "7.0"), ("AMD MI300X", "gfx942"))
    )
    for mesh in (T4, v100):
        advice = sharding.bfloat16_advice(sharding.first_device(mesh), "bfloat16")
        assert advice.startswith(f"{mesh.devices[0].device_kind} has no bfloat16 arithmetic")
        assert not sharding.bfloat16_advice(sharding.first_device(mesh), "float32")
    for mesh in (A100, L4, amd, mesh_of(platform="tpu", device_kind="TPU v5 lite"), None):
        assert not sharding.bfloat16_advice(sharding.first_device(mesh), "bfloat16")


def test_on_a_tpu_the_length_decides_the_kernel_and_only_little_padding_is_carried():
    v5e = mesh_of(platform="tpu", device_kind="TPU v5 lite")
    expected = {17: 17, 29: 29, 128: 128, 257: 257, 417: 417, 512: 512, 4097: 4224}
    expected |= {86: 86, 143: 143, 170: 170, 185: 185, 647: 647}  # with pooled tokens
    for length, padded in expected.items():
        made = plan("auto", length, 64, jnp.bfloat16, v5e)
        assert (made.kernel, made.length) == ("splash" if length > 256 else "xla", padded)


def test_packed_arguments_are_refused_if_no_kernel_takes_them():
    with pytest.raises(ValueError, match="xla attention takes q, k and v apart"):
        attention.attend_packed(jnp.zeros((1, 2, 3, 1, 4)), Plan("xla", 2, 2, None))


def test_the_hopper_kernel_refuses_padding_it_would_not_mask():
    with pytest.raises(ValueError, match="takes no padding"):
        attention.attend_packed(jnp.zeros((1, 200, 3, 1, 64)), Plan("hopper", 200, 190, None))


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'flashy'"):
        plan("flashy", 2, 4, jnp.float32)
