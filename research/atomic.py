"""Files that are either whole or absent."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from research.errors import DiskFull

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file beside `path`, flushed to disk and renamed onto it when the block ends without error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path, "w") as file:
        file.write(text)


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to the disk: a rename is only safe from a power cut once its directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def room_for(path: Path, what: str) -> Iterator[None]:
    """DiskFull, with the place and what is free there, where the block finds no room on the disk for `path`.

    The libraries that write tensors raise errors of their own that are no OSError, with the system's number in their text.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _number(str(error))
        if number not in NO_ROOM:
            raise
        raise DiskFull(
            f"{path}: {what} cannot be written ({os.strerror(number)}): {_free(path)} free there; what stood there before was kept"
        ) from error


def _number(text: str) -> int | None:
    found = re.search(r"\(os error (\d+)\)", text)
    return int(found[1]) if found else None


def _free(path: Path) -> str:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return f"{shutil.disk_usage(there).free / 1e6:,.1f} MB are"
