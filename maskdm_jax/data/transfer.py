"""Moves files between a bucket and this host's disk: several at a time, each checked by its hash.

A bucket states the hash of each object: its MD5 or, of one that was composed of parts, as gcloud
uploads large files, only its CRC32C.
"""

import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import math
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from maskdm_jax.errors import BucketError, ConfigError
from maskdm_jax.run import bucket, files, progress

_AT_ONCE = 8
_SHOWN_EVERY_S = 0.2
_MIB = 2**20


class Object(NamedTuple):
    """A file in a bucket.

    Fields:
      key: the bucket's name, a slash, and the object's.
      size: in bytes.
      hash: of its content, as "md5Hash:..." or "crc32c:..." in base64.
    """

    key: str
    size: int
    hash: str


def objects_below(place) -> dict[str, Object]:
    """All files in a folder of a bucket, by their paths in it; {"": the file} if it is a file."""
    system, key, found = bucket.system(), _key(place), {}
    with _explained("list", "objectViewer", place, "type the same command later"):
        listed = bucket.retried(system.find, key, detail=True)
    for path, info in listed.items():
        if info["type"] == "file" and not path.endswith("/"):  # some tools mark folders like that
            kind = "md5Hash" if info.get("md5Hash") else "crc32c"
            within = path[len(key) :].removeprefix("/")
            found[within] = Object(path, int(info["size"]), f"{kind}:{info.get(kind)}")
    return found


def names_in(place) -> list[str]:
    """The names of the files and folders directly in a folder of a bucket, folders with a slash at
    the end."""
    system = bucket.system()
    with _explained("list", "objectViewer", place, "type the same command later"):
        try:
            entries = bucket.retried(system.ls, _key(place), detail=True)
        except FileNotFoundError:
            return []
    ends = {"directory": "/", "file": ""}
    return sorted(pathlib.PurePosixPath(e["name"]).name + ends[e["type"]] for e in entries)


def is_copy(path: pathlib.Path, of: Object) -> bool:
    """Whether a local file has the size and the hash of an object."""
    if not path.is_file() or path.stat().st_size != of.size:
        return False
    kind, _, expected = of.hash.partition(":")
    with path.open("rb") as file:
        if kind == "md5Hash":
            digest = hashlib.file_digest(file, "md5").digest()
        else:
            import google_crc32c  # comes with gcsfs

            checksum = google_crc32c.Checksum()
            for _ in checksum.consume(file, _MIB):
                pass
            digest = checksum.digest()
    return base64.b64encode(digest).decode() == expected


def are_copies(pairs: list[tuple[pathlib.Path, Object]]) -> Iterator[bool]:
    """`is_copy` of each pair, in order."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(is_copy, *zip(*pairs, strict=True))


def download(wanted: dict[pathlib.Path, Object], place, what: str) -> None:
    """Copies objects to files, each of which is whole or absent; their folders must exist.

    Args:
      wanted: file -> object; the last is copied when all the others are there.
      place: where the objects are.
      what: the work, in words, for the progress.

    Raises:
      BucketError: if the bucket does not answer, or a file does not have its object's hash.
      ConfigError: if the objects may not be read.
    """
    system = bucket.system()

    def copy(path, source, callback):
        with files.whole(path) as unfinished:
            bucket.retried(system.get_file, source.key, str(unfinished), callback=callback)
            if not is_copy(unfinished, source):
                raise BucketError(
                    f"gs://{source.key} arrived with another size or hash than the bucket states: "
                    "it was changed meanwhile, or damaged on the way; try again"
                )

    then = "what has arrived is kept: type the same command to copy the rest"
    with _explained("read", "objectViewer", place, then):
        works = [functools.partial(copy, *each) for each in wanted.items()]
        _at_once(works, sum(source.size for source in wanted.values()), what)


def upload(paths: list[pathlib.Path], folder, what: str) -> None:
    """Makes local files the only ones in a folder of a bucket; each arrives with its MD5, or not.

    Args:
      paths: the files; the last is copied when all the others are there.
      folder: a place in a bucket.
      what: the work, in words, for the progress.

    Raises:
      BucketError: if the bucket does not answer.
      ConfigError: if the objects may not be written.
    """
    system, names = bucket.system(), [path.name for path in paths]

    def copy(path, callback):
        key = _key(folder / path.name)
        bucket.retried(system.put_file, str(path), key, consistency="md5", callback=callback)

    then = (
        f"{paths[0].parent} is whole: type gcloud storage cp -r {paths[0].parent} {folder.parent}"
    )
    with _explained("write", "objectUser", folder, then):
        for name, each in objects_below(folder).items():
            if name not in names:
                bucket.retried(system.rm_file, each.key)
        works = [functools.partial(copy, path) for path in paths]
        _at_once(works, sum(path.stat().st_size for path in paths), what)


def check_writable(folder) -> None:
    """Raises ConfigError if nothing can be written into a folder of a bucket."""
    system, key = bucket.system(), f"{_key(folder)}/.can_be_written"
    with _explained("write", "objectUser", folder, "type the same command later"):
        bucket.retried(system.pipe_file, key, b"")
        bucket.retried(system.rm_file, key)


def _at_once(works: list[Callable], num_bytes: int, what: str) -> None:
    """Runs `works`, each with an fsspec callback, the last one alone and at the end, and shows how
    many bytes of all have moved."""
    from fsspec import callbacks  # only runs that name a bucket load it

    failed = threading.Event()

    class Counter(callbacks.Callback):
        def call(self, *_, **__):
            if failed.is_set():
                raise InterruptedError("another file failed")

    counters = [Counter() for _ in works]
    begin = list(zip(works, counters, strict=True))
    total = math.ceil(num_bytes / _MIB)
    pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE)
    try:
        with progress.Progress(what, total, "MiB") as shown:
            for together in (begin[:-1], begin[-1:]):
                pending = {pool.submit(*each) for each in together}
                while pending:
                    done, pending = concurrent.futures.wait(pending, _SHOWN_EVERY_S)
                    for future in done:
                        future.result()
                    # Bytes that are copied once more count twice.
                    shown.at(min(total, sum(each.value for each in counters) // _MIB))
            shown.at(total)
    finally:
        failed.set()  # ends the others at their next bytes
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _explained(verb, role, place, then):
    """Turns a bucket's refusal or silence into one sentence; `then` is what to do about silence."""
    name = _key(place).partition("/")[0]
    try:
        yield
    except BucketError as error:
        raise BucketError(f"{str(error).partition('; ')[0]}; {then}") from error
    except FileNotFoundError as error:
        raise BucketError(
            f"a file of {place} was removed while it was in use ({error}); type the same command, "
            "which lists the files again"
        ) from error
    except OSError as error:
        if not str(error).startswith("Forbidden"):  # gcsfs's word for status 403
            raise
        raise ConfigError(
            f"these credentials may not {verb} objects of gs://{name} "
            f"({' '.join(str(error).split())[:200]}); type gcloud storage buckets "
            f"add-iam-policy-binding gs://{name} --member=... --role=roles/storage.{role}"
        ) from error


def _key(place):
    return str(place).partition("://")[2].rstrip("/")
