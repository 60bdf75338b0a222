"""Start-up of several processes, and the notice before a machine is taken away.

How the processes of a run find each other, first that applies:

1. Settings: the arguments of `start`, or ``SOTALIGN_COORDINATOR`` (``host:port`` of process 0),
   ``SOTALIGN_NUM_PROCESSES`` and ``SOTALIGN_PROCESS_ID``. In a pod of an indexed Kubernetes Job the
   id may be left out: it is the pod's index. ``SOTALIGN_NUM_PROCESSES=1`` turns detection off.
2. A SLURM step of several tasks (``srun``).
3. A Cloud TPU of several hosts, on VMs or on GKE.
4. An indexed Kubernetes Job or JobSet, where jax may ask the cluster: ``pip install jax[k8s]``.
5. Nothing of these: one process, and nothing is done.

Variables of torchrun and MPI mean nothing here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax._src import clusters
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

__all__ = [
    "Preempted",
    "PreemptionWatch",
    "Start",
    "broadcast",
    "from_first",
    "gather",
    "left_to_first",
    "quick_end",
    "start",
    "together",
    "use_own_host",
]

T = TypeVar("T")

_NAMES = {
    "coordinator": "SOTALIGN_COORDINATOR",
    "num_processes": "SOTALIGN_NUM_PROCESSES",
    "process_id": "SOTALIGN_PROCESS_ID",
}
_TIMEOUT = "SOTALIGN_START_TIMEOUT"
_HEARTBEAT = "SOTALIGN_HEARTBEAT_TIMEOUT"
_POD_INDEX = "JOB_COMPLETION_INDEX"
# Which chips of a Cloud TPU a process uses; one of them is enough to have it decided.
_TPU_BOUNDS = {"TPU_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"}
# Bytes of an error that the other processes are told.
_MESSAGE = 2_000
# Seconds in which processes that fail for the same reason should all have failed.
_GRACE = 5
# Steps that hold a shell rather than the tasks of srun: of salloc, and of the batch script.
_SHELL_STEPS = ("4294967290", "4294967291")


class Start(NamedTuple):
    """How a process was started.

    Attributes:
        method: ``"single"``, ``"settings"``, ``"slurm"``, ``"tpu"``, ``"kubernetes"``, or
            ``"elsewhere"`` where the caller had started ``jax.distributed`` already.
        process_index: of this process.
        process_count: of all.
    """

    method: str
    process_index: int
    process_count: int


_SINGLE = Start("single", 0, 1)
_started: Start | None = None


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int | None = None,
    heartbeat: int | None = None,
) -> Start:
    """Start ``jax.distributed`` if this process is one of several; see the module for how.

    Call it before anything else that uses a device. A second call returns what the first one did.

    Args:
        coordinator: ``host:port`` of process 0; by default from the environment, as the next two.
        num_processes: how many there are.
        process_id: which of them this is, from 0.
        timeout: seconds to wait for the others; by default ``SOTALIGN_START_TIMEOUT``, or 300. jax
            then ends the process (SIGABRT).
        heartbeat: seconds without a sign of life after which a process counts as lost, and jax ends
            the others (SIGABRT); by default ``SOTALIGN_HEARTBEAT_TIMEOUT``, or 100.

    Returns:
        The method taken, and the index and count of processes.

    Raises:
        ValueError: a setting is missing beside others, or is not of its kind.
        OSError: nobody answers at the coordinator's address, its port is taken, or
            ``jax.distributed`` or the cluster that it asks refused.
    """
    global _started
    if jax.distributed.is_initialized():
        return _started or Start("elsewhere", jax.process_index(), jax.process_count())
    seconds = _whole_number("timeout", _TIMEOUT, timeout, least=1) or 300
    lost_after = _whole_number("heartbeat", _HEARTBEAT, heartbeat, least=1) or 100
    found, arguments = _from_settings(coordinator, num_processes, process_id) or _from_cluster()
    if found.process_count == 1:
        return _SINGLE
    # jax ends a process that waited in vain and does not say for whom.
    logging.getLogger(__name__).warning(
        "process %d of %d (%s): waiting for the others, at most %d s",
        *(found.process_index, found.process_count, found.method, seconds),
    )
    if found.method == "settings":
        # Where either fails jax ends the process, and does not name the address.
        if found.process_index == 0:
            _check_port(arguments["coordinator_address"])
        else:
            _wait_for(arguments["coordinator_address"], seconds)
    try:
        jax.distributed.initialize(
            initialization_timeout=seconds, heartbeat_timeout_seconds=lost_after, **arguments
        )
    except RuntimeError as error:
        raise ConnectionError(f"start ({found.method}): {error}") from error
    _started = found
    return found


def left_to_first() -> Start | None:
    """Whether this is a process that leaves what several cannot share to process 0.

    Asks settings and surroundings as `start` does, and starts nothing: the process may stand beside
    those of a running training, with the same settings.

    Returns:
        None in process 0, which does it; in the others, how they were started.

    Raises:
        ValueError: as `start`; or several hosts of a Cloud TPU, of which none can use it alone.
        OSError: the cluster that it asks refused.
    """
    found, _ = _from_settings(None, None, None) or _from_cluster()
    if found.process_count > 1 and _tpu_cluster() is not None:
        raise ValueError(
            f"this is one of {found.process_count} hosts of a Cloud TPU, which can only be used by "
            "all together; start it on one host, with JAX_PLATFORMS=cpu"
        )
    return found if found.process_index else None


def use_own_host() -> None:
    """On one of several hosts of a Cloud TPU: makes its own chips a TPU of one host.

    Else the first use of a device waits until a process runs on each of the hosts, which work that
    is not done together cannot expect. Call it before that. Nothing is done elsewhere, or where
    ``TPU_PROCESS_BOUNDS``, ``TPU_VISIBLE_CHIPS`` or ``TPU_VISIBLE_DEVICES`` say what to use.
    """
    if os.environ.get(_NAMES["num_processes"]) == "1" or _TPU_BOUNDS & os.environ.keys():
        return
    try:
        cluster = _tpu_cluster()
        if cluster is None or cluster.get_process_count() == 1:
            return
    except OSError:  # no metadata, and so no Cloud TPU of several hosts
        return
    # Of several slices, or of the neighbours that GKE names: there are none.
    for name in list(os.environ):
        if name.startswith("MEGASCALE_") or name == "TPU_PROCESS_ADDRESSES":
            del os.environ[name]
    os.environ |= {
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_HOST_BOUNDS": "1,1,1",
        # A host of a slice of several has four chips; on GKE it is said.
        "TPU_CHIPS_PER_PROCESS_BOUNDS": os.environ.get("TPU_CHIPS_PER_HOST_BOUNDS", "2,2,1"),
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def _from_settings(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[Start, dict[str, Any]] | None:
    """The start that settings ask for, with the arguments of jax; None without settings."""
    coordinator = coordinator or os.environ.get(_NAMES["coordinator"]) or None
    count = _whole_number("num_processes", _NAMES["num_processes"], num_processes, least=1)
    index = _whole_number("process_id", _NAMES["process_id"], process_id, least=0)
    if coordinator is None and index is None:
        if count is None:
            return None
        if count == 1:
            return _SINGLE, {}
    if index is None:
        index = _whole_number("process_id", _POD_INDEX, None, least=0)
    given = {"coordinator": coordinator, "num_processes": count, "process_id": index}
    missing = [f"{name} ({_NAMES[name]})" for name, value in given.items() if value is None]
    if missing or coordinator is None or count is None or index is None:
        known = [name for name in given if given[name] is not None]
        raise ValueError(
            f"{', '.join(missing)}: missing, while {', '.join(known)} "
            f"{'is' if len(known) == 1 else 'are'} given; give all three or none"
        )
    if index >= count:
        raise ValueError(
            f"process_id ({_NAMES['process_id']}): must be less than num_processes ({count}), "
            f"got {index}"
        )
    _host_and_port(coordinator)
    # "deactivate": or jax would complete what is complete from a cluster that it finds.
    return Start("settings", index, count), {
        "coordinator_address": coordinator,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _from_cluster() -> tuple[Start, dict[str, Any]]:
    """The start that the surroundings ask for, with the arguments of jax."""
    cluster: Any = None
    method = "single"
    if _in_srun_task():
        method, cluster = "slurm", clusters.SlurmCluster
    elif tpu := _tpu_cluster():
        method, cluster = "tpu", tpu
    elif "KUBERNETES_SERVICE_HOST" in os.environ and _POD_INDEX in os.environ:
        method, cluster = "kubernetes", _kubernetes_cluster()
    elif os.environ.get("JAX_COORDINATOR_ADDRESS"):
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS: is set, and nothing says how many processes there are; set "
            f"{', '.join(_NAMES.values())}, or remove it"
        )
    if cluster is None:
        return _SINGLE, {}
    try:
        found = Start(method, cluster.get_process_id(), cluster.get_process_count())
    except RuntimeError as error:
        raise ConnectionError(f"start ({method}): {error}") from error
    return found, {"cluster_detection_method": cluster.name or None}


def _in_srun_task() -> bool:
    """Whether srun started this process beside others.

    The shell of salloc, and a batch script, have the variables of the job, but are alone.
    """
    if os.environ.get("SLURM_STEP_ID") in _SHELL_STEPS:
        return False
    return clusters.SlurmCluster.is_env_present() and clusters.SlurmCluster.get_process_count() > 1


def _tpu_cluster() -> Any:
    """jax's class for the Cloud TPU that this machine is part of; None where it is not."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if platforms and "tpu" not in platforms.split(","):
        return None
    try:
        for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
            if cluster.is_env_present():
                return cluster
    except OSError as error:
        raise ConnectionError(
            f"start (tpu): the metadata of the Cloud TPU cannot be read ({error}); on another "
            f"machine with a TPU set {_NAMES['num_processes']}=1"
        ) from error
    return None


