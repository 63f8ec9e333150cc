"""Where studies and their pages lie."""

import os
from pathlib import Path

from research.configfile import read_yaml


def home() -> Path:
    """$MOELAB_HOME, by default .moelab here."""
    return Path(os.environ.get("MOELAB_HOME") or ".moelab").expanduser().absolute()


def studies() -> Path:
    return home() / "studies"


def study_name(study: str) -> str:
    """The name of a study given by name, by its YAML file, or by its root."""
    path = Path(study)
    if path.suffix in (".yaml", ".yml"):
        return str(read_yaml(study).get("name"))
    return path.resolve().name if path.is_dir() else study


def study_root(study: str) -> Path:
    """The root of a study given by its root directory, its YAML file, or its name."""
    return Path(study).absolute() if Path(study).is_dir() else studies() / study_name(study)
