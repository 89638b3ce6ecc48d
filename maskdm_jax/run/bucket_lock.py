"""A lock in a bucket: an object that is made only if there is none, and renewed by its holder.

The request that makes it carries the precondition that no such object exists, so of several
processes one succeeds. The holder changes the object's metadata every `_RENEW_S`; whoever waits
removes an object that has not changed for `_EXPIRES_S` by its own clock, with the precondition that
it is still the same. A holder that cannot renew its lock for `bucket.LOST_S`, which is less, ends
its process: from then on another may write.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid

from maskdm_jax.run import bucket

_RENEW_S = 10
_EXPIRES_S = 180
_ENDED = 75  # EX_TEMPFAIL of sysexits.h, as `BucketError.exit_code`


class Lock:
    """One process's view of a lock.

    Attributes:
      holder_lives: whether the lock has changed while this process waited for it, and lately.
      holder_died: whether the last `acquire` has removed the lock of a process that is gone.
    """

    def __init__(self, place, facts: dict):
        """
        Args:
          place: the object.
          facts: who this process is, for others to read.
        """
        self._place = place
        self._name, self._key = place.parts[2], "/".join(place.parts[3:])
        self._record = {**facts, "machine": _machine(), "token": uuid.uuid4().hex}
        self._generation = None  # of the object that this process made
        self._seen = (None, 0.0)  # the state of another's lock, and since when it is unchanged
        self.holder_lives = self.holder_died = False
        self._released = threading.Event()

    def acquire(self) -> dict | None:
        """Takes the lock if nobody holds it; otherwise returns the holder's facts.

        Raises:
          OSError: if the object cannot be written.
          BucketError: if the bucket does not answer.
        """
        content = json.dumps(self._record).encode()
        with contextlib.suppress(FileExistsError):
            fs = bucket.system()
            bucket.retried(fs.pipe_file, os.fspath(self._place), content, mode="create")
        try:
            found = bucket.retried(self._request, "GET")
            holder = json.loads(bucket.retried(self._place.read_bytes))
        except FileNotFoundError:  # released meanwhile
            return {}
        except ValueError:
            holder = {}
        if holder.get("token") == self._record["token"]:  # also if the first answer was lost
            self._generation = found["generation"]
            threading.Thread(target=self._renew, daemon=True).start()
            return None
        state = (found["generation"], found["metageneration"])
        if state != self._seen[0]:
            self.holder_lives = self._seen[0] is not None
            self._seen = (state, time.monotonic())
        silent_s = time.monotonic() - self._seen[1]
        self.holder_lives &= silent_s < 3 * _RENEW_S
        self.holder_died = _has_died(holder) or silent_s > _EXPIRES_S
        if self.holder_died:
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # others wait too
                bucket.retried(self._request, "DELETE", ifGenerationMatch=found["generation"])
        return holder

    def release(self) -> None:
        """Removes the object, if it is still this process's and the bucket answers."""
        self._released.set()
        with contextlib.suppress(Exception):  # it expires; what ended the run is the error to show
            self._request("DELETE", ifGenerationMatch=self._generation)

    def _request(self, method, **options):
        return bucket.request(method, "b/{}/o/{}", self._name, self._key, **options)

    def _renew(self):
        """Until the release; ends the process if the lock is lost."""
        last = time.monotonic()
        for beat in range(1, sys.maxsize):
            if self._released.wait(_RENEW_S):
                return
            try:
                change = {"metadata": {"renewed": str(beat)}}
                self._request("PATCH", json=change, ifGenerationMatch=self._generation)
                last = time.monotonic()
            except (FileNotFoundError, FileExistsError):
                if not self._released.is_set():
                    _end(f"{self._place} is no longer this run's: another run has taken it over")
            except Exception as error:  # whatever it is, the lock was not renewed
                is_lost = time.monotonic() - last > bucket.LOST_S
                if is_lost and not self._released.is_set():
                    _end(bucket.described(error))


def _end(sentence):
    """Ends the process, whatever its threads wait for: TensorStore would for a quarter hour."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(_ENDED)


def _machine():
    """What process numbers are unique in: one start of a machine, and there one container."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _has_died(holder):
    """Whether the holder was a process of this machine that is gone."""
    if holder.get("machine") != _machine() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False
