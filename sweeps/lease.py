"""One driver per study: a lock that goes with its process, and a note of who holds it."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from research.atomic import write_text
from research.errors import UserError

LOCK_FILE = ".driver.lock"
DRIVER_FILE = "driver.json"
LOOK_SECONDS = 1.0
"""`is_driven` holds the lock for an instant; a driver that starts then is not refused for it."""


class StudyBusyError(UserError):
    """Another driver holds the study."""


@contextmanager
def lease(root: Path) -> Iterator[None]:
    """One driver per study: the lock goes with the process, however it ends."""
    lock = FileLock(root / LOCK_FILE)
    try:
        lock.acquire(timeout=LOOK_SECONDS)
    except Timeout:
        holder = holder_of(root)
        raise StudyBusyError(
            f"{root}: is being run by process {holder.get('pid')} on {holder.get('host')}; wait for it, or `python -m sweeps stop {root.name}`"
        ) from None
    try:
        write_text(root / DRIVER_FILE, json.dumps({"pid": os.getpid(), "host": platform.node(), "job": os.environ.get("RAY_JOB_ID")}))
        yield
    finally:
        lock.release()


def is_driven(root: Path) -> bool:
    """Whether a driver holds this study now.  (A process id in a file may be anybody's by now.)"""
    if not (root / LOCK_FILE).exists():
        return False
    lock = FileLock(root / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def holder_of(root: Path) -> dict[str, Any]:
    """pid, host and job of the driver that holds, or last held, a study."""
    path = root / DRIVER_FILE
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return value
