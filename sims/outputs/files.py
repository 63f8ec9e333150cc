"""Where an output goes: checked before anything is simulated, written beside and renamed."""

from pathlib import Path

from research.atomic import atomic_write
from research.errors import ConfigError


def check_target(path: Path, option: str) -> None:
    """ConfigError where `path` cannot become a file: its folder is missing, or it is a folder itself."""
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; give the name of a file in it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.absolute().parent}; make it first")


def write_bytes(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    with atomic_write(path) as file:
        file.write(data)
