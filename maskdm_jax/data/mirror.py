"""A data set that lies in a bucket: each host reads a copy of it on its own disk.

The copies of the sets in gs://bucket/tfds lie in gs/bucket/tfds below `data.local_dir`, with the
bucket's folders and names, so every reader finds local files. Beside a whole copy lies a record of
the objects it was made from. A copy without a record, or with one that differs from the bucket, is
completed: files that have the hash of their object stay.
"""

import contextlib
import json
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from maskdm_jax.data import transfer, writer
from maskdm_jax.data.transfer import Object
from maskdm_jax.errors import ConfigError
from maskdm_jax.fields import nearest_word
from maskdm_jax.run import faults, files, progress

_INDEX = "dataset_info.json"  # TFDS's: without it, a folder is no set
_VERSION = r"\d+\.\d+\.\d+"


class _Remote(NamedTuple):
    """A data set in a bucket: its path in `data.dir`, and its files by their paths in the set."""

    path: str
    objects: dict[str, Object]  # {"": the file} for a zip


def folder_of(data_dir, local_dir: pathlib.Path) -> pathlib.Path:
    """The local folder for copies of the sets in `data_dir`.

    Args:
      data_dir: a place in a bucket.
      local_dir: `data.local_dir`.
    """
    scheme, _, path = str(data_dir).partition("://")
    return local_dir / scheme / path


def local_copy(data_dir, name: str, local_dir: pathlib.Path) -> pathlib.Path:
    """The path of this host's whole copy of a set, which is made or brought up to date if need be.

    Several processes may call it at once: one of them copies.

    Args:
      data_dir: a place in a bucket.
      name: the set's, as `config.data.name`.
      local_dir: `data.local_dir`.

    Returns:
      The zip file, the folder of the lmdb, or the folder of the TFDS set's version.

    Raises:
      ConfigError: if there is no such set, or no room for it.
      RunError: if it cannot be copied.
    """
    found = _find(data_dir, name)
    target = folder_of(data_dir, local_dir) / found.path
    record = target.with_name(f".{target.name}.copied.json")
    if _is_current(record, target, found):
        return target
    with writer.sole_writer(target.name, target.parent, "--config.data.local_dir"):
        if not _is_current(record, target, found):  # copied by another process, meanwhile
            _copy(data_dir, name, found, target, record)
    return target


