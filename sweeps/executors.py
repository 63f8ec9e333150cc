"""Where runs are computed: `RayExecutor` in long-lived actors, `InlineExecutor` in this process.

Both are asked in turns: `free()` slots, `start(job)`, `poll()` for what happened, `request_stop()`.
"""

import logging
import os
import secrets
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from research.errors import ConfigError, UserError
from sweeps import trial
from sweeps.study import Resources
from sweeps.trial import Job

START_SECONDS = 120.0
POLL_SECONDS = 60.0
PASSED_ON = ("MOELAB_HOME", "MOELAB_CACHE", "XDG_CACHE_HOME")
"""Workers of a Ray that was there before inherit its environment, not the driver's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """`said`: a line of progress.  `done`: a summary.  `error`: the run's own traceback.  `died`: the worker is gone."""

    run: str
    kind: Literal["said", "done", "error", "died"]
    text: str = ""
    summary: dict[str, Any] | None = None


class Executor(Protocol):
    @property
    def workers(self) -> int: ...
    def free(self) -> int: ...
    def start(self, job: Job) -> None: ...
    def poll(self) -> list[Event]: ...
    def request_stop(self) -> None: ...
    def request_prune(self, run: str) -> None: ...
    def close(self) -> None: ...


class Worker:
    """Runs one job at a time in a thread and answers questions meanwhile.  Becomes a Ray actor as it is."""

    def __init__(self, core: int | None = None, directory: str | None = None) -> None:
        if directory is not None and os.path.isdir(directory):
            os.chdir(directory)  # the paths of a study's texts are relative to where the study was started
        # One worker, one core: a thread that shares its core with another's stalls both.
        if core is not None and hasattr(os, "sched_setaffinity"):
            allowed = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {allowed[core % len(allowed)]})
        self._stop = threading.Event()
        self._prune = threading.Event()
        self._run_name: str | None = None
        self._said: deque[str] = deque()
        self._done: dict[str, Any] | None = None
        self._error: str | None = None

    def start(self, job: Job) -> int:
        """Begin; the worker's process id comes back."""
        self._done, self._error = None, None
        self._run_name = job.run
        self._prune.clear()
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return os.getpid()

    def _run(self, job: Job) -> None:
        try:
            self._done = trial.call(job, lambda: self._stop.is_set() or self._prune.is_set(), self._said.append)
        except UserError as error:
            self._error = str(error)
        except BaseException:
            self._error = traceback.format_exc()

    def poll(self) -> tuple[list[str], dict[str, Any] | None, str | None]:
        """Lines said since the last question, the summary if done, the traceback if failed."""
        said = [self._said.popleft() for _ in range(len(self._said))]
        return said, self._done, self._error

    def request_stop(self) -> None:
        self._stop.set()

    def request_prune(self, run: str) -> None:
        """End `run` alone, if it is still the one; it then says that it was stopped."""
        if self._run_name == run:
            self._prune.set()


def _events(run: str, answer: tuple[list[str], dict[str, Any] | None, str | None]) -> list[Event]:
    said, done, error = answer
    found = [Event(run=run, kind="said", text=line) for line in said]
    if done is not None:
        found.append(Event(run=run, kind="done", summary=done))
    if error is not None:
        found.append(Event(run=run, kind="error", text=error))
    return found


class InlineExecutor:
    """No Ray: one worker in this process, for debugging."""

    workers = 1

    def __init__(self) -> None:
        self._worker = Worker()
        self._run: str | None = None

    def free(self) -> int:
        return 0 if self._run else 1

    def start(self, job: Job) -> None:
        self._run = job.run
        self._worker.start(job)

    def poll(self) -> list[Event]:
        if self._run is None:
            return []
        events = _events(self._run, self._worker.poll())
        if any(event.kind in ("done", "error") for event in events):
            self._run = None
        return events

    def request_stop(self) -> None:
        self._worker.request_stop()

    def request_prune(self, run: str) -> None:
        self._worker.request_prune(run)

    def close(self) -> None:
        pass


