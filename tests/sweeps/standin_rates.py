"""A stand-in whose result depends on the learning rate: best at BEST, and the run diverges above TOO_HIGH."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import standin

from research.training.records import BITS_PER_BYTE

BEST, TOO_HIGH = 0.002, 0.02


def count(
    config: Mapping[str, Any], directory: Path, report: Callable[[Mapping[str, float]], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    found = standin.count(config, directory, report, should_stop)
    rate = config["training"]["optimizer"]["learning_rate"]
    if rate > TOO_HIGH:
        return {**found, "state": "diverged", "reason": "diverged at step 20"}
    return {**found, "metrics": {**found["metrics"], BITS_PER_BYTE: found["metrics"][BITS_PER_BYTE] + math.log(rate / BEST) ** 2}}
