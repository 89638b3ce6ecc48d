import jax
import numpy as np

from maskdm_jax import rng


def bits(*args):
    return np.asarray(jax.random.key_data(rng.stream(*args))).tobytes()


def test_streams_differ_by_seed_name_and_step_and_by_nothing_else():
    assert bits(0, "mask", 3) == bits(0, "mask", 3)
    assert (
        len(
            {
                bits(0, "mask", 3),
                bits(1, "mask", 3),
                bits(0, "noise", 3),
                bits(0, "mask", 4),
                bits(0, "mask"),
            }
        )
        == 5
    )


def test_a_traced_step_gives_the_numbers_of_a_plain_one():
    traced = jax.jit(lambda step: jax.random.key_data(rng.stream(0, "time", step)))(7)
    assert np.asarray(traced).tobytes() == bits(0, "time", 7)
