"""Under fsdp no large array stays whole, at the sizes that need it."""

import jax
import numpy as np
import pytest

from configs import pretrain_celebahq
from maskdm_jax import draw, sharding
from maskdm_jax.state import abstract_state


@pytest.mark.parametrize("size, optimizer", [("L", "adamw"), ("L", "muon"), ("H", "adamw")])
def test_fsdp_leaves_an_eighth_of_the_state_on_each_of_8_devices(size, optimizer):
    config = pretrain_celebahq.get_config()
    config.optim.name = optimizer
    # All parameters that a model can have.
    config.model.update(size=size, num_classes=1000, mlp_time_embed=True, qkv_bias=True)
    config.mesh.fsdp = 8
    state = abstract_state(config, sharding.make_mesh(config))

    total = on_each = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        on_device = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        # A new matrix or table that no rule covers fails here; vectors are small enough.
        assert on_device * 8 == leaf.size or leaf.ndim < 2, name
        total += leaf.size
        on_each += on_device
    copies = 3 if optimizer == "adamw" else 2  # parameters, EMA and both moments, or one
    assert total > copies * {"L": 300e6, "H": 500e6}[size]
    assert on_each < total / 8 * 1.01


def test_what_fsdp_does_not_divide_stays_whole(tiny_config):
    tiny_config.model.width = 36
    tiny_config.mesh.fsdp = 8
    params = draw.abstract_params(tiny_config, sharding.make_mesh(tiny_config))
    assert params["mid_block"]["qkv"]["kernel"].sharding.is_fully_replicated  # 3 x 36 columns
    assert not params["mid_block"]["mlp_in"]["kernel"].sharding.is_fully_replicated  # 4 x 36


def test_every_compiler_option_exists_in_this_jax():
    for name, value in sharding._COMPILER_OPTIONS["gpu"].items():
        jax.jit(lambda x: x + 1, compiler_options={name: value})(1.0)
