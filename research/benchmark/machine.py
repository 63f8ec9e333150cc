"""What a benchmark ran on, and what it was run with."""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """None: not known, or not there."""

    device: str
    card: str
    memory_bytes: int | None
    compute_capability: str | None
    driver: str | None
    cuda: str | None
    torch: str
    numpy: str
    python: str
    system: str
    threads: int
    commit: str | None

    @property
    def slug(self) -> str:
        """The card's name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.card.lower()).strip("-") or "unknown"


def describe_machine(device: torch.device) -> Machine:
    """Of `device` and this interpreter."""
    cuda = device.type == "cuda"
    about = torch.cuda.get_device_properties(device) if cuda else None
    return Machine(
        device=str(device),
        card=about.name if about is not None else _processor(),
        memory_bytes=about.total_memory if about is not None else None,
        compute_capability=f"{about.major}.{about.minor}" if about is not None else None,
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        cuda=torch.version.cuda,
        torch=torch.__version__,
        numpy=numpy.__version__,
        python=platform.python_version(),
        system=platform.platform(),
        threads=torch.get_num_threads(),
        commit=_commit(),
    )


def _processor() -> str:
    """The name that Linux gives the processor, else the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return f"cpu {named.group(1).strip() if named else platform.machine()} {os.cpu_count()} cores"


def _commit() -> str | None:
    """The commit of the code that ran, with `+` where tracked files differ from it."""
    found = _output("git", "-C", str(REPOSITORY), "rev-parse", "--short=12", "HEAD")
    if found is None:
        return None
    return found + ("+" if _output("git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str | None:
    """First line of what a program prints; None where it is not installed, fails or says nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
