"""One of the two processes of test_distributed.py: COORDINATOR PROCESS_ID DATA_DIR OUT."""

import functools
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from configs import pretrain_digits
from maskdm_jax import sharding
from maskdm_jax.data import batch, loader, sources
from maskdm_jax.quality import inception, measure, reference
from maskdm_jax.run import distributed

STEP = 3


class Watched(sources.Source):
    """A source that records which examples are read."""

    def __getitem__(self, index):
        asked.append(int(index))
        return super().__getitem__(index)


def cosines(shape):
    return np.cos(np.arange(shape.size, dtype=np.float32)).reshape(shape.shape)


asked = []
coordinator, process_id, data_dir, out = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
distributed._HEARTBEAT_S = 5
distributed.start(coordinator, 2, process_id)
assert distributed.agreed([process_id, 7]) == [0, 7]
assert distributed.agreed([1] * process_id) == []

# The two processes' devices alternate, so no process's rows are contiguous.
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2).swapaxes(0, 1).reshape(4, 2), ("data", "fsdp"))
config = pretrain_digits.get_config()
config.data.dir = data_dir
config.train.update(batch_size=16, num_steps=20)
source = Watched(**vars(sources.open_source(config)))
seen = []
for cache in ("none", "host", "device"):
    config.data.cache = cache
    feed = loader.Loader(config, source, mesh)
    images = jax.jit(functools.partial(batch.materialize, config))
    made = images(feed.arrays, next(feed.batches(STEP)))
    seen.append(multihost_utils.process_allgather(made["image"], tiled=True))
    if cache == "none":
        np.save(f"{out}/asked{process_id}.npy", asked)
        rows = sharding.local_rows(sharding.batch_sharding(mesh), 16)
        np.save(f"{out}/rows{process_id}.npy", rows)
if distributed.is_main():
    np.save(f"{out}/images.npy", seen)

# Scores: each process decodes the rows of its own devices, and all get the features of all images.
pictures = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 1), np.uint8)
by_batch, asked = sharding.batch_sharding(mesh), []
opened = reference.Images("", (8, 8, 1), 11, lambda i: asked.append(i) or pictures[i])
weights = inception.Weights(jax.tree.map(cosines, inception.expected_params(64)), 64, "")
extract = inception.Extractor(weights, (64,), 8, list(mesh.devices.flat))
measured = measure.measure(opened.batches(8, by_batch, 2), extract, ("kid", "swd"), "")
np.testing.assert_array_equal(measured.images, pictures)
rows = set(sharding.local_rows(by_batch, 8).tolist())
assert len(rows) == 4 and set(asked) == {i for i in range(11) if i % 8 in rows} | {10}, asked
alone = inception.Extractor(weights, (64,), 8)
features = np.concatenate([alone(pictures[:8])[64], alone(pictures[8:])[64]])
np.testing.assert_allclose(measured.features[64], features, rtol=1e-5)

distributed._SHARED_S = 1
distributed.check_shared(pathlib.Path(out))
own = pathlib.Path(out) / str(process_id)
own.mkdir()
with distributed.errors_end_all_processes():
    distributed.check_shared(own)
