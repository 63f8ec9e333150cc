"""A trial function that trains nothing: it counts, keeps its place, and writes down every step that it computes.

`computed.log` in a run's directory holds a line "pid step" per computed step, so that a test can see
what was repeated and where.  Files in the study's root steer it: `slow` (seconds per step), `bug`
(raise), `diverge` (end as diverged); a file's text, if any, limits it to the runs named there.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from research.atomic import write_text
from research.training.records import BITS_PER_BYTE, LOSS, JsonlRecorder, Record
from sims import synthetic_trace

STEPS = 20
TOKENS_PER_STEP = 100
CHECKPOINT_EVERY = 4


def bits_per_byte(config: Mapping[str, Any], step: int = STEPS) -> float:
    """What the stand-in says it reached: a function of the configuration, lower for more experts and devices."""
    moe = config["model"]["moe"]
    return 2.0 + 1.0 / step + 0.1 / moe["num_experts_per_tok"] + 0.01 / moe["device_limit"] + 0.001 * config["seed"]


def count(
    config: Mapping[str, Any], directory: Path, report: Callable[[Mapping[str, float]], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    root = directory.parent.parent
    kept = directory / "checkpoint" / "step"
    start = int(kept.read_text()) if kept.exists() else 0
    recorder = JsonlRecorder(directory / "metrics.jsonl")
    state, step = "finished", start
    for step in range(start + 1, STEPS + 1):
        if _steered(root / "bug", directory.name) and step == 3:
            raise ValueError(f"a bug in step {step}")
        time.sleep(float((root / "slow").read_text() or 0.0) if (root / "slow").exists() else 0.0)
        with (directory / "computed.log").open("a") as log:
            log.write(f"{os.getpid()} {step}\n")
        record = Record(step=step, tokens=step * TOKENS_PER_STEP, metrics={LOSS: 3.0 / step, BITS_PER_BYTE: bits_per_byte(config, step)})
        recorder.record(record)
        report({"step": step, "tokens": record.tokens, **record.metrics})
        stop = step < STEPS and should_stop()
        if stop or step % CHECKPOINT_EVERY == 0:
            write_text(kept, str(step))
        if stop or _steered(root / "diverge", directory.name):
            state = "stopped" if stop else "diverged"
            break
    else:
        moe = config["model"]["moe"]
        shape = {k: moe[k] for k in ("n_routed_experts", "num_experts_per_tok", "expert_devices", "device_limit")}
        synthetic_trace("random", tokens=256, seed=config["seed"], **shape).save(directory / "routing.npz")
    metrics = {LOSS: 3.0 / step, BITS_PER_BYTE: bits_per_byte(config, step)}
    reason = None if state == "finished" else f"{state} at step {step}"
    return {"state": state, "reason": reason, "steps": step, "tokens": step * TOKENS_PER_STEP, "seconds": 0.1, "metrics": metrics, "device": "cpu"}


def _steered(file: Path, run: str) -> bool:
    return file.exists() and (not file.read_text().strip() or run in file.read_text().split())
