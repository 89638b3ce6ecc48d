"""Several processes: starting a run on them, and what they must agree on.

Every process runs the same program on its own devices; only process 0 writes what people read.
JAX's coordination service, which process 0 hosts, notices a dead process and ends the others.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskdm_jax.errors import ConfigError, StartError
from maskdm_jax.run import command_line, files, progress

_START_S = 300  # the slowest host of a cluster has this long to come up
_HEARTBEAT_S = 60  # a process that is silent for this long counts as dead, and the others end
_SHUTDOWN_S = 60  # the first process to finish waits this long for the last
_SHARED_S = 60  # network file systems show other hosts' new files only after a delay
# What JAX raises without devices: an assertion of its own if no plugin is installed for a platform.
_NO_DEVICES = (RuntimeError, AssertionError)
_LINGER_S = 5  # see `errors_end_all_processes`


def mute_libtpu() -> None:
    """Keeps libtpu from printing errors on a machine without a TPU; call it before `start`.

    libtpu prints them before its logging starts, so no log level silences them. They are about the
    topology, which it cannot look up: this tells it that there is one process on one host. Nothing
    changes where JAX sees a TPU, or where anything about one is set.
    """
    # JAX sets the one at its import if it sees no TPU, and the other if libtpu is installed.
    theirs = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}
    given = {name for name in os.environ if name.startswith("TPU_")}
    if "TPU_SKIP_MDS_QUERY" in given and given <= theirs:
        os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_PROCESS_BOUNDS": "1,1,1"}


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run; call it before JAX touches a device.

    With no argument, the processes come from Slurm, Open MPI or the TPU pod; a single process
    starts nothing.

    Args:
      coordinator: host:port of process 0, as the others reach it.
      num_processes: the number of processes, over all hosts.
      process_id: the index of this process, 0 to num_processes - 1.

    Raises:
      ConfigError: if only some arguments are given, or one is out of range.
      ConfigError: as `num_devices`, with several processes.
      StartError: if the processes cannot start.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    if any(value is not None for value in given.values()):
        _check(given)
        if num_processes == 1:
            return
        if process_id == 0:
            _check_port(coordinator)
        # With explicit arguments, do not let JAX query the cluster for this process's devices.
        where = f"the coordinator {coordinator}"
        arguments = dict(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    else:
        where = "the cluster's coordinator"
        arguments = _detect()
        if arguments is None:
            return
    _initialize(arguments, where)
    num_devices()
    if not is_main():
        progress.mute()


def num_devices() -> int:
    """The number of devices of all processes.

    Raises:
      ConfigError: if the platform that JAX_PLATFORMS names has none here.
    """
    try:
        return jax.device_count()
    except _NO_DEVICES as error:
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise ConfigError(
            f"JAX_PLATFORMS is {jax.config.jax_platforms!r}, but JAX finds no such device on "
            f"{socket.gethostname()}{reason}; expected a platform that this machine has and that "
            "JAX was installed for; type JAX_PLATFORMS=cpu before the command to compute on the "
            "CPU, or pip install '.[gpu]' for NVIDIA GPUs"
        ) from error


def agreed(numbers: list[int]) -> list[int]:
    """Process 0's list, on every process: all act on the folder, say, as process 0 sees it."""
    if jax.process_count() == 1:
        return numbers
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = numbers if is_main() else [0] * length
    return multihost_utils.broadcast_one_to_all(np.asarray(mine, np.int32)).tolist()


def check_shared(folder: pathlib.Path) -> None:
    """Raises ConfigError unless every process sees the same `folder`."""
    if not several():
        return
    (token,) = agreed([time.time_ns() % 2**31])
    path = folder / f".seen_by_all_{token}"
    if is_main():
        files.write_text(path, "")
    agreed([0])  # a barrier
    deadline = time.monotonic() + _SHARED_S
    while not any(each.name == path.name for each in folder.iterdir()):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--workdir {folder} on {socket.gethostname()} is not the folder that process 0 "
                "has there; expected one on a file system that all hosts share"
            )
        time.sleep(1)
    agreed([0])
    if is_main():
        path.unlink()


def is_main() -> bool:
    """Whether this is the process that writes logs, images and reports."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the run has several processes."""
    return jax.distributed.is_initialized()


