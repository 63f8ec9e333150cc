"""Slow GPUs and degraded links in a training step: the step beside a healthy one, and who waits for whom."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from research.routing_trace import RoutingTrace
from sims.faults.attribution import Wait, waits
from sims.faults.devices import Speeds
from sims.quantiles import Quantiles
from sims.training import StepResult, TrainingStep, training_step


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWait:
    """In one phase of a pipeline stage, the GPUs of an expert-parallel group wait for its slowest: seconds of the average one in a step."""

    stage: int
    phase: str
    culprit: int
    link: str
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowStepResult:
    """A training step with slow GPUs and links beside the same step without."""

    gpus: int
    seconds: Quantiles
    healthy_seconds: Quantiles
    slowdown: Quantiles
    """Ratio of the two, draw by draw."""
    speed: dict[int, float]
    """GPUs that are not healthy, and the time of their computing over that of the others."""
    groups: list[GroupWait]
    """Longest first."""
    pipeline: list[Wait]
    """Of stages for each other, at the best estimate, ranks that are alike once; longest first."""
    warnings: list[str]
    constants: dict[str, Any]
    seed: int
    step: StepResult

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        quantiles = {name: asdict(getattr(self, name)) for name in ("seconds", "healthy_seconds", "slowdown")}
        rows = {name: [asdict(each) for each in getattr(self, name)] for name in ("groups", "pipeline")}
        plain = {name: getattr(self, name) for name in ("gpus", "speed", "warnings", "constants", "seed")}
        return {**quantiles, **plain, **rows}


def slow_step(spec: TrainingStep, speeds: Speeds | None = None, trace: RoutingTrace | None = None) -> SlowStepResult:
    """`spec.speed` says which GPUs are slow, over a distribution of all others; `spec.nic` and `spec.nvlink` which links are degraded."""
    drawn = (speeds or Speeds()).factors(spec.gpus, spec.seed)
    speed = {gpu: float(factor) for gpu, factor in enumerate(drawn) if factor != 1} | dict(spec.speed)
    slow, healthy = training_step(replace(spec, speed=speed), trace), training_step(replace(spec, speed={}, nic={}, nvlink={}), trace)
    groups = [GroupWait(stage=w.stage, phase=w.phase, culprit=w.culprit, link=w.link, seconds=w.seconds) for w in slow.waits]
    return SlowStepResult(
        gpus=spec.gpus,
        seconds=Quantiles.of(slow.seconds),
        healthy_seconds=Quantiles.of(healthy.seconds),
        slowdown=Quantiles.of(np.asarray(slow.seconds) / healthy.seconds),
        speed=speed,
        groups=sorted(groups, key=lambda wait: (-wait.seconds, wait.stage, wait.phase)),
        pipeline=waits(slow.timeline()),
        warnings=slow.warnings,
        constants=slow.constants.to_dict(),
        seed=spec.seed,
        step=slow,
    )
