"""Why an attempt failed, whether another follows, and the list of them that every run keeps (attempts.json).

`classify` names what a worker raised; `decide` is the policy; `Attempts` the file; `reset_runs` puts runs back.
"""

import errno
import json
import re
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from research.atomic import NO_ROOM, write_text
from research.configfile import load_run_config
from research.errors import CollectiveFailed, ConfigError, DiskFull, OutOfMemory, UserError
from sweeps import schema
from sweeps.lease import lease
from sweeps.trial import accepts

MAX_TRIES = 3
"""Attempts that may be charged to a run.  Out of memory, a node's end, a stop and the driver's own death are not."""
NO_MEMORY = re.compile(r"DefaultCPUAllocator: .*memory|CUDA out of memory")
"""What torch's allocators say in a plain RuntimeError."""
CHARGED = (schema.DIED, schema.HANG, schema.DISK)
DISK_PAUSE_SECONDS = 30.0
ALL = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One of schema.FAILURE_CLASSES, and what was said: a sentence, or a traceback."""

    kind: str
    text: str

    @property
    def line(self) -> str:
        """The last line of what was said."""
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else self.kind


def classify(error: BaseException) -> Failure:
    """Of whatever a trial function raised, in its own worker."""
    chain = list(_chain(error))
    text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    if any(isinstance(e, OutOfMemory | MemoryError) or type(e).__name__ == "OutOfMemoryError" or NO_MEMORY.search(str(e)) for e in chain):
        return Failure(kind=schema.OUT_OF_MEMORY, text=text)
    if any(isinstance(e, DiskFull) or (isinstance(e, OSError) and e.errno in NO_ROOM) for e in chain):
        return Failure(kind=schema.DISK, text=text)
    if any(isinstance(e, OSError) and e.errno == errno.ENOMEM for e in chain):
        return Failure(kind=schema.OUT_OF_MEMORY, text=text)
    if lost := next((e for e in chain if isinstance(e, CollectiveFailed)), None):
        return Failure(kind=schema.HANG if lost.timed_out else schema.DIED, text=text)  # a neighbour's end, not this worker's bug
    return Failure(kind=schema.BUG, text=text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a run is tried again, from its last checkpoint; `said` is why not, or how."""

    again: bool
    said: str
    micro_batch_size: int | None = None
    """Of the attempts that follow; None for what it was."""
    pause: float = 0.0


def decide(failure: Failure, attempts: Sequence[dict[str, Any]], *, halved: int | None, why_not: str) -> Verdict:
    """What follows on the last of `attempts`, which ended in `failure`.

    halved: half the micro-batch of that attempt; None if it cannot be smaller, for which `why_not` is the reason.
    """
    tries = sum(a["charged"] and not a["forgiven"] for a in attempts)
    if failure.kind == schema.OUT_OF_MEMORY:
        if halved is None:
            return Verdict(again=False, said=f"not tried again: {why_not}")
        return Verdict(again=True, said=f"goes on with {halved} sequences per pass, the same global batch", micro_batch_size=halved)
    if failure.kind == schema.NODE:
        return Verdict(again=True, said="goes on elsewhere from the last checkpoint; not charged")
    if failure.kind in CHARGED:
        if tries >= MAX_TRIES:
            return Verdict(again=False, said=f"given up after {tries} such attempts")
        pause = DISK_PAUSE_SECONDS if failure.kind == schema.DISK else 0.0
        when = f" in {pause:.0f} s" if pause else ""
        return Verdict(again=True, said=f"attempt {len(attempts) + 1} goes on from the last checkpoint{when}", pause=pause)
    return Verdict(again=False, said="")


