"""Google Cloud Storage, by etils.epath and gcsfs, neither of which a local path ever loads.

A bucket has no folders, no rename and no append. It has objects that appear whole or not at all,
and preconditions: a request that names the generation of the object it expects to find.

gcsfs repeats a request six times over half a minute, with growing pauses, if the bucket answers
with 408, 429 or 5xx, or not at all; `retried` continues for `LOST_S`.
"""

import asyncio
import contextlib
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable

from maskdm_jax.errors import BucketError, ConfigError

LOST_S = 120  # a bucket that fails for longer counts as lost
_CHECK_S = 20  # the first look at a bucket, which includes the search for credentials
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
    with _explained(text, name, found[1]):
        fs = system()
        _timed(fs, "GET", "b/{}/o", found[1], prefix="/".join(place.parts[3:]), maxResults=1)
    return place


def upload(data: bytes | pathlib.Path, place) -> None:
    """Writes bytes, or a local file, as one object, which appears when it is whole."""
    fs, key = system(), os.fspath(place)
    if isinstance(data, bytes):
        retried(fs.pipe_file, key, data)
    else:
        retried(fs.put_file, str(data), key)


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
        if isinstance(error, (BucketError, asyncio.TimeoutError, fsspec.exceptions.FSTimeoutError)):
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


def _timed(fs, *args, **options):
    """A request that may take `_CHECK_S` with all its repetitions."""
    import fsspec.asyn

    return fsspec.asyn.sync(fs.loop, fs._call, *args, timeout=_CHECK_S, **options)


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
    except google.auth.exceptions.GoogleAuthError as error:
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
