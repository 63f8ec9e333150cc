"""What a serving simulation answers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sims.quantiles import Quantiles
from sims.serving.capacity import Capacity
from sims.serving.cost import PARTS, Cost
from sims.serving.engine import Log
from sims.timeline import Phase, Timeline

LIMITS = ("memory capacity", "HBM bandwidth", "compute", "communication", "host", "batch limit", "token budget", "arrivals")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """Saturated throughput with so many sequences over all GPUs, prompts' chunks included, and without prompts."""

    batch: float
    fits: bool
    step_seconds: Quantiles
    generated_tokens_per_second: Quantiles
    decode_only_tokens_per_second: Quantiles
    bound_by: str
    """The resource that bounds most of a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What the engine saw, over all GPUs.  Latencies by share of the requests: `p50`, `p90`, `p99`, each with its uncertainty."""

    requests: int
    seconds: Quantiles
    """From the first arrival to the last token."""
    window: str
    """The part of the run that rates are taken from."""
    generated_tokens_per_second: Quantiles
    prompt_tokens_per_second: Quantiles
    requests_per_second: Quantiles
    residents: float
    """Sequences at a time, mean over time."""
    waiting: float
    """Requests in the queue, mean over time."""
    rank_waiting_share: float
    """Share of a step's own work that the average rank waits for the slowest one."""
    cache_used: float
    """Share of the fullest rank's blocks, mean over time."""
    steps: int
    preemptions: int
    recomputed_tokens: int
    ttft_seconds: dict[str, Quantiles]
    """To the first token: from the arrival, or from the admission where there is always one waiting."""
    time_per_output_token_seconds: dict[str, Quantiles]
    latency_seconds: dict[str, Quantiles]
    """To the last token, from where `ttft_seconds` counts."""
    step_shares: dict[str, float]
    """Of the time, by kind of work (PARTS), at the best estimate."""
    resource_shares: dict[str, float]
    """Of the time, by what bounds it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingResult:
    """Continuous batching on a described cluster."""

    cluster: str
    model: str
    nodes: int
    gpus_per_node: int
    tensor_parallel: int
    replicas: int
    binds: str
    """One of LIMITS: more of it would help most."""
    residents_limited_by: str
    elasticities: dict[str, float]
    """Per cent of saturated throughput for one per cent more of each resource, at the best estimate."""
    capacity: Capacity
    saturated_residents: float
    saturated_tokens_per_second: Quantiles
    """Closed form, prompts included."""
    decode_only_tokens_per_second: Quantiles
    """Closed form, with the memory full of sequences whose prompts were computed elsewhere or before."""
    prompt_only_tokens_per_second: Quantiles
    served: Served
    curve: list[CurvePoint]
    mean_prompt_tokens: float
    mean_output_tokens: float
    warnings: list[str]
    constants: Mapping[str, Any]
    seed: int
    log: Log
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        skipped = ("log", "cost", "constants", "served", "curve", "capacity")
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in skipped}
        served = {name: _plain(getattr(self.served, name)) for name in self.served.__dataclass_fields__}
        return {
            **{name: _plain(value) for name, value in plain.items()},
            **{name: served[name] for name in ("generated_tokens_per_second", "prompt_tokens_per_second", "residents")},
            "kv_bytes_per_token": self.capacity.kv_bytes_per_token,
            "weights_bytes_per_gpu": self.capacity.weights_bytes,
            "capacity": asdict(self.capacity),
            "served": served,
            "curve": [asdict(point) for point in self.curve],
            "constants": dict(self.constants),
        }

    def timeline(self) -> Timeline:
        """Every event of the engine at the best estimate, its kinds of work one behind the other; all GPUs do alike, `copies` of them."""
        timeline, shares = Timeline(), self.cost.part_seconds(self.log.rows)
        for i, start in enumerate(self.log.start):
            at = float(start)
            for part in PARTS:
                until = at + float(shares[part][i])
                if until > at:
                    stream = "all-to-all" if part == "communication" else "host" if part == "host" else "compute"
                    timeline.phases.append(
                        Phase(
                            name=part,
                            node=0,
                            gpu=0,
                            stream=stream,
                            start_seconds=at,
                            end_seconds=until,
                            microbatch=i,
                            direction="forward",
                            copies=self.nodes * self.gpus_per_node,
                        )
                    )
                at = until
        return timeline


def _plain(value: Any) -> Any:
    if isinstance(value, Quantiles):
        return asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return float(value) if isinstance(value, np.floating) else value
