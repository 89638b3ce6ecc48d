"""What a reader of data sets (tfds.py, archives.py, toy.py) hands to `sources`."""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from maskdm_jax.errors import ConfigError


class Records(Protocol):
    """The examples of one split, by index. Threads may read them at the same time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """{"image": an encoded image or uint8 [H, W, C], "label": its class, if it has one}."""

    def ids(self) -> Iterable[bytes]:
        """A name of each example, the same on every machine; in order, and read without decoding.

        The decimal index in the split if the set has no names.
        """

    def name(self, index: int) -> str:
        """The example in words, for error messages."""


class ImageSet(NamedTuple):
    """A data set as it lies on disk, not yet compared with a config.

    Fields:
      splits: the names of its splits, and what opens each.
      image_shape: (height, width, channels) of the images; None for a side that differs.
      num_classes: 0 if there are no labels.
      cache_dir: where its decoded images may be kept.
      remedy: what to do if an example cannot be read.
      contents: what its files say of all examples, such as counts, sizes or checksums; the same for
        a copy elsewhere.
      files: those that hold it; a cache of decoded images is that of these sizes and times.
    """

    splits: dict[str, Callable[[], Records]]
    image_shape: tuple[int | None, int | None, int]
    num_classes: int
    cache_dir: pathlib.Path
    remedy: str
    contents: str = ""
    files: tuple[pathlib.Path, ...] = ()


def ids_by_index(count: int) -> Iterator[bytes]:
    """The ids of `count` examples without names."""
    return (str(index).encode() for index in range(count))


@contextlib.contextmanager
def damage_explained(what: Callable[[], str], remedy: str) -> Iterator[None]:
    """Turns any error of the readers, which raise all kinds of them, into one sentence.

    Args:
      what: what cannot be read, in words; called after the failure.
      remedy: what to do.

    Raises:
      ConfigError: if the block raises anything.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = re.sub(r" ?<_io\.[^>]*>", "", " ".join(str(error).split()))[:200]
        reason = reason or type(error).__name__
        raise ConfigError(f"{what()} cannot be read: {reason}; {remedy}") from error
