"""Reads examples in their order, some ahead of their use, by threads."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def in_order(
    read: Callable[[int], Any], indices: Iterable[int], num_threads: int, ahead: int
) -> Iterator[Any]:
    """Yields `read(i)` for each of `indices`, in their order.

    Args:
      read: safe to call from several threads; decoding an image leaves Python's lock to others.
      indices: what to read; consumed as the reading proceeds.
      num_threads: how many read at once.
      ahead: results that are kept until they are used.
    """
    indices = iter(indices)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        try:
            pending = collections.deque(
                pool.submit(read, i) for i in itertools.islice(indices, ahead)
            )
            while pending:
                yield pending.popleft().result()
                pending += [pool.submit(read, i) for i in itertools.islice(indices, 1)]
        finally:  # after an error, what nobody will use is not read
            pool.shutdown(wait=False, cancel_futures=True)