class Attempts:
    """A run's attempts.json: read when the run is planned, rewritten whenever an attempt begins or ends."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._began = directory, time.monotonic()
        self.all: list[dict[str, Any]] = read_attempts(directory)
        if self.all and self.all[-1]["state"] == "running":
            self.all[-1] |= {"state": "interrupted", "text": "its driver was gone"}

    @property
    def last(self) -> dict[str, Any]:
        return self.all[-1]

    def begin(self) -> int:
        """Note that an attempt begins, with the micro-batch to which the last one came; its number, from 1, comes back."""
        self._began = time.monotonic()
        size = self.all[-1]["next_micro_batch_size"] if self.all else None
        self.all.append(
            {
                "attempt": len(self.all) + 1,
                "state": "running",
                "failure": None,
                "text": None,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": None,
                "step": None,
                "node": None,
                "pid": None,
                "micro_batch_size": size,
                "next_micro_batch_size": size,
                "charged": False,
                "forgiven": False,
            }
        )
        self._write()
        return len(self.all)

    def end(self, state: str, failure: Failure | None = None) -> None:
        """How the attempt ended; if it failed, with what."""
        about = {"failure": failure.kind, "text": failure.text[-4000:]} if failure is not None else {}
        self.last.update({"state": state, "seconds": round(time.monotonic() - self._began, 3), **about})
        self._write()

    def fail(self, failure: Failure, function: str) -> Verdict:
        """The attempt ended without a summary; what follows on it, which is written down with it."""
        self.last["charged"] = failure.kind in CHARGED
        halved, why_not = self._halved(function) if failure.kind == schema.OUT_OF_MEMORY else (None, "")
        verdict = decide(failure, self.all, halved=halved, why_not=why_not)
        if verdict.micro_batch_size is not None:
            self.last["next_micro_batch_size"] = verdict.micro_batch_size
        try:
            self.end("lost" if verdict.again else schema.FAILED, failure)
        except OSError as error:
            if failure.kind != schema.DISK or error.errno not in NO_ROOM:
                raise  # a full disk is why it failed: the list is written when there is room, at the next attempt
        return verdict

    def _halved(self, function: str) -> tuple[int | None, str]:
        """Half the micro-batch of the last attempt; None, and why, where it cannot be smaller."""
        path = self._directory / schema.CONFIG_FILE
        config = load_run_config(json.loads(path.read_text(encoding="utf-8")), str(path))
        size = self.last["micro_batch_size"] or config.training.micro_batch_size or config.training.batch_size
        if not accepts(function, "micro_batch_size"):
            return None, f"{function} has no parameter `micro_batch_size`"
        if not config.micro_batches_add_up:
            return None, "its balance losses are defined over a batch: in smaller passes it would be another experiment"
        return (size // 2, "") if size > 1 else (None, "there is one sequence per pass already")

    def _write(self) -> None:
        write_text(self._directory / schema.ATTEMPTS_FILE, json.dumps(self.all, indent=1))


def read_attempts(directory: Path) -> list[dict[str, Any]]:
    """Every attempt at the run in `directory`, oldest first."""
    path = directory / schema.ATTEMPTS_FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found if isinstance(found, list) else []


def failure_class(summary: dict[str, Any]) -> str | None:
    """Of a summary.json: one of FAILURE_CLASSES, or None for a run that did not fail."""
    if summary.get("state") == schema.DIVERGED:
        return schema.DIVERGED
    if summary.get("state") != schema.FAILED:
        return None
    return str(summary.get("failure") or schema.BUG)


def reset_runs(root: Path, classes: Iterable[str], runs: Iterable[str] | None = None) -> list[str]:
    """Put the failed runs of these classes (or `all`) back, of `runs` only if given: the next `run` goes on with them from their
    last checkpoints, with all their tries; their earlier attempts stay on record, and so does the trial's number.

    Those that were put back come back by name.  ConfigError for an unknown class or run, StudyBusyError while a driver is at work.
    """
    wanted, only = set(classes), None if runs is None else set(runs)
    unknown = sorted(wanted - {*schema.FAILURE_CLASSES, ALL})
    if unknown:
        raise ConfigError(f"--class = {', '.join(unknown)}: must be of {', '.join((*schema.FAILURE_CLASSES, ALL))}")
    there = sorted(path.parent for path in (root / schema.RUNS_DIRECTORY).glob(f"*/{schema.RUN_FILE}"))
    missing = sorted((only or set()) - {folder.name for folder in there})
    if missing:
        raise ConfigError(f"--run = {', '.join(missing)}: no such run in {root / schema.RUNS_DIRECTORY}")
    back: list[str] = []
    if not there:
        return back
    with lease(root):
        for folder in there:
            summary = folder / schema.SUMMARY_FILE
            if not summary.exists() or (only is not None and folder.name not in only):
                continue
            kind = failure_class(json.loads(summary.read_text(encoding="utf-8")))
            if kind is None or not {kind, ALL} & wanted:
                continue
            attempts = [{**attempt, "forgiven": True} for attempt in read_attempts(folder)]
            write_text(folder / schema.ATTEMPTS_FILE, json.dumps(attempts, indent=1))
            summary.unlink()
            back.append(folder.name)
    return back


def was_reset(directory: Path) -> bool:
    """Whether the run was put back by `reset_runs` and has not come to an end since; it may have been stopped, or its driver killed."""
    summary = directory / schema.SUMMARY_FILE
    ended = summary.exists() and json.loads(summary.read_text(encoding="utf-8"))["state"] != schema.STOPPED
    return not ended and any(attempt["forgiven"] for attempt in read_attempts(directory))
