"""What a run's process and machine were busy with, sampled beside the training into system.jsonl; the driver sends it to MLflow."""

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sweeps import schema

INTERVAL_SECONDS = 10.0
FIRST_SECONDS = 1.0
MEGABYTE = 1e6


@contextmanager
def sampled(directory: Path) -> Iterator[None]:
    """Append a sample to system.jsonl soon after the start, then every few seconds, until the block ends.

    What cannot be sampled is left out; sampling never fails a run.
    """
    path, over = directory / schema.SYSTEM_FILE, threading.Event()
    thread = threading.Thread(target=_sample, args=(path, over), daemon=True, name="system metrics")
    thread.start()
    try:
        yield
    finally:
        over.set()


def _sample(path: Path, over: threading.Event) -> None:
    number = sum(1 for _ in path.open("rb")) if path.exists() else 0
    pause = FIRST_SECONDS
    try:
        meter = Meter()  # shares of a CPU are those since it was made
        while not over.wait(pause):
            line = json.dumps({"time": round(time.time(), 3), "sample": number, **meter.read()})
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            number, pause = number + 1, INTERVAL_SECONDS
    except (OSError, ImportError):
        return


class Meter:
    """psutil's figures of this process and machine, and the GPU's where torch uses one."""

    def __init__(self) -> None:
        psutil = load_psutil()
        self._machine, self._process = psutil, psutil.Process()
        self._process.cpu_percent()
        self._machine.cpu_percent()

    def read(self) -> dict[str, float]:
        """Metrics by their MLflow names.  CPU shares are those since the last reading; 100 of a process is one core."""
        memory = self._machine.virtual_memory()
        return {
            "system/cpu_utilization_percentage": self._machine.cpu_percent(),
            "system/process_cpu_percentage": self._process.cpu_percent(),
            "system/process_memory_megabytes": self._process.memory_info().rss / MEGABYTE,
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/load_average": os.getloadavg()[0],
            **_gpu(),
        }


def _gpu() -> dict[str, float]:
    """Of the card that this process trains on; nothing where torch is not in use or has none."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    free, total = torch.cuda.mem_get_info()
    found = {
        "system/gpu_0_memory_usage_megabytes": (total - free) / MEGABYTE,
        "system/gpu_0_memory_usage_percentage": 100.0 * (total - free) / total,
        "system/gpu_0_process_peak_memory_megabytes": torch.cuda.max_memory_allocated() / MEGABYTE,
    }
    # Without nvidia-ml-py, or from a driver that does not tell, there is no such figure.
    with suppress(ImportError, RuntimeError, AttributeError):
        found["system/gpu_0_utilization_percentage"] = float(torch.cuda.utilization())
    return found


def load_psutil() -> Any:
    """Ray brings psutil along, and has it found once it is imported itself."""
    try:
        return importlib.import_module("psutil")
    except ModuleNotFoundError:
        importlib.import_module("ray")
        return importlib.import_module("psutil")
