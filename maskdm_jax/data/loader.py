"""Batches for the devices: order, decoding, caches and prefetch.

Which examples step n reads is a pure function of (seed, n): epoch e is a permutation drawn from
(seed, e), and the steps read the epochs laid end to end, each from where the one before ended, also
where a phase of the run changes the batch. So there is no iterator to save, and a run resumes from
any step. Each process reads only its own share
of each batch. Images go to the devices as uint8.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from maskdm_jax import phases, sharding
from maskdm_jax.data import batch
from maskdm_jax.data.sources import Source
from maskdm_jax.errors import ConfigError, RunError
from maskdm_jax.run import faults, files, lock, progress

_PREFETCH_BATCHES = 4


class Order:
    """The examples in the order in which a run reads them."""

    def __init__(self, seed: int, num_examples: int):
        self._seed = seed
        self._num_examples = num_examples
        self._epochs = {}

    def ids(self, first: int, count: int) -> np.ndarray:
        """Indices of the `count` examples that follow the first `first`, int64 [count]."""
        position = np.arange(first, first + count)
        epoch, within = np.divmod(position, self._num_examples)
        ids = np.empty_like(position)
        for e in np.unique(epoch):
            here = epoch == e
            ids[here] = self._permutation(int(e))[within[here]]
        return ids

    def _permutation(self, epoch):
        permutation = self._epochs.get(epoch)
        if permutation is None:
            generator = np.random.default_rng([self._seed, epoch])
            permutation = generator.permutation(self._num_examples)
            # Keeps a few epochs, since prefetching threads run ahead.
            self._epochs = dict([*self._epochs.items()][-3:]) | {epoch: permutation}
        return permutation


class Loader:
    """Feeds the train step.

    `arrays` is what stays on the devices: the whole set if `data.cache` is "device", else nothing.
    `batches(step)` yields what each step adds. `batch.materialize` turns both into images and
    labels.
    """

    def __init__(self, config, source: Source, mesh: Mesh):
        self._config = config
        self._source = source
        self._order = Order(config.seed, len(source))
        self._sharding = sharding.batch_sharding(mesh)
        if config.data.cache == "device":
            _check_device_room(config, source, mesh)
        self._cache = None if config.data.cache == "none" else _open_cache(config, source)
        if self._cache:
            _check_labels(config, source, self._cache["label"])
        self.arrays = {}
        if config.data.cache == "device":
            # From a callback: `device_put` would compare the set's bytes across processes.
            self.arrays = {
                k: jax.make_array_from_callback(v.shape, sharding.replicated(mesh), v.__getitem__)
                for k, v in batch.flat(self._cache).items()
            }

    def batches(self, step: int) -> Iterator[dict]:
        """Batches of `step` and all later steps, each already on its way to the devices."""
        for phase in phases.phases(self._config):
            if step < phase.last_step:
                yield from self._of_phase(phase, max(step, phase.first_step))

    def _of_phase(self, phase, step):
        rows = sharding.local_rows(self._sharding, phase.config.train.batch_size)

        def local_ids(n):
            first, end = phase.images(n), phase.images(n + 1)
            return self._order.ids(first, end - first)[rows]

        if self._config.data.cache == "none":
            local = self._decoded(local_ids, step, phase.last_step, len(rows))
        else:
            local = self._gathered(local_ids, step, phase.last_step)
        for share in local:
            yield jax.tree.map(
                lambda x: jax.make_array_from_process_local_data(self._sharding, x), share
            )

    def _gathered(self, local_ids, step, last_step):
        if self.arrays:
            return ({"ids": local_ids(n).astype(np.int32)} for n in range(step, last_step))
        reads = _ByStep(last_step, lambda n: {k: v[local_ids(n)] for k, v in self._cache.items()})
        return _prefetched(reads, step, 4, _PREFETCH_BATCHES)

    def _decoded(self, local_ids, step, last_step, share):
        def read(i):
            example = self._source[local_ids(i // share)[i % share]]
            _check_labels(self._config, self._source, example["label"])
            return example

        examples = _ByStep(last_step * share, read)
        threads = self._config.data.num_threads
        return _prefetched(examples, step * share, threads, _PREFETCH_BATCHES * share, share)


class _ByStep:
    """A random-access source for Grain, from a length and a function of the index."""

    def __init__(self, length, read):
        self._length = length
        self._read = read

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return self._read(int(index))


def _prefetched(source, first, num_threads, buffer_size, batch_size=None):
    """Iterates over a random-access source from `first` on, read ahead by threads of Grain's."""
    import grain  # a set on the device is read without it, and importing it takes 0.1 s

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=buffer_size)
    dataset = grain.MapDataset.source(source)[first:].to_iter_dataset(options)
    if batch_size is not None:
        dataset = dataset.batch(batch_size, drop_remainder=True)
    return iter(dataset)