def _kubernetes_cluster() -> Any:
    """jax's class for a pod, which asks the cluster's API for the number of pods."""
    if importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            f"{_POD_INDEX}: is set, and nothing says how many pods there are; set "
            f"{_NAMES['coordinator']} and {_NAMES['num_processes']} (1 if this pod is alone), or "
            "install jax[k8s]"
        )
    return clusters.K8sCluster if clusters.K8sCluster.is_env_present() else None


def _whole_number(name: str, variable: str, given: int | None, *, least: int) -> int | None:
    """An argument, or else a variable of the environment, as a number in range."""
    text = os.environ.get(variable) if given is None else str(given)
    if not text:
        return None
    source = f"{name} ({variable})" if given is None else name
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{source}: must be a whole number, got {text!r}") from None
    if value < least:
        raise ValueError(f"{source}: must be at least {least}, got {value}")
    return value


def _host_and_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"coordinator ({_NAMES['coordinator']}): must be host:port, got {coordinator!r}"
        )
    return host.strip("[]"), int(port)


def _check_port(coordinator: str) -> None:
    """Raises OSError where process 0 cannot listen."""
    _, port = _host_and_port(coordinator)
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise OSError(
            f"coordinator: process 0 cannot listen on port {port} ({error.strerror}); give another"
        ) from error


