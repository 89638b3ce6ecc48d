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
from maskdm_jax.run import distributed

STEP = 3


class Watched(sources.Source):
    """A source that records which examples are read."""

    def __getitem__(self, index):
        asked.append(int(index))
        return super().__getitem__(index)


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

distributed._SHARED_S = 1
distributed.check_shared(pathlib.Path(out))
own = pathlib.Path(out) / str(process_id)
own.mkdir()
with distributed.errors_end_all_processes():
    distributed.check_shared(own)
