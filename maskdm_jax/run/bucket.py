"""Google Cloud Storage, by etils.epath and gcsfs, neither of which a local path ever loads.

A bucket has no folders, no rename and no append. It has objects that appear whole or not at all,
and preconditions: a request that names the generation of the object it expects to find.

gcsfs repeats a request six times over half a minute, with growing pauses, if the bucket answers
with 408, 429 or 5xx, or not at all; `retried` continues for `LOST_S`.
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator

from maskdm_jax.errors import BucketError, ConfigError

LOST_S = 120  # a bucket that fails for longer counts as lost
_CHECK_S = 20  # one request, with all its repetitions
_COPY_S = 60  # files that grow are copied into the bucket this often
_COPY_SHARE = 20  # and copying takes at most one part in so many of a run's time
_BLOCK = 2**25  # bytes read by one request
# TensorStore raises ValueError with the status of the request in the text.
_STATUS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CURL error", "HTTP 5")


def path(text: str):
    """An epath.Path for gs://BUCKET/..., which every module may use like a pathlib.Path."""
    # With TensorFlow installed, epath would use its client: other errors, other caches.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # gcsfs would ask another service, with other permissions, for the kind of each bucket.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec.config
    from etils import epath

    settings = fsspec.config.conf.setdefault("gcs", {})
    settings.setdefault("use_listings_cache", False)  # other hosts write too
    # Application Default Credentials alone: gcsfs would continue with others for half a minute.
    emulated = "STORAGE_EMULATOR_HOST" in os.environ
    settings.setdefault("token", "anon" if emulated else "google_default")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it raises
    return epath.Path(text)


