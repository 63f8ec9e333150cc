"""One worker: runs a job at a time in a thread, on cores of its own, and answers questions meanwhile."""

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sweeps import schema, trial
from sweeps.failures import Failure, classify
from sweeps.system_metrics import load_psutil
from sweeps.trial import Job

RECORDS_KEPT = 64
"""Records between two questions; older ones are in metrics.jsonl."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """What happened since the last question.  `summary` and `failure` are how the job ended; None while it runs.

    idle, longest: seconds since the last sign of progress, and the longest there were between two of them so far.
    """

    said: list[str] = field(default_factory=list)
    records: list[dict[str, float]] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    failure: Failure | None = None
    idle: float = 0.0
    longest: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a worker lives.  `cores`: those it is pinned to; empty where it is not.  `killed`: processes that the node's kernel
    had killed for want of memory when it began."""

    node: str
    host: str
    pid: int
    cores: tuple[int, ...]
    killed: int


class Worker:
    """Becomes a Ray actor as it is.

    cores: to pin this process to so many cores of its own, one trial per core: a thread that shares its core with another's
    stalls both.  0 leaves it where the system puts it.
    """

    def __init__(self, cores: int = 0, directory: str | None = None) -> None:
        if directory is not None and os.path.isdir(directory):
            os.chdir(directory)  # the paths of a study's texts are relative to where the study was started
        self._locks, mine = take_cores(cores)
        self._place = Place(node=_node(), host=socket.gethostname(), pid=os.getpid(), cores=mine, killed=killed_for_memory())
        self._stop = threading.Event()
        self._news = threading.Event()
        self._said: deque[str] = deque(maxlen=1000)
        self._records: deque[dict[str, float]] = deque(maxlen=RECORDS_KEPT)
        self._summary: dict[str, Any] | None = None
        self._failure: Failure | None = None
        self._progress = time.monotonic()
        self._longest = 0.0

    def place(self) -> Place:
        return self._place

    def address(self) -> str:
        """host:port that is free now, at which this node's neighbours reach it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{_reached_at()}:{probe.getsockname()[1]}"

    def start(self, job: Job) -> None:
        """Begin; `poll` says how it goes."""
        self._summary, self._failure = None, None
        self._stop.clear()
        self._news.clear()
        self._progress, self._longest = time.monotonic(), 0.0
        if job.group is not None:
            listen_where_reached()
        threading.Thread(target=self._run, args=(job,), daemon=True, name=job.run).start()

    def _run(self, job: Job) -> None:
        try:
            self._summary = trial.call(job, self._should_stop, self._said.append, self._record)
        except trial.RunBusyError as error:
            self._failure = Failure(kind=schema.HANG, text=str(error))
        except BaseException as error:
            self._failure = classify(error)
        self._news.set()

    def _record(self, record: Mapping[str, float]) -> None:
        self._advance()
        self._records.append(dict(record))

    def _should_stop(self) -> bool:
        self._advance()
        return self._stop.is_set()

    def _advance(self) -> None:
        now = time.monotonic()
        self._longest, self._progress = max(self._longest, now - self._progress), now

    def poll(self, wait: float = 0.0) -> Answer:
        """What happened since the last question; waits up to `wait` seconds for the end of the job."""
        ended = self._news.wait(wait) if wait else self._news.is_set()
        return Answer(
            said=_taken(self._said),
            records=_taken(self._records),
            summary=self._summary if ended else None,
            failure=self._failure if ended else None,
            idle=time.monotonic() - self._progress,
            longest=self._longest,
        )

    def request_stop(self) -> None:
        """The run writes a checkpoint after its next record and ends as stopped."""
        self._stop.set()


def _node() -> str:
    """Ray's name of the node that this process is an actor on; empty in a process of its own."""
    ray = sys.modules.get("ray")
    return str(ray.get_runtime_context().get_node_id()) if ray is not None and ray.is_initialized() else ""


def _reached_at() -> str:
    """The address by which Ray knows this node.  A host's name will not do: many a machine's own resolves to its loopback."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return str(ray.util.get_node_ip_address())
    return socket.gethostbyname(socket.gethostname())


def listen_where_reached() -> None:
    """Have gloo and nccl use the network interface of that address; left to themselves they go by the host's name, too."""
    reached_at = _reached_at()
    for interface, addresses in load_psutil().net_if_addrs().items():
        if any(address.address == reached_at for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _taken(queue: deque[Any]) -> list[Any]:
    return [queue.popleft() for _ in range(len(queue))]


def take_cores(count: int, folder: Path | None = None) -> tuple[list[FileLock], tuple[int, ...]]:
    """Pin this process to `count` cores that no other worker on this machine holds; none, and unpinned, if there are not so many.

    A core is held by a lock that goes with the process, so workers of several studies do not meet on one.
    """
    if count < 1 or not hasattr(os, "sched_setaffinity"):
        return [], ()
    folder = folder or Path(tempfile.gettempdir()) / f"moelab-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    held: list[FileLock] = []
    cores: list[int] = []
    for core in sorted(os.sched_getaffinity(0)):
        lock = FileLock(folder / f"{core}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        held.append(lock)
        cores.append(core)
        if len(cores) == count:
            os.sched_setaffinity(0, cores)
            return held, tuple(cores)
    for lock in held:
        lock.release()
    return [], ()


def killed_for_memory() -> int:
    """Processes that this machine's kernel has killed for want of memory since it started; 0 where it does not say."""
    try:
        lines = dict(line.split() for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines())
        return int(lines.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def bury(pid: int) -> int:
    """Run on the node of a worker that was lost: make sure that its process is gone, and say `killed_for_memory`."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes()
        if name.startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
    return killed_for_memory()