def _check_labels(config, source, label):
    """Raises ConfigError for a label that is no class of the model, such as TFDS's -1 for none."""
    classes = config.model.num_classes
    if classes and not (0 <= np.min(label) and np.max(label) < classes):
        found = np.min(label) if np.min(label) < 0 else np.max(label)
        raise ConfigError(
            f"data.split {source.split} of {config.data.name} has the label {found}; expected 0 to "
            f"{classes - 1}, since model.num_classes is {classes}; type --config.data.split=NAME "
            "with a split that has labels, or --config.model.num_classes=0 to train without classes"
        )


def _decoded_bytes(source):
    return len(source) * (math.prod(source.image_shape) + np.dtype(np.int32).itemsize)


def _check_device_room(config, source, mesh):
    """Raises ConfigError if the decoded set does not fit in the free memory of a device."""
    needed = _decoded_bytes(source)
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:  # a CPU
            continue
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        if needed > free:
            raise ConfigError(
                f"data.cache 'device' needs {_gib(needed)} on each device for {len(source):,} "
                f"images, but a {device.device_kind} has {_gib(free)} free; type "
                "--config.data.cache=host"
            )


def _check_disk_room(source, folder):
    """Raises RunError if the decoded set does not fit on the disk of `folder`."""
    needed, free = _decoded_bytes(source), shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{len(source):,} decoded images need {_gib(needed)}, but {folder} has {_gib(free)} "
            "free; make room, or type --config.data.cache=none"
        )


def _gib(num_bytes):
    return f"{num_bytes / 2**30:,.3g} GiB"


def _open_cache(config, source) -> dict[str, np.ndarray]:
    """The decoded set as memory maps; decodes it first if no process has done so yet."""
    folder = source.cache_dir
    # A set that is prepared again has other files under the same names.
    paths = {k: folder / f"{source.variant}-{k}-{source.version}.npy" for k in ("image", "label")}
    cache = _mapped(source, paths)
    if cache is not None:
        return cache
    with contextlib.ExitStack() as stack:
        with _explained(config, folder):
            folder.mkdir(parents=True, exist_ok=True)
            locked = stack.enter_context(lock.hold(folder))
        cache = _mapped(source, paths)  # another process may have written it meanwhile
        if cache is None:
            if all(path.exists() for path in paths.values()):
                progress.remark(f"the decoded images in {folder} are not whole; decoding again")
            if locked:
                files.remove_leftovers(folder, f"{source.variant}-*.npy")
            _remove_stale(config, source, paths)
            _check_disk_room(source, folder)
            _decode_all(config, source, paths)
            cache = _mapped(source, paths)
    return cache


def _mapped(source, paths):
    """The decoded set as memory maps; None if it is not there, or not whole."""
    try:
        cache = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        cache = {}
    found = {name: (array.shape, array.dtype) for name, array in cache.items()}
    expected = {
        "image": ((len(source), *source.image_shape), np.uint8),
        "label": ((len(source),), np.int32),
    }
    return cache if found == expected else None


@contextlib.contextmanager
def _explained(config, folder):
    try:
        yield
    except OSError as error:
        if faults.disk_is_full(error):
            raise
        raise ConfigError(
            f"data.cache {config.data.cache!r} needs to write decoded images to {folder}: {error}; "
            "make it writable, or type --config.data.cache=none"
        ) from error


def _reserve(path):
    """Takes the room of a file that is mapped into memory: a full disk would else be a SIGBUS."""
    size, remedy = path.stat().st_size, "make room, or type --config.data.cache=none"
    with faults.explain_full_disk("the decoded images", path.parent, remedy, lambda: size):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _remove_stale(config, source, paths):
    """Removes decoded images of an earlier preparation of the set."""
    for kind, path in paths.items():
        with _explained(config, path.parent):
            for stale in path.parent.glob(f"{source.variant}-{kind}-*.npy"):
                if stale != path:
                    stale.unlink()


def _decode_all(config, source, paths):
    shape = (len(source), *source.image_shape)
    labels = np.zeros(len(source), np.int32)
    examples = _prefetched(source, 0, config.data.num_threads, 1024)
    with files.whole(paths["image"]) as image_file, files.whole(paths["label"]) as label_file:
        with _explained(config, image_file.parent):
            images = np.lib.format.open_memmap(image_file, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(image_file)
        tracked = progress.track(examples, len(source), f"decoding {config.data.name}", "images")
        for i, example in enumerate(tracked):
            images[i] = example["image"]
            labels[i] = example["label"]
        images.flush()
        with open(label_file, "wb") as file:
            np.save(file, labels)
