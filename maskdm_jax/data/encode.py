"""Crops, resizes and encodes images, in processes of their own."""

import collections
import concurrent.futures
import contextlib
import io
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import signal
import threading
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, ImageOps

from maskdm_jax.data import pixels
from maskdm_jax.errors import RunError

_BATCH = 16  # images that a process encodes for one message


class Target(NamedTuple):
    """What every image becomes."""

    size: tuple[int, int]  # height, width
    channels: int = 3
    encoding: str = "png"
    quality: int = 95
    background: tuple[int, int, int] = pixels.WHITE


class Encoded(NamedTuple):
    """An encoded image or, with `problem`, why there is none."""

    data: bytes | None
    problem: str = ""
    num_frames: int = 1  # of which the first was taken


def encode_all(paths: list[pathlib.Path], target: Target, num_processes: int) -> Iterator[Encoded]:
    """Results of `encode` in the order of the paths.

    Raises:
      RunError: if one of the processes was killed.
    """
    # spawn: no state of this process, such as another library's threads, is shared.
    context = multiprocessing.get_context("spawn")
    batches = iter([paths[i : i + _BATCH] for i in range(0, len(paths), _BATCH)])
    with concurrent.futures.ProcessPoolExecutor(num_processes, context, _end_with_parent) as pool:
        try:
            with _ctrl_c_blocked():  # the processes start here
                # A few batches ahead of the writer, whose memory the results would fill.
                pending = collections.deque(
                    pool.submit(_encode_batch, batch, target)
                    for batch in itertools.islice(batches, 4 * num_processes)
                )
            while pending:
                yield from pending.popleft().result()
                for batch in itertools.islice(batches, 1):
                    pending.append(pool.submit(_encode_batch, batch, target))
        except concurrent.futures.process.BrokenProcessPool as error:
            fewer = (
                f"--num_processes={num_processes // 2}" if num_processes > 1 else "a lower --size"
            )
            raise RunError(
                "a process that encodes images was killed, most likely for lack of memory; nothing "
                f"was written; free memory, or type {fewer}"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _ctrl_c_blocked():
    """Delays Ctrl-C. A terminal sends it to every process; those started here inherit the block, so
    this one alone reports that it stopped."""
    delayed = []
    # The block holds for this thread alone; the system may give the signal to another.
    in_main = threading.current_thread() is threading.main_thread()
    handler = in_main and signal.signal(signal.SIGINT, lambda *args: delayed.append(args))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if in_main:
            signal.signal(signal.SIGINT, handler)
    if delayed:
        raise KeyboardInterrupt


def _end_with_parent():
    """Ends this process once its parent is gone, which would leave it waiting for ever."""

    def wait():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _encode_batch(paths, target):
    return [encode(path, target) for path in paths]


def encode(path: str | pathlib.Path, target: Target) -> Encoded:
    """The image at `path` as `target` wants it; a plain JPEG or PNG of that size is kept as is."""
    height, width = target.size
    mode = "RGB" if target.channels == 3 else "L"
    try:
        data = pathlib.Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=pixels.formats()) as image:
            image.load()  # a truncated file fails here
            pixels.check_depth(image, data)
            same = image.mode == mode and image.size == (width, height)
            if same and pixels.is_plain(image, data):
                return Encoded(data)
            # A photograph's second picture, for a 3-D screen or as a preview, is no second frame.
            num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            ImageOps.exif_transpose(image, in_place=True)
            image = pixels.to_8_bits(image, target.channels, target.background)
            image = pixels.cropped(image, "center", target.size)
        out = io.BytesIO()
        if target.encoding == "jpeg":
            image.save(out, "JPEG", quality=target.quality, subsampling=0)
        else:
            image.save(out, "PNG")
        return Encoded(out.getvalue(), num_frames=num_frames)
    except Exception as error:  # Pillow's decoders raise errors of any type on a broken file
        reason = re.sub(r" ?<_io.BytesIO[^>]*>", "", str(error))
        return Encoded(None, problem=f"{type(error).__name__}: {reason}")
