"""Where studies are kept.  Imports nothing heavy: `status` answers within a second."""

import os
from pathlib import Path

from research.errors import UserError
from sweeps import schema

MOST_LETTERS = 100


def is_name(text: str) -> bool:
    """Whether a study may be called so: 1 to MOST_LETTERS letters, digits, - and _, no - in front."""
    return 0 < len(text) <= MOST_LETTERS and text[0] != "-" and all(c.isalnum() or c in "-_" for c in text)


def home() -> Path:
    """$MOELAB_HOME; else .moelab here, or in the user's home when here is Ray's unpacked copy of a working directory."""
    if chosen := os.environ.get("MOELAB_HOME"):
        return Path(chosen).expanduser().absolute()
    here = Path.cwd()
    return (Path.home() if "_ray_pkg_" in str(here) or "working_dir_files" in str(here) else here) / ".moelab"


def study_root(name_or_path: str) -> Path:
    """A study's root directory, given by path, by name, or by its YAML file's path."""
    path = Path(name_or_path)
    if path.is_dir():
        return path.absolute()
    if path.suffix in (".yaml", ".yml"):
        from research.configfile import read_yaml  # noqa: PLC0415  (pydantic)

        return home() / "studies" / str(read_yaml(path).get("name"))
    return home() / "studies" / name_or_path


def started_root(name_or_path: str) -> Path:
    """The root of a study that was started; UserError, with the studies that there are, if there is none."""
    root = study_root(name_or_path)
    if (root / schema.STATE_FILE).exists():
        return root
    there = sorted(path.parent.name for path in (home() / "studies").glob(f"*/{schema.STATE_FILE}"))
    known = f"; studies in {home() / 'studies'}: {', '.join(there[:12])}" if there else ""
    raise UserError(f"{root}: is no study that was run (no {schema.STATE_FILE}){known}")


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, or a sqlite file in moelab's home."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