@contextlib.contextmanager
def errors_end_all_processes(process_id: int | None = None) -> Iterator[None]:
    """With several processes, reports an error of the block and ends this process at once.

    An ordinary exit would wait for the others, which wait for this one in a collective.

    Args:
      process_id: the index of this process if it is known before JAX has devices.
    """
    try:
        yield
    except Exception as error:
        if not several():
            raise
        status = command_line.report(error)
        # The other processes abort once process 0, their coordinator, is gone. This leaves them
        # time to report their own error first, which may be the same.
        try:
            leads = is_main()
        except _NO_DEVICES:  # and so no index
            leads = not process_id
        if leads:
            time.sleep(_LINGER_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _check(given):
    missing = [f"--{name}" for name, value in given.items() if value is None]
    example = "--coordinator=HOST:PORT --num_processes=N --process_id=I"
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} not given; several processes started by hand need all three, "
            f"while one host, Slurm and TPU pods need none; type {example}"
        )
    found = re.fullmatch(r"\S+:(\d+)", given["coordinator"])
    if not found or not 1 <= int(found[1]) <= 65_535:
        raise ConfigError(
            f"--coordinator is {given['coordinator']!r}; expected the host of process 0 and a port "
            "from 1 to 65535; type --coordinator=node0:12345, say"
        )
    count, index = given["num_processes"], given["process_id"]
    if count < 1:
        raise ConfigError(
            f"--num_processes is {count}; expected at least 1; type --num_processes=1"
        )
    if not 0 <= index < count:
        raise ConfigError(
            f"--process_id is {index}; expected 0 to {count - 1}, since --num_processes is "
            f"{count}; type --process_id={count - 1}"
        )


def _check_port(coordinator):
    """StartError if process 0 cannot listen on the port; JAX would end in a segmentation fault."""
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise StartError(
            f"--coordinator is {coordinator!r}, and port {port} cannot be opened here: {error}; "
            f"type --coordinator={coordinator.rpartition(':')[0]}:PORT with a free port, the same "
            "in every process"
        ) from error


def _initialize(arguments, where):
    # After its own timeout JAX aborts with a stack trace; this reports one sentence before that.
    # The exit code permits a restart: hosts that came up late may find each other the next time.
    def give_up():
        print(
            f"error: {where} did not bring all processes together within {_START_S} s; start all "
            "of them with the same --coordinator, an open port and --process_id counting from 0",
            file=sys.stderr,
            flush=True,
        )
        os._exit(StartError.exit_code)

    watch = threading.Timer(_START_S, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=_START_S + 60,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (RuntimeError, ValueError) as error:
        raise StartError(
            f"several processes cannot start through {where}: {str(error).splitlines()[0]}; type "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    finally:
        watch.cancel()


def _detect():
    """Arguments of `jax.distributed.initialize` on this cluster; None for a single process."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return _slurm_devices(env)
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 or _num_tpu_hosts(env) > 1:
        return {}
    return None


def _slurm_devices(env):
    """JAX gives each task the one GPU with the task's index on its node. That is right if tasks
    share a node and see all its GPUs; otherwise a task owns every GPU that it sees."""
    alone = env.get("SLURM_STEP_NUM_NODES") == env["SLURM_NTASKS"]
    sees_one = re.fullmatch(r"[^,]+", env.get("CUDA_VISIBLE_DEVICES", ""))
    return {"local_device_ids": []} if alone or sees_one else {}


def _num_tpu_hosts(env):
    if (jax.config.jax_platforms or "tpu").split(",")[0] != "tpu":
        return 1
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")  # GKE
    slices = env.get("MEGASCALE_NUM_SLICES")
    # JAX sets TPU_SKIP_MDS_QUERY if the machine has no TPU.
    if not hosts and "TPU_SKIP_MDS_QUERY" not in env and importlib.util.find_spec("libtpu"):
        hosts = _metadata(env, "worker-network-endpoints")
        found = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata(env, "tpu-env"))
        slices = slices or (found and found.group(1))
    return len((hosts or "").split(",")) * int(slices or 1)


def _metadata(env, key):
    """An attribute of this TPU VM, from Google's metadata server; "" elsewhere."""
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.read().decode()
    except OSError:
        return ""
