"""What a driver is asked while it runs: a file in the study's root that it reads every few seconds."""

import json
from pathlib import Path
from typing import Literal

from research.atomic import write_text
from research.errors import ConfigError
from sweeps import schema

Workers = int | Literal["auto"]


def set_workers(root: Path, workers: Workers) -> None:
    """Have the running driver use so many workers, until it ends; a worker too many writes a checkpoint first and its run goes on
    elsewhere.  ConfigError for less than one."""
    if workers != "auto" and workers < 1:
        raise ConfigError(f"workers = {workers}: must be >= 1 or 'auto'")
    write_text(root / schema.CONTROL_FILE, json.dumps({"workers": workers}))


def asked_workers(root: Path) -> Workers | None:
    """What `set_workers` asked for; None if nothing did."""
    try:
        found = json.loads((root / schema.CONTROL_FILE).read_text(encoding="utf-8")).get("workers")
    except (OSError, ValueError, AttributeError):
        return None
    valid = found == "auto" or (isinstance(found, int) and not isinstance(found, bool) and found >= 1)
    return found if valid else None