class RayExecutor:
    """Actors on a cluster that is there ($RAY_ADDRESS, or the job's own), or on a local Ray of this machine.

    `max_restarts=0`: a worker that dies is seen, counted and replaced here, with its cause.
    """

    def __init__(self, resources: Resources, runs: int) -> None:
        if not os.environ.get("RAY_ADDRESS"):
            _token_of_its_own()
        import ray  # noqa: PLC0415  (seconds; only a run that uses it pays)

        self._ray = ray
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if not ray.is_initialized():
            _connect(ray, os.environ.get("RAY_ADDRESS"))
        total = ray.cluster_resources()
        gpus, cpus = total.get("GPU", 0.0), int(total.get("CPU", 0))
        if resources.gpus == "required" and not gpus:
            raise ConfigError("resources.gpus = 'required': this Ray has no GPU; use gpus: auto, or a cluster that has some")
        self._gpus = resources.gpus_per_worker if gpus and resources.gpus != "none" else 0.0
        fits = cpus // resources.cpus_per_worker
        if self._gpus:
            fits = min(fits, int(gpus / self._gpus + 1e-9))
        wanted = min(fits, runs) if resources.workers == "auto" else min(resources.workers, runs)
        if wanted < 1 or wanted > fits:
            raise ConfigError(
                f"resources: {resources.workers} workers of {resources.cpus_per_worker} CPUs and {self._gpus:g} GPUs do not fit on "
                f"{cpus} CPUs and {gpus:g} GPUs; room for {fits}"
            )
        # Only where the workers fill the machine: another study's workers would be pinned to the same cores.
        alone = len([n for n in ray.nodes() if n["Alive"]]) == 1 and wanted == cpus == os.cpu_count()
        self._pin = alone and not self._gpus and resources.cpus_per_worker == 1
        self._cpus = resources.cpus_per_worker
        self._actors: list[Any] = [self._actor(i) for i in range(wanted)]
        self._runs: list[str | None] = [None] * wanted
        self._await_workers()

    def _await_workers(self) -> None:
        """Ray waits for ever for resources that never come; a person should not."""
        try:
            self._ray.get([a.poll.remote() for a in self._actors], timeout=START_SECONDS)
        except self._ray.exceptions.GetTimeoutError as error:
            free, total = self._ray.available_resources(), self._ray.cluster_resources()
            held = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
            raise ConfigError(
                f"resources: {len(self._actors)} workers did not start within {START_SECONDS:.0f} s; free: {held}; is another job running?"
            ) from error

    @property
    def workers(self) -> int:
        return len(self._actors)

    def _actor(self, index: int) -> Any:
        threads = {"OMP_NUM_THREADS": str(self._cpus), "TOKENIZERS_PARALLELISM": "false"}
        threads |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_restarts": 0, "runtime_env": {"env_vars": threads}}
        return self._ray.remote(Worker).options(**options).remote(index if self._pin else None, os.getcwd())

    def free(self) -> int:
        return sum(run is None for run in self._runs)

    def start(self, job: Job) -> None:
        index = self._runs.index(None)
        self._runs[index] = job.run
        self._actors[index].start.remote(job)

    def poll(self) -> list[Event]:
        events = []
        for index, run in enumerate(self._runs):
            if run is None:
                continue
            try:
                found = _events(run, self._ray.get(self._actors[index].poll.remote(), timeout=POLL_SECONDS))
            except (self._ray.exceptions.RayError, TimeoutError) as error:
                self._ray.kill(self._actors[index])
                found = [Event(run=run, kind="died", text=_first_lines(error))]
                self._actors[index] = self._actor(index)
            if any(event.kind != "said" for event in found):
                self._runs[index] = None
            events += found
        return events

    def request_stop(self) -> None:
        for actor in self._actors:
            actor.request_stop.remote()

    def request_prune(self, run: str) -> None:
        if run in self._runs:
            self._actors[self._runs.index(run)].request_prune.remote(run)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()
        time.sleep(0)


def _token_of_its_own() -> None:
    """For the local Ray of this process, so that Ray leaves none in the user's home: with one there the next `ray start`
    would ask every client for it.  Ray reads the mode when it is imported."""
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _connect(ray: Any, address: str | None) -> None:
    """To the cluster at `address` ($RAY_ADDRESS, which a Ray job has), else to a local one that ends with this process."""
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(f"RAY_ADDRESS = {address!r}: is a dashboard's address, for `python -m sweeps submit`; `run` needs host:port or auto")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    place: dict[str, Any] = {"address": address}
    if not address:
        # "local", not Ray's own guess: that is the last cluster that was started here, dead or alive.
        place = {"address": "local", "include_dashboard": False}
    try:
        ray.init(**place, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"RAY_ADDRESS = {address!r}: no Ray cluster answers there ({str(error).splitlines()[0]})") from error


def _first_lines(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return " ".join(text.split())[:500]
