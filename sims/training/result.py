"""What a simulated training step answers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from research import accounting
from research.config import to_dict as plain
from sims.cluster import Cluster
from sims.constants import Constants
from sims.quantiles import Quantiles
from sims.roofline import KINDS
from sims.timeline import Timeline
from sims.training.events import event_driven
from sims.training.layout import gpu_index, stage_layers
from sims.training.memory import Memory
from sims.training.spec import TrainingStep
from sims.training.step import Step, Unit

TRILLION = 1e12


@dataclass(frozen=True, slots=True)
class Wait:
    """GPUs that wait, in a phase, for the slowest of their expert-parallel group: seconds of the average one in a step."""

    stage: int
    phase: str
    culprit: int
    seconds: float
    link: str = "compute"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Draws of everything that is uncertain, float64 (draws,); `to_dict` gives P10, P50 and P90."""

    spec: TrainingStep
    cluster: Cluster
    constants: Constants
    step: Step
    memory: Memory
    warnings: list[str]
    seconds: np.ndarray
    breakdown: dict[str, np.ndarray]
    waits: list[Wait]
    events: int = 0
    """That SimPy handled, in the event tier."""
    event_seconds: float | None = None
    """Of the event tier, at the point estimate of the constants."""
    notes: dict[str, str] = field(default_factory=dict)
    by_placement: dict[str, np.ndarray] = field(default_factory=dict)
    """With `placement: either`: tokens/s per GPU of each; `spec` is then the packed one's, and the draws are of both."""
    point_step: Step | None = None
    """Of one placement, where `step` pools two: what the timeline is played from."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.spec.batch_size * self.spec.sequence_length

    @property
    def tokens_per_second_per_gpu(self) -> np.ndarray:
        return self.tokens / self.spec.gpus / self.seconds

    @property
    def mfu(self) -> np.ndarray:
        """FLOPs of the model (forward and backward, nothing recomputed) over what the data sheet's BF16 peak allows."""
        flops = accounting.train_flops_per_token(self.spec.model, self.spec.sequence_length)
        return flops * self.tokens_per_second_per_gpu / self.cluster.bf16_flops_per_second.value

    @property
    def gpu_hours_per_trillion_tokens(self) -> np.ndarray:
        return TRILLION / self.tokens_per_second_per_gpu / 3600

    @property
    def bubble_share(self) -> np.ndarray:
        return self.breakdown["bubble"] / self.seconds

    def typical(self) -> dict[str, float]:
        """Seconds by category that sum to the step's P50: those of the draws between which the median lies."""
        order = np.argsort(self.seconds, kind="stable")
        low, high = order[(len(order) - 1) // 2], order[len(order) // 2]
        return {name: float((value[low] + value[high]) / 2) for name, value in self.breakdown.items()}

    def timeline(self) -> Timeline:
        """Every phase at the point estimate of the constants, ranks that are alike once (`copies`)."""
        timeline = Timeline()
        event_driven(self.spec, self.point_step or self.step, jitter=self.spec.jitter, timeline=timeline)
        return timeline

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON.  `breakdown` sums to the P50 of `step_seconds`; `breakdown_quantiles` has each category's own."""
        spec = self.spec
        uncertain = {
            "step_seconds": self.seconds,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "tokens_per_second": self.tokens_per_second_per_gpu * spec.gpus,
            "mfu": self.mfu,
            "gpu_hours_per_trillion_tokens": self.gpu_hours_per_trillion_tokens,
            "exposed_communication_seconds": self.breakdown["exposed_communication"],
            "exposed_communication_share": self.breakdown["exposed_communication"] / self.seconds,
            "communication_seconds": self.step.communication,
            "bubble_seconds": self.breakdown["bubble"],
            "bubble_share": self.bubble_share,
            "recomputation_seconds": self.step.recomputation,
        }
        exchange = self.step.exchange
        return {
            **{name: quantiles(value) for name, value in uncertain.items()},
            "breakdown": self.typical(),
            "breakdown_quantiles": {name: quantiles(value) for name, value in self.breakdown.items()},
            "compute_kinds": list(KINDS),
            "memory_per_gpu_bytes": self.memory.to_dict(),
            "distinct_devices_per_token": float(np.mean([s.distinct_devices for s in exchange.samples])) if exchange else 0.0,
            "waits": [{"stage": w.stage, "phase": w.phase, "culprit": w.culprit, "link": w.link, "seconds": w.seconds} for w in self.waits],
            "cluster": self.cluster.name,
            "gpus": spec.gpus,
            "parallelism": {
                "pipeline": spec.stages,
                "data": spec.data_parallel,
                "expert": spec.experts_over,
                "tensor": spec.tensor_parallel,
                "microbatches": spec.microbatches,
                "layers_per_stage": [len(layers) for layers in stage_layers(spec)],
            },
            "by_placement": {name: quantiles(draws) for name, draws in self.by_placement.items()},
            "tokens": self.tokens,
            "events": self.events,
            "event_seconds": self.event_seconds,
            "spec": plain(spec),
            "seed": spec.seed,
            "constants": self.constants.to_dict(),
            "warnings": self.warnings,
        }


def quantiles(draws: np.ndarray) -> dict[str, float]:
    found = Quantiles.of(draws)
    return {"p10": found.p10, "p50": found.p50, "p90": found.p90}


def waits(spec: TrainingStep, step: Step, most: int = 20) -> list[Wait]:
    """The longest, at the point estimate: who waited for whom inside the expert-parallel groups."""
    found: dict[tuple[int, str, int, str], float] = {}

    def add(unit: Unit, stage: int, phase: str, culprit: tuple[int, str], seconds: np.ndarray | float) -> None:
        key = (stage, phase, gpu_index(spec, stage, unit.index, culprit[0]), culprit[1])
        found[key] = found.get(key, 0.0) + float(np.broadcast_to(seconds, step.seconds.shape)[0])

    for unit in step.units:
        for kind in ("F", "BW"):
            for stage in range(spec.stages):
                for sample in range(unit.work.samples):
                    number = len(range(sample, spec.microbatches, unit.work.samples))
                    for segment in unit.work.segments(kind, stage, sample):
                        if segment.slowest >= 0:
                            add(unit, stage, segment.name, (segment.slowest, "compute"), number * segment.waiting)
                        if segment.slow_link[0] >= 0:
                            add(unit, stage, segment.name, segment.slow_link, number * segment.held_up)
    ranked = sorted(((seconds, *key) for key, seconds in found.items() if seconds > 0), key=lambda row: (-row[0], row[1:]))
    return [Wait(stage, phase, culprit, seconds, link) for seconds, stage, phase, culprit, link in ranked[:most]]