def system():
    """gcsfs's file system, as epath uses it."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)


def checked(text: str, name: str):
    """`path(text)`, after one request to its bucket.

    Raises:
      ConfigError: if gcsfs is not installed, the bucket's name cannot be one, the bucket does not
        exist, or its objects cannot be listed with the credentials found here.
      BucketError: if the bucket does not answer.
    """
    found = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(/.*)?", text, re.DOTALL)
    if not found or "//" in (found[2] or ""):
        raise ConfigError(
            f"{name} is {text}; expected gs://BUCKET/FOLDER with a bucket's name of lowercase "
            f"letters, digits and any of - _ . and no empty folder names; type another {name}"
        )
    try:
        place = path(text)
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{name} is {text}, but the package gcsfs, which reads and writes buckets, cannot be "
            f"imported: {error}; type pip install '.[gcs]'"
        ) from error
    _check_bucket(found[1], text, name)
    return place


@functools.lru_cache
def _check_bucket(bucket, text, name):
    """Lists one object; what was found usable is not asked again."""
    with _explained(text, name, bucket):
        system().credentials.maybe_refresh()  # a request would try expired ones for half a minute
        request("GET", "b/{}/o", bucket, prefix="/".join(path(text).parts[3:]), maxResults=1)


def request(*args, **options):
    """A request of the JSON API, by gcsfs, that may take `_CHECK_S`; the answer as JSON."""
    import fsspec.asyn

    fs = system()
    answer = fsspec.asyn.sync(fs.loop, fs._call, *args, timeout=_CHECK_S, **options)[1]
    return json.loads(answer) if answer else None


def upload(data: bytes | pathlib.Path, place) -> None:
    """Writes bytes, or a local file, as one object, which appears when it is whole."""
    fs, key = system(), os.fspath(place)
    if isinstance(data, bytes):
        retried(fs.pipe_file, key, data)
    else:
        retried(fs.put_file, str(data), key)


def blocks(place) -> Iterator[bytes]:
    """The content of an object, in pieces."""
    fs, key = system(), os.fspath(place)
    size = retried(fs.info, key)["size"]
    for start in range(0, size, _BLOCK):
        yield retried(fs.cat_file, key, start=start, end=min(start + _BLOCK, size))


def below(folder) -> list:
    """The objects below a folder."""
    return [path(f"gs://{key}") for key in retried(system().find, os.fspath(folder))]


def move(folder, target) -> None:
    """Copies all objects below `folder` to `target`, and then removes them."""
    fs = system()
    for each in below(folder):
        copy = os.fspath(target / each.relative_to(folder).as_posix())
        retried(fs.cp_file, os.fspath(each), copy)
    remove_tree(folder)


def remove_tree(folder) -> None:
    """Removes all objects below a folder."""
    with contextlib.suppress(FileNotFoundError):  # removed by an attempt whose answer was lost
        retried(system().rm, os.fspath(folder), recursive=True)


class Mirror:
    """A local folder, whose files are copied into a folder of a bucket as they grow.

    Attributes:
      local: the local folder.
    """

    def __init__(self, folder):
        self._folder = folder
        self._temporary = tempfile.TemporaryDirectory(prefix="maskdm_")
        self.local = pathlib.Path(self._temporary.name)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="bucket")
        self._pending = None  # the copying that may still be in progress
        self._sizes = {}  # of the files, when they were copied
        self._due = time.monotonic() + _COPY_S

    def sync(self, now: bool = False) -> None:
        """Copies what has grown, beside the caller if it is due; or now, and waits for it.

        Raises:
          BucketError: if this copying, or the one before, has failed.
        """
        if self._pending is not None and (now or self._pending.done()):
            self._pending.result()
            self._pending = None
        if now:
            self._copy()
        elif self._pending is None and time.monotonic() >= self._due:
            self._pending = self._pool.submit(self._copy)

    def close(self) -> None:
        """Copies what has grown, and removes the local folder."""
        self.sync(now=True)
        self._pool.shutdown()
        self._temporary.cleanup()

    def _copy(self):
        start = time.monotonic()
        for file in sorted(self.local.rglob("*")):
            if file.is_file() and file.stat().st_size != self._sizes.get(file):
                content = file.read_bytes()
                upload(content, self._folder / file.relative_to(self.local).as_posix())
                self._sizes[file] = len(content)
        end = time.monotonic()
        self._due = end + max(_COPY_S, _COPY_SHARE * (end - start))


def retried(action: Callable, *args, **options):
    """What `action` returns; it is called again while the bucket does not answer.

    Raises:
      BucketError: after `LOST_S` seconds.
    """
    deadline = time.monotonic() + LOST_S
    while True:
        try:
            return action(*args, **options)
        except Exception as error:
            if not is_lost(error):
                raise
            if time.monotonic() > deadline:
                raise BucketError(described(error)) from error
        time.sleep(1)


def is_lost(error: BaseException) -> bool:
    """Whether an exception means that a bucket did not answer, or only with 408, 429 or 5xx."""
    import fsspec.exceptions
    import gcsfs.retry

    while error is not None:
        if isinstance(error, (BucketError, TimeoutError, fsspec.exceptions.FSTimeoutError)):
            return True
        if gcsfs.retry.is_retriable(error):
            return True
        if isinstance(error, ValueError) and any(word in str(error) for word in _STATUS):
            return True
        error = error.__cause__ or error.__context__
    return False


def described(error: BaseException) -> str:
    """The sentence about a lost bucket."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"the bucket does not answer ({reason}); what is in it is whole: the same command resumes "
        "from its newest checkpoint once the bucket answers"
    )


@contextlib.contextmanager
def _explained(text, name, bucket):
    """Raises ConfigError or BucketError for what the first request to a bucket raises."""
    import gcsfs.retry
    import google.auth.exceptions

    what = f"{name} is {text}, but "
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(
            f"{what}there is no bucket {bucket}; type the name of one that exists, or "
            f"gcloud storage buckets create gs://{bucket} first"
        ) from error
    except (google.auth.exceptions.GoogleAuthError, gcsfs.retry.NonRetryableError) as error:
        raise ConfigError(f"{what}{_NO_CREDENTIALS}") from error
    except gcsfs.retry.HttpError as error:
        if error.code == 401:
            raise ConfigError(f"{what}{_NO_CREDENTIALS}") from error
        if is_lost(error):
            raise BucketError(f"{what}{described(error)}") from error
        raise ConfigError(f"{what}it is refused: {error}; type another {name}") from error
    except OSError as error:
        if is_lost(error):
            raise BucketError(f"{what}{described(error)}") from error
        raise ConfigError(
            f"{what}these credentials may not use it ({' '.join(str(error).split())[:200]}); "
            "expected the role Storage Object User on the bucket; type gcloud storage buckets "
            f"add-iam-policy-binding gs://{bucket} --member=... --role=roles/storage.objectUser"
        ) from error
    except Exception as error:
        if not is_lost(error):
            raise
        raise BucketError(f"{what}{described(error)}") from error


_NO_CREDENTIALS = (
    "no Google credentials that are valid are found here; type gcloud auth "
    "application-default login, or give the machine a service account"
)