def _wait_for(coordinator: str, timeout: int) -> None:
    """Wait until process 0 listens."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection(_host_and_port(coordinator), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"coordinator: nobody answered at {coordinator} for {timeout} s ({error}); is "
                    "process 0 running, and its port open?"
                ) from error
        time.sleep(0.2)


@contextlib.contextmanager
def quick_end() -> Iterator[None]:
    """Around a whole program: where it fails as one of several, it ends without the others.

    Else it would wait for them at jax's own end, up to five minutes, and they for it in a
    computation. Ended, it is noticed: by a connection that breaks, or after the heartbeat of
    `start` at the latest. Where all fail at once, as on a wrong configuration, all end as usual.
    """
    try:
        yield
    except BaseException as error:
        status = error.code if isinstance(error, SystemExit) else 1
        if _started is None or status in (None, 0) or _all_failed():
            raise
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        elif isinstance(status, str):
            print(status, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _all_failed() -> bool:
    """Whether all processes come here within a few seconds."""
    client: Any = global_state.client
    try:
        client.wait_at_barrier("sotalign_failed", timeout_in_ms=1_000 * _GRACE)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def broadcast(arrays: Sequence[np.ndarray], source: int) -> list[np.ndarray]:
    """What one process has, on all of them, to the last bit.

    Args:
        arrays: the values where this is process ``source``; elsewhere only shapes and dtypes count.
        source: index of the process that has them.

    Returns:
        The arrays of ``source``.
    """
    if jax.process_count() == 1:
        return list(arrays)
    here = jax.process_index() == source
    out = []
    for array in arrays:
        # As bytes: float64 would go through float32.
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        data = np.asarray(multihost_utils.broadcast_one_to_all(data, is_source=here))
        out.append(np.frombuffer(data.tobytes(), array.dtype).reshape(array.shape))
    return out


def gather(array: np.ndarray) -> list[np.ndarray]:
    """What every process has, on all of them, to the last bit.

    Args:
        array: the value of this process, of the same shape and dtype on all.

    Returns:
        The arrays, by process.
    """
    if jax.process_count() == 1:
        return [array]
    data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)  # as in `broadcast`
    everyone = np.asarray(multihost_utils.process_allgather(data))
    return [np.frombuffer(one.tobytes(), array.dtype).reshape(array.shape) for one in everyone]


def together(work: Callable[[], T]) -> T:
    """Does something that fails in every process of a run if it fails in one of them.

    Args:
        work: every process calls it; nothing in it may wait for another process.

    Returns:
        What it returned here, once it is done in every process.

    Raises:
        Exception: what it raised here.
        ValueError: it failed elsewhere; says in which process, and why.
    """
    if jax.process_count() == 1:
        return work()
    failure: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:
        failure = error
    said = "" if failure is None else str(failure) or type(failure).__name__
    said = said.encode(errors="backslashreplace")[:_MESSAGE]  # file names need not be Unicode
    text = np.frombuffer(said.ljust(_MESSAGE, b"\0"), np.uint8)
    everyone = [one.tobytes().rstrip(b"\0").decode(errors="replace") for one in gather(text)]
    if failure is not None:
        raise failure
    for number, message in enumerate(everyone):
        if message:
            raise ValueError(f"process {number}: {message}")
    return result


def from_first(function: Callable[[], Any]) -> Any:
    """What a function gives in process 0, in all processes of the run.

    For decisions that all must take alike: files of a shared disk may look older to one process
    than to another, and sums differ in their last bits from machine to machine.

    Args:
        function: called in process 0 alone; gives what JSON can hold.

    Returns:
        What it gave; where there are several processes, lists for tuples.

    Raises:
        Exception: as `together`, where the function failed.
    """
    if jax.process_count() == 1:
        return function()
    first = jax.process_index() == 0
    text = together(lambda: json.dumps(function()).encode() if first else b"")
    (size,) = broadcast([np.array(len(text), np.int64)], 0)
    data = np.frombuffer(text, np.uint8) if first else np.zeros(int(size), np.uint8)
    (data,) = broadcast([data], 0)
    return json.loads(data.tobytes())


class Preempted(Exception):
    """A run stopped because of SIGTERM; started again it goes on.

    Args:
        step: the step that it goes on from.
    """

    def __init__(self, step: int):
        super().__init__(f"stopped by SIGTERM; the same command goes on from step {step}")
        self.step = step


class PreemptionWatch:
    """Notices SIGTERM, by which schedulers announce that they take the machine away.

    A context manager: inside it SIGTERM does not end the process but is remembered. Signals belong
    to the main thread; in another one nothing is installed, and nothing will be noticed.
    """

    def __init__(self):
        self._noticed = False
        self._installed = False
        self._earlier: Any = None

    def __enter__(self) -> PreemptionWatch:
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._notice)
            self._installed = True
        return self

    def __exit__(self, *_) -> None:
        if self._installed:
            # None: the handler was not one of Python's, which could put it back.
            signal.signal(signal.SIGTERM, self._earlier or signal.SIG_DFL)
            self._installed = False

    def _notice(self, *_) -> None:
        self._noticed = True

    @property
    def noticed(self) -> bool:
        """Whether this process got SIGTERM: the run should save and stop."""
        return self._noticed

    def agreed(self, step: int) -> bool:
        """Whether any process of the run got SIGTERM: the same answer in all of them.

        Every process must call it at the same steps. One process alone only looks at its own
        notice; several gather two numbers each. (jax has a sync point of its own, which answers at
        a later step that must be one of the steps asked about, and whose handler takes SIGTERM away
        from this one.)

        Raises:
            RuntimeError: the processes are not at the same step.
        """
        if jax.process_count() == 1:
            return self._noticed
        mine = np.array([self._noticed, step], np.int32)
        everyone = np.asarray(multihost_utils.process_allgather(mine))
        if (everyone[:, 1] != step).any():
            raise RuntimeError(f"processes are at different steps: {everyone[:, 1].tolist()}")
        return bool(everyone[:, 0].any())
