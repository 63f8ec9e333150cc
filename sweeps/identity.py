"""Whether a study file is still that of the study in a root, and which commit runs it."""

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from research.config import differences, to_dict
from research.errors import ConfigError
from sweeps import schema
from sweeps.study import Study

MAY_CHANGE = ("resources.", "search.trials", "expects")
"""The means, the total number of trials, and what is expected, which changes no run; everything else is the question."""


def refuse_another_study(study: Study, root: Path) -> None:
    """ConfigError, with every difference, if `study` differs from the one that ran in `root` in more than its means.

    A root in which nothing ran binds nobody: what is left of it is removed.
    """
    path = root / schema.STUDY_FILE
    if not any((root / schema.RUNS_DIRECTORY).glob(f"*/{schema.RUN_FILE}")):
        for name in (schema.JOURNAL_FILE, schema.DATA_FILE):
            (root / name).unlink(missing_ok=True)
        return
    if not path.exists():
        return
    before = _with_defaults(yaml.safe_load(path.read_text(encoding="utf-8")))
    changed = [line for line in differences(before, to_dict(study)) if not line.startswith(MAY_CHANGE)]
    if changed:
        raise ConfigError(
            f"{path}: is of another study; changed since (old -> new):",
            *(f"  {line}" for line in changed),
            f"only {', '.join(name.rstrip('.') for name in MAY_CHANGE)} may change; give the study another name or --root, or remove {root}",
        )


def _with_defaults(before: Any) -> Any:
    """A study that an earlier version wrote does not know today's settings: they had their defaults."""
    try:
        return to_dict(TypeAdapter(Study).validate_python(before))
    except ValidationError:
        return before


def commit() -> str:
    """The commit that runs: from the submitter's environment in a Ray job, which has no .git, else from git."""
    if given := os.environ.get("MOELAB_COMMIT"):
        return given
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