@contextlib.contextmanager
def new_set(name: str, data_dir, local_dir: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the local folder of data sets into which the block, and nobody else, writes a set.

    If `data_dir` is in a bucket, the set is uploaded after the block, its index last: until then it
    is no set there.

    Args:
      name: the set's name.
      data_dir: the folder of data sets, local or in a bucket.
      local_dir: as `data.local_dir`; not looked at if `data_dir` is local.

    Raises:
      ConfigError: if there is a set of that name, or `data_dir` cannot be written to.
      BucketError: if the bucket does not answer.
    """
    is_remote = files.is_remote(data_dir)
    folder = data_dir
    if is_remote:
        folder = folder_of(data_dir, files.local_path(local_dir, "--local_dir"))
    with writer.sole_writer(name, folder, "--local_dir" if is_remote else "--data_dir"):
        if _uploaded(name, data_dir) if is_remote else writer.exists(name, data_dir):
            raise ConfigError(
                f"the data set {data_dir / name} exists; delete that folder to make it again, or "
                f"type --name={name}_2, say"
            )
        if is_remote:
            transfer.check_writable(data_dir / name)
            # A copy of a set that is no longer in the bucket, or one that was never uploaded.
            shutil.rmtree(folder / name, ignore_errors=True)
        yield folder
        if is_remote:
            _upload(name, folder, data_dir)


def _uploaded(name, data_dir):
    below = transfer.objects_below(data_dir / name)
    return any(re.fullmatch(rf"{_VERSION}/{_INDEX}", file) for file in below)


def _upload(name, folder, data_dir):
    (index,) = (folder / name).glob(f"*/{_INDEX}")
    others = sorted(path for path in index.parent.iterdir() if path.is_file() and path != index)
    place = data_dir / name / index.parent.name
    transfer.upload([*others, index], place, f"uploading {name}")
    progress.say(f"uploaded to {place}")


def _copy(data_dir, name, found, target, record):
    """Makes `target` a whole copy of `found`, and writes its record; the caller holds the lock."""
    paths = {target / file if file else target: each for file, each in found.objects.items()}
    record.unlink(missing_ok=True)
    _tidy(target, paths)
    missing = _missing(paths, name)
    index = target / _INDEX
    if missing and index in paths:  # a set whose files change is none
        missing.add(index)
    for path in missing:  # before the room is measured
        path.unlink(missing_ok=True)
    num_bytes = sum(paths[path].size for path in missing)
    _check_room(data_dir, name, num_bytes, target.parent)
    if missing:
        progress.remark(
            f"copying {data_dir}/{found.path} to {target}: {len(missing):,} of {len(paths):,} "
            f"files, {num_bytes / 2**20:,.1f} MiB"
        )
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    remedy = "make room, or type --config.data.local_dir=FOLDER"
    with faults.explain_full_disk(f"the copy of {name}", target.parent, remedy, lambda: num_bytes):
        if missing:
            in_order = sorted(missing, key=lambda path: (path == index, path))
            wanted = {path: paths[path] for path in in_order}
            transfer.download(wanted, data_dir, f"copying {name}")
        files.write_text(record, json.dumps(_facts(target, found)))


def _is_current(record, target, found):
    """Whether the record says that `target` is a copy of `found`, and its files are as it left
    them."""
    try:
        return json.loads(record.read_text()) == _facts(target, found)
    except (OSError, ValueError):
        return False


def _facts(target, found):
    """What a record holds: size, hash and local time of each file."""
    facts = {}
    for file, each in found.objects.items():
        stat = (target / file if file else target).stat()
        facts[file] = [stat.st_size, each.size, each.hash, stat.st_mtime_ns]
    return facts


def _tidy(target, paths):
    """Removes what a killed copy left, and files that the set no longer has."""
    files.remove_leftovers(target.parent, target.name)
    if target.is_dir():
        for path in target.iterdir():
            if path.is_file() and path not in paths:
                path.unlink()


def _missing(paths, name):
    """Those of `paths` that are not copies of their objects."""
    there = [path for path in paths if path.exists()]
    if not there:
        return set(paths)
    checks = transfer.are_copies([(path, paths[path]) for path in there])
    checked = progress.track(checks, len(there), f"checking {name}", "files")
    whole = {path for path, is_whole in zip(there, checked, strict=True) if is_whole}
    return set(paths) - whole


def _check_room(data_dir, name, num_bytes, folder):
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ConfigError(
            f"{name} of data.dir {data_dir} takes {num_bytes / 2**20:,.1f} MiB more on this host's "
            f"disk, and {folder} has {free / 2**20:,.1f} MiB free; make room, or "
            "type --config.data.local_dir=FOLDER with a folder of a larger disk, or mount the "
            "bucket as docs/data.md says"
        )


def _find(data_dir, name) -> _Remote:
    """Where a set lies in the bucket."""
    prefix, _, version = name.partition(":")
    prefix = prefix.strip("/")
    below = transfer.objects_below(data_dir / prefix)
    if "" in below and prefix.lower().endswith(".zip"):
        return _Remote(prefix, {"": below[""]})
    if "data.mdb" in below:
        return _Remote(prefix, {"data.mdb": below["data.mdb"]})
    if _INDEX in below:  # the name ends with the version
        version, prefix = prefix.rpartition("/")[2], prefix.rpartition("/")[0]
        below = {f"{version}/{file}": each for file, each in below.items()}
    indices = [re.fullmatch(rf"({_VERSION})/{_INDEX}", file) for file in below]
    versions = {index[1] for index in indices if index}
    if version not in versions | {""} or not versions:
        raise ConfigError(_not_found(data_dir, name, prefix, below, versions))
    version = version or _newest(versions)
    # Only files beside the index: a cache of decoded images may lie in a folder there.
    inside = {
        file: each
        for path, each in below.items()
        for file in [path.removeprefix(f"{version}/")]
        if path.startswith(f"{version}/") and "/" not in file and not file.startswith(".")
    }
    if not any(".array_record-" in file for file in inside):
        raise ConfigError(
            f"data.name {name!r} in data.dir {data_dir} is not in ArrayRecord format; type: tfds "
            f"build {name} --file_format=array_record and copy that set to the bucket"
        )
    return _Remote(f"{prefix}/{version}", inside)


def _newest(versions):
    return max(versions, key=lambda version: [*map(int, version.split("."))])


def _not_found(data_dir, name, prefix, below, versions):
    """That there is no such set, and what is there."""
    if versions:
        return (
            f"data.name is {name!r}, but {data_dir} has of {prefix} only version "
            f"{', '.join(sorted(versions))}; type --config.data.name={prefix}:{_newest(versions)}"
        )
    configs = {re.fullmatch(rf"([^/]+)/{_VERSION}/{_INDEX}", file) for file in below} - {None}
    if configs:
        configs = sorted({each[1] for each in configs})
        return (
            f"data.name {name!r} is a folder of several sets, {', '.join(configs)}; expected one "
            f"of them; type --config.data.name={prefix}/{configs[0]}"
        )
    if any(".array_record-" in file for file in below):
        return (
            f"data.name {name!r} is uploaded only in part to {data_dir}: it has no {_INDEX}, which "
            "comes last; wait for the upload's end or, if it was stopped, type its command again"
        )
    there = transfer.names_in(data_dir)
    there = [name.rstrip("/") for name in there if name.endswith(("/", ".zip"))]
    if not there:
        return (
            f"data.name is {name!r}, but data.dir {data_dir} holds no data sets; type "
            "--config.data.dir=gs://BUCKET/FOLDER, or upload the set with python -m "
            f"maskdm_jax.data.prepare --images FOLDER --name NAME --size 64 --data_dir {data_dir}"
        )
    near = nearest_word(name, there) or there[0]
    shown = ", ".join(there[:10]) + ", ..." * (len(there) > 10)
    return (
        f"data.name {name!r} is not a set in data.dir {data_dir}, which holds {shown}; type "
        f"--config.data.name={near}"
    )
