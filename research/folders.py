"""Where files are kept that belong to no run."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$MOELAB_CACHE, or moelab/ in the user's cache directory."""
    if chosen := os.environ.get("MOELAB_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moelab"
