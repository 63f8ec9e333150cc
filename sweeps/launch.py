"""A study driven from a command: its progress shown, its end as an exit code."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from sweeps import schema
from sweeps.cluster import RayExecutor
from sweeps.driver import Driver
from sweeps.executors import Executor, InlineExecutor
from sweeps.places import tracking_uri
from sweeps.progress import progress
from sweeps.status import Reader, read_json
from sweeps.study import Study

FINISHED_WITH_FAILURES, STOPPED = 3, 143


def drive(study: Study, root: Path, executor: str, function: str) -> int:
    """Run a study until it has ended; 0, 3 (finished with failures) or 143 (stopped).  `executor`: ray or inline."""

    def make(own: Study, runs: int) -> Executor:
        return InlineExecutor() if executor == "inline" else RayExecutor(own.resources, runs)

    with progress(root) as announce:
        state = Driver(study, root, make, announce, function).run()
    print(f"{state}: {root}")
    behind = read_json(root / schema.STATE_FILE).get("mlflow_behind")
    late = f" (away: {behind}; `run` again sends what is missing)" if behind else ""
    print(f"MLflow: {tracking_uri()}{late}   report: python -m reports build {root}")
    return STOPPED if state == schema.STOPPED else 0 if state == schema.FINISHED else FINISHED_WITH_FAILURES


def drive_for_json(study: Study, root: Path, executor: str, function: str) -> tuple[int, dict[str, Any]]:
    """The same with everything that is said on stderr; the exit code, and what `status --json` says in the end."""
    with redirect_stdout(sys.stderr):  # whatever a trial function prints in this process too
        code = drive(study, root, executor, function)
    return code, Reader(root).read(driven=False).to_dict()
