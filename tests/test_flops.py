import types

import pytest

from maskdm_jax import flops
from maskdm_jax.config import default_config


@pytest.mark.parametrize(
    "kind, ratio, tokens, gflop",
    [("none", 0.0, 4097, 1482), ("block", 0.5, 2049, 574), ("block", 0.9, 417, 90)],
)
def test_forward_flops_of_the_published_model(kind, ratio, tokens, gflop):
    config = default_config()
    config.data.image_size = (256, 256)
    config.mask.kind, config.mask.ratio = kind, ratio
    assert flops.tokens_per_image(config) == tokens
    assert flops.forward_flops(config) / 1e9 == pytest.approx(gflop, rel=0.005)
    assert flops.training_flops(config) == 3 * flops.forward_flops(config)


def test_peaks_are_found_by_device_kind():
    def peak(kind):
        return flops.peak_tflops(types.SimpleNamespace(device_kind=kind))

    assert peak("NVIDIA H200") == 989
    assert peak("TPU v5 lite") == 197 and peak("TPU v5p") == 459 and peak("TPU v5") == 459
    assert peak("cpu") is None
