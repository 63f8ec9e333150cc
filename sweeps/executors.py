"""Where runs are computed: `RayExecutor` in long-lived actors (`sweeps.cluster`), `InlineExecutor` in this process.

Both are asked in turns: `free()` slots, `start(job)`, `poll()` for what happened, `request_stop()`.  A slot computes one run: one
worker, or the `workers_per_trial` of a group.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sweeps.control import Workers
from sweeps.failures import Failure
from sweeps.trial import Job
from sweeps.workers import Answer, Place, Worker


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """`started`: by which worker, `place`.  `said`: a line of progress.  `record`: what was recorded.  `done`: a summary.
    `failed`: the run's own error, or what became of its worker.  `workers`: a sentence about the workers, of no run."""

    run: str
    kind: Literal["started", "said", "record", "done", "failed", "workers"]
    text: str = ""
    summary: dict[str, Any] | None = None
    failure: Failure | None = None
    record: dict[str, float] | None = None
    place: Place | None = None


class Executor(Protocol):
    @property
    def workers(self) -> int:
        """Slots, those that are starting included."""

    def free(self) -> int:
        """Slots that can start a run now."""

    def start(self, job: Job) -> None:
        """Begin a run in a free slot."""

    def poll(self, wait: float = 0.0) -> list[Event]:
        """What happened since the last call, waited for up to `wait` seconds; each run that was started ends in `done` or `failed` once."""

    def request_stop(self, run: str | None = None) -> None:
        """Ask this run, or all, to write a checkpoint and end; it ends in `done` with state stopped (or finished after all)."""

    def resize(self, workers: Workers) -> None:
        """Have so many slots from now on, as far as there is room."""

    def close(self) -> None:
        """End the workers; a second call does nothing."""


def events(run: str, answer: Answer) -> list[Event]:
    """What a worker's answer says of its run."""
    found = [Event(run=run, kind="record", record=record) for record in answer.records]
    found += [Event(run=run, kind="said", text=line) for line in answer.said]
    if answer.summary is not None:
        found.append(Event(run=run, kind="done", summary=answer.summary))
    if answer.failure is not None:
        found.append(Event(run=run, kind="failed", failure=answer.failure))
    return found


class InlineExecutor:
    """No Ray: threads of this process, one unless told otherwise, for debugging and for work that only waits."""

    def __init__(self, workers: int = 1) -> None:
        self._workers = [Worker() for _ in range(workers)]
        self._runs: list[str | None] = [None] * workers
        self._started: list[Event] = []

    @property
    def workers(self) -> int:
        return len(self._workers)

    def free(self) -> int:
        return self._runs.count(None)

    def start(self, job: Job) -> None:
        slot = self._runs.index(None)
        self._runs[slot] = job.run
        self._started.append(Event(run=job.run, kind="started", place=self._workers[slot].place()))
        self._workers[slot].start(job)

    def poll(self, wait: float = 0.0) -> list[Event]:
        found, self._started = self._started, []
        deadline = time.monotonic() + wait
        busy = [slot for slot, run in enumerate(self._runs) if run is not None]
        if not busy:
            time.sleep(wait)
        while busy:
            for slot in busy:
                run = self._runs[slot]
                assert run is not None
                answer = self._workers[slot].poll(min(wait, 0.2) if len(busy) == 1 else 0.0)
                found += events(run, answer)
                if answer.summary is not None or answer.failure is not None:
                    self._runs[slot] = None
            if found or time.monotonic() >= deadline:
                break
            time.sleep(0.005)
        return found

    def request_stop(self, run: str | None = None) -> None:
        for slot, there in enumerate(self._runs):
            if there is not None and run in (None, there):
                self._workers[slot].request_stop()

    def resize(self, workers: Workers) -> None:
        """This process has the slots that it began with."""

    def close(self) -> None:
        pass
