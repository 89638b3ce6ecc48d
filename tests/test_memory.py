import jax
import numpy as np
import pytest

from maskdm_jax import dry_run, train
from maskdm_jax.errors import ConfigError
from maskdm_jax.run import memory


def gigabyte_of_four_images(batch):
    return 3_000_000_000 + 250_000_000 * batch


@pytest.mark.parametrize(
    "limit, multiple, largest",
    [
        (10_000_000_000, 1, 28),
        (10_000_000_000, 8, 24),
        (3_100_000_000, 1, 0),
        (10**12, 16, 3984),
        (10**15, 8, 65536),
    ],
)
def test_the_largest_batch_fits_and_the_next_does_not(limit, multiple, largest):
    found, size = dry_run.largest_batch(gigabyte_of_four_images, 16, multiple, limit)
    assert found <= largest <= 1.03 * found + multiple
    if found:
        assert found % multiple == 0
        assert size == gigabyte_of_four_images(found) <= limit
    else:
        assert size > limit


def test_the_largest_batch_is_found_if_memory_grows_in_jumps():
    def needs(batch):
        return gigabyte_of_four_images(batch) + (batch > 50) * 4_000_000_000

    found, size = dry_run.largest_batch(needs, 8, 1, 16_000_000_000)
    assert size == needs(found) <= 16_000_000_000 < needs(int(1.03 * found) + 1)


def test_a_dry_run_prints_what_fits_and_writes_nothing(tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "CARDS_GB", (0.01, 100))  # the first suits a tiny model
    monkeypatch.setattr(dry_run, "_MAX_BATCH", 32)  # the tests above cover the search
    tiny_config.model.depth = 1
    tiny_config.train.dry_run = True
    tiny_config.data.cache = "device"
    train.train(tiny_config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "batch     16:" in said
    for card in dry_run.CARDS_GB:
        assert f"devices of {card} GB, of which JAX takes 92%: train.batch_size " in said
    assert "92%: train.batch_size 32, the largest that is tried, fits" in said
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_is_an_error_with_what_to_type(tiny_config):
    tiny_config.data.cache = "device"
    with pytest.raises(ConfigError) as error, memory.explained(tiny_config, "train"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to ...")
    for flag in (
        "optim.accumulate_steps=2",
        "model.remat=blocks",
        "mesh.fsdp=8",
        "data.cache=host",
        "train.batch_size=8",
        "train.dry_run=True",
    ):
        assert f"--config.{flag}" in str(error.value)
    tiny_config.sample.batch_size = 16
    for mode in ("sample", "evaluate"):
        said = r" at sample.batch_size 16 on .*--config.sample.batch_size=8\b"
        with pytest.raises(ConfigError, match=said), memory.explained(tiny_config, mode):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ...")


def test_the_advised_batch_is_smaller_and_divides(tiny_config):
    tiny_config.optim.accumulate_steps = 4
    tiny_config.train.batch_size = 96
    assert memory.advice(tiny_config, num_devices=8).endswith("--config.train.batch_size=32")
    tiny_config.train.batch_size = 32
    assert "batch_size" not in memory.advice(tiny_config, num_devices=8)
    assert memory.advice(tiny_config, "sample", 8) == "a smaller --config.model.size"


def test_other_errors_of_the_runtime_pass_through(tiny_config):
    with pytest.raises(jax.errors.JaxRuntimeError), memory.explained(tiny_config, "train"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_bytes_needed_counts_arguments_outputs_and_temporaries():
    x = np.zeros((256, 256), np.float32)
    compiled = jax.jit(lambda x: (x @ x) @ x).lower(x).compile()
    assert memory.bytes_needed(compiled) >= 3 * x.nbytes
