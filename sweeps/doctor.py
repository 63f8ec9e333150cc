"""What on a machine or cluster would spoil a study: each finding a sentence with its remedy.

Looks, and changes nothing: what it writes to test a directory is removed again.  Nothing blocks for longer than its time limit.
"""

import logging
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from rich.table import Table

from research.errors import UserError
from research.folders import cache_directory
from sweeps import doctor_services as services
from sweeps.findings import OK, PROBLEM, WARNING, Finding
from sweeps.lease import holder_of, is_driven
from sweeps.places import home, study_root
from sweeps.study import load_study

__all__ = ["OK", "PROBLEM", "WARNING", "Finding", "examine", "report"]

GIGABYTE = 1e9
LITTLE_ROOM, SOME_ROOM = 1.0, 10.0
"""Gigabytes free: under the first a study fails soon, under the second a large one may."""
SHARED_MEMORY = 0.5
OPEN_FILES, FEW_FILES = 4096, 1024
SKEW_SECONDS = 2.0
SMI_SECONDS = 15
COLOURS = {OK: "green", WARNING: "yellow", PROBLEM: "red"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is looked at: a study's file or none, and the address of Ray's dashboard."""

    study: Path | None
    address: str


def examine(study: Path | None = None, address: str | None = None) -> list[Finding]:
    """Every finding, in the order in which a person would mend them."""
    subject = Subject(study=study, address=address or os.environ.get("RAY_API_SERVER_ADDRESS") or services.DASHBOARD)
    return [finding for look in CHECKS for finding in look(subject)]


def report(findings: Sequence[Finding]) -> Table:
    table = Table("", "what", "found", "remedy", show_lines=False, box=None, pad_edge=False, header_style="bold")
    for f in findings:
        table.add_row(f"[{COLOURS[f.level]}]{f.level}[/]", f.subject, f.sentence, f.remedy)
    counts = {level: sum(f.level == level for f in findings) for level in (PROBLEM, WARNING, OK)}
    table.caption = f"{counts[PROBLEM]} problems, {counts[WARNING]} warnings, {counts[OK]} in order"
    table.caption_justify = "left"
    return table


def _versions(_: Subject) -> Iterator[Finding]:
    requirements, python = _requirements()
    if python and platform.python_version() not in SpecifierSet(python):
        yield Finding(
            PROBLEM, "versions", f"this is Python {platform.python_version()}, supported is {python}", "make the environment anew with such"
        )
    yield from versions(requirements)


def versions(requirements: Sequence[str]) -> Iterator[Finding]:
    """The installed packages against the ranges of pyproject.toml."""
    found, wrong = {}, 0
    for text in requirements:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            there = None
        if there is None or not wanted.specifier.contains(there, prereleases=True):
            wrong += 1
            state = "is not installed" if there is None else f"{there} is installed"
            yield Finding(PROBLEM, "versions", f"{wanted.name}: {state}, supported is {wanted.specifier or 'any'}", f"pip install '{text}'")
        else:
            found[wanted.name] = there
    if not wrong:
        shown = ", ".join(f"{name} {found[name]}" for name in ("torch", "ray", "optuna", "mlflow") if name in found)
        yield Finding(OK, "versions", f"Python {platform.python_version()}, {shown}; all {len(found)} requirements are met")


def _requirements() -> tuple[list[str], str]:
    """Of the project beside these sources, else of the installed distribution."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    if file.exists():
        project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "moelab":
            return project["dependencies"], project.get("requires-python", "")
    try:
        return list(metadata.requires("moelab") or []), str(metadata.metadata("moelab")["Requires-Python"] or "")
    except metadata.PackageNotFoundError:
        return [], ""


def _gpu(_: Subject) -> Iterator[Finding]:
    import torch  # noqa: PLC0415  (seconds)

    cards, trouble = _cards()
    build = f"torch {torch.__version__}"
    if trouble:
        yield Finding(PROBLEM, "GPU", f"nvidia-smi fails: {trouble}", "mend the driver (often: reboot after an update of it, or load its module)")
    elif not cards:
        yield Finding(OK, "GPU", f"no NVIDIA card here; {build} runs on the CPU")
    elif torch.version.cuda is None:
        remedy = "install the CUDA build of torch, see https://pytorch.org/get-started/locally"
        yield Finding(PROBLEM, "GPU", f"{len(cards)} x {cards[0]} here, but {build} was built for the CPU alone", remedy)
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding(WARNING, "GPU", f"CUDA_VISIBLE_DEVICES hides {len(cards)} x {cards[0]}", "unset CUDA_VISIBLE_DEVICES")
    elif not torch.cuda.is_available():
        remedy = f"update the driver to one that runs CUDA {torch.version.cuda}, or install a torch built for the driver's CUDA (nvidia-smi shows it)"
        yield Finding(PROBLEM, "GPU", f"{cards[0]} is here, but {build} for CUDA {torch.version.cuda} cannot use it", remedy)
    elif torch.cuda.device_count() != len(cards) and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        yield Finding(
            WARNING, "GPU", f"nvidia-smi lists {len(cards)} cards, torch {torch.cuda.device_count()}", "see `nvidia-smi` for the one that fell off"
        )
    else:
        yield Finding(OK, "GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {build}, CUDA {torch.version.cuda}")


def _cards() -> tuple[list[str], str]:
    """The cards that nvidia-smi lists, and what is wrong with it; nothing where there is no such command."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], ""
    try:
        done = subprocess.run(
            [command, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"{type(error).__name__} after at most {SMI_SECONDS} s"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        return [], said[0][:200]
    return lines, ""


def _disk(_: Subject) -> Iterator[Finding]:
    yield from directory("studies", home(), "MOELAB_HOME")
    yield from directory("cache", cache_directory(), "MOELAB_CACHE")


def directory(subject: str, path: Path, variable: str) -> Iterator[Finding]:
    """Whether files can be written there, how much room there is, and whether the storage's clock is this machine's."""
    there = next(p for p in (path, *path.parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".moelab-doctor-") as file:
            file.write(b"moelab")
            file.flush()
            skew = abs(os.stat(file.name).st_mtime - time.time())
    except OSError as error:
        yield Finding(PROBLEM, subject, f"{path}: cannot be written ({error.strerror})", f"export {variable}=/a/directory/of/yours")
        return
    free = shutil.disk_usage(there).free / GIGABYTE
    level = PROBLEM if free < LITTLE_ROOM else WARNING if free < SOME_ROOM else OK
    remedy = "" if level == OK else f"make room, or export {variable}=/a/larger/disk"
    yield Finding(level, subject, f"{path}: can be written, {free:,.1f} GB are free", remedy)
    if skew > SKEW_SECONDS:
        yield Finding(
            WARNING, "clock", f"{path}: its storage's clock differs from this machine's by {skew:.0f} s", "set both by NTP (chrony, timesyncd)"
        )


def _memory(_: Subject) -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.exists():
        size = shutil.disk_usage(shared).total / GIGABYTE
        remedy = "" if size >= SHARED_MEMORY else "in a container: docker run --shm-size=2g"
        yield Finding(OK if size >= SHARED_MEMORY else WARNING, "/dev/shm", f"{size:.2f} GB for Ray's object store", remedy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    level = PROBLEM if soft < FEW_FILES else WARNING if soft < OPEN_FILES else OK
    allowed = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    remedy = (
        "" if level == OK else f"ulimit -n {OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, 65536)} before `ray start` and `sweeps run`"
    )
    yield Finding(level, "open files", f"{soft:,} at once per process (at most {allowed})", remedy)


def _compiler(_: Subject) -> Iterator[Finding]:
    if os.environ.get("MOELAB_KERNELS", "on") == "off":
        yield Finding(OK, "kernels", "MOELAB_KERNELS=off: the model runs in plain PyTorch, by choice")
        return
    from research.model.kernels import native  # noqa: PLC0415  (torch)

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(native.__name__)
    logger.addHandler(handler)
    try:
        native.library.cache_clear()
        usable = native.library() is not None
    finally:
        logger.removeHandler(handler)
    if usable:
        yield Finding(OK, "kernels", "the C compiler makes the CPU kernels, and they load")
    else:
        yield Finding(
            WARNING, "kernels", said[0] if said else "the CPU kernels cannot be used", "install a C compiler (apt install gcc), or set CC to yours"
        )


def _study(subject: Subject) -> Iterator[Finding]:
    if subject.study is None:
        return
    try:
        load_study(subject.study)
    except UserError as error:
        yield from (Finding(PROBLEM, "study", problem, f"mend it; python -m sweeps check {subject.study}") for problem in error.problems)
        return
    root = study_root(str(subject.study))
    yield Finding(OK, "study", f"{subject.study}: all right; its root is {root}")
    if root.exists() and is_driven(root):
        holder = holder_of(root)
        yield Finding(OK, "study", f"it is being run by process {holder.get('pid')} on {holder.get('host')}")


CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    _versions,
    _gpu,
    _compiler,
    _disk,
    _memory,
    lambda subject: services.tracker(),
    lambda subject: services.ports(),
    lambda subject: services.ray_authentication(subject.address),
    lambda subject: services.nodes(home(), subject.address),
    _study,
)
