"""The trial function: one run, trained.  The only place where a sweep meets torch.

Any function of this shape can take its place (`--trial package.module:function`): it gets the run
configuration as a plain dict, a directory to keep its files in, a callback for each record, and a
question to ask after it; it returns how it ended.  Called again on the same directory it goes on.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from research.configfile import load_run_config
from research.training.loop import train
from research.training.records import JsonlRecorder, Record
from sweeps import schema


class _Reporter:
    """Keeps each record in metrics.jsonl and tells the worker of it."""

    def __init__(self, directory: Path, report: Callable[[Mapping[str, float]], None]) -> None:
        self.file = JsonlRecorder(directory / schema.METRICS_FILE)
        self.report = report

    def record(self, record: Record) -> None:
        self.file.record(record)
        self.report({"step": record.step, "tokens": record.tokens, **record.metrics})


def run_trial(
    config: Mapping[str, Any], directory: Path, report: Callable[[Mapping[str, float]], None], should_stop: Callable[[], bool]
) -> dict[str, Any]:
    """Train, or go on training, in `directory`; writes metrics.jsonl, checkpoint/ and routing.npz there."""
    run = load_run_config(config)
    result = train(run, directory, _Reporter(directory, report), lambda record: should_stop())
    if result.trace is not None:
        result.trace.save(directory / schema.ROUTING_FILE)
    return {
        "state": result.state,
        "reason": result.reason,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "metrics": dict(result.metrics),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
