import pytest

from launch import tpu_slices
from maskdm_jax.errors import ConfigError


@pytest.mark.parametrize(
    "name, kind, shape",
    [
        ("v5e:16x16", "v5e", (16, 16)),
        ("v5e-256", "v5e", (16, 16)),
        ("v5litepod-16", "v5e", (4, 4)),
        ("v6e-64", "v6e", (8, 8)),
        ("v4-8", "v4", (2, 2, 1)),
        ("v5p-128", "v5p", (4, 4, 4)),
        ("v5p:4x4x12", "v5p", (4, 4, 12)),
    ],
)
def test_a_name_gives_chip_and_shape(name, kind, shape):
    tpu = tpu_slices.parse(name)
    assert (tpu.kind, tpu.shape) == (kind, shape)


def test_cloud_names_count_cores_on_v4_and_v5p_and_chips_elsewhere():
    for name, num_chips in {"v4-8": 4, "v5p-128": 64, "v5e-16": 16, "v6e-64": 64}.items():
        tpu = tpu_slices.parse(name)
        assert tpu.num_chips == num_chips
        assert tpu_slices.parse(tpu.name.split()[0]) == tpu


@pytest.mark.parametrize(
    "name",
    ["v5e", "h100-8", "v5e:3x3", "v5e:4x4x4", "v5e-100", "v5p-12", "v5p:0x4x4", "v4:64x64x64"],
)
def test_a_slice_that_does_not_exist_is_refused_with_one_that_does(name):
    with pytest.raises(ConfigError, match="--topology is '.*'; expected .*; type --topology=") as e:
        tpu_slices.parse(name)
    assert tpu_slices.parse(str(e.value).split("--topology=")[-1])
