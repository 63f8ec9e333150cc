"""Asks every node of a Ray cluster what it sees; `doctor` runs it as a process: `python -m sweeps.doctor_nodes FILE`.

Prints one JSON list: per node its host, what it reads in FILE (null if it cannot), how far its clock is off, and whether it has
this package.
"""

import importlib.util
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SECONDS = 60.0


def look(probe: str) -> dict[str, Any]:
    """What this node says of itself."""
    try:
        word = Path(probe).read_text(encoding="utf-8")
    except OSError:
        word = None
    return {"host": platform.node(), "word": word, "time": time.time(), "package": importlib.util.find_spec("sweeps") is not None}


def ask(probe: str) -> list[dict[str, Any]]:
    """Every living node's answer, through $RAY_ADDRESS."""
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
    alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    task = ray.remote(look)
    answers = []
    for node in alive:
        asked = time.time()
        answer = ray.get(
            task.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(probe), timeout=SECONDS
        )
        answered = time.time()
        said = answer.pop("time")
        # It was asked before and answered after: only what lies outside of that is its clock's.
        answers.append({**answer, "skew": max(said - answered, 0.0) - max(asked - said, 0.0)})
    return answers


if __name__ == "__main__":
    # As __main__ its functions travel to the nodes by value, so that a node without this package can say so.
    print(json.dumps(ask(sys.argv[1])))
