"""The Python door: `simulate(TrainingStep(...), trace)`."""

from dataclasses import replace
from typing import Any

import numpy as np

from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.cluster import load_cluster
from sims.constants import load_constants, outside
from sims.simulation import simulate
from sims.training.events import event_driven
from sims.training.memory import Memory, memory
from sims.training.result import StepResult, waits
from sims.training.spec import TrainingStep
from sims.training.step import closed_form


@simulate.register
def training_step(spec: TrainingStep, trace: RoutingTrace | None = None) -> StepResult:
    """Seconds, breakdown and memory of a step.  ConfigError for GPUs that a node has not, or a trace of another shape than the model's."""
    if spec.placement == "either":
        return _either(spec, trace)
    cluster = load_cluster(spec.cluster)
    if spec.gpus_per_node > cluster.gpus_per_node.value:
        raise ConfigError(f"gpus_per_node = {spec.gpus_per_node}: a node of {cluster.name} has {cluster.gpus_per_node.value:.0f}")
    if spec.communication_sms is not None and spec.communication_sms >= cluster.sms.value:
        raise ConfigError(f"communication_sms = {spec.communication_sms}: a GPU of {cluster.name} has {cluster.sms.value:.0f} SMs")
    constants = load_constants(cluster, spec.draws, spec.constants)
    step = closed_form(spec, cluster, constants, trace)
    seconds, breakdown = step.seconds, dict(step.breakdown)
    events, played = 0, None
    if spec.tier == "event":
        played, events = event_driven(spec, step, jitter=spec.jitter)
        stretched = seconds * (played / float(seconds[0])) if spec.jitter else seconds
        breakdown["jitter"], seconds = stretched - seconds, stretched
    held = memory(spec, cluster.hbm_bytes.value)
    return StepResult(
        spec=spec,
        cluster=cluster,
        constants=constants,
        step=step,
        memory=held,
        warnings=_warnings(spec, cluster.key, held),
        seconds=seconds,
        breakdown=breakdown,
        waits=waits(spec, step),
        events=events,
        event_seconds=played,
    )


def _either(spec: TrainingStep, trace: RoutingTrace | None) -> StepResult:
    """Packed, and spread where that is another placement and possible: the draws of both, so that each has half the weight.

    Phases, waits and memory are those of the packed one.
    """
    packed = training_step(replace(spec, placement="packed"), trace)
    if spec.experts_over == 1 or not spec.can_spread:
        return packed
    spread = training_step(replace(spec, placement="spread"), trace)
    both = (packed, spread)
    step = replace(
        packed.step,
        communication=np.concatenate([one.step.communication for one in both]),
        recomputation=np.concatenate([one.step.recomputation for one in both]),
    )
    return replace(
        packed,
        step=step,
        point_step=packed.step,
        seconds=np.concatenate([one.seconds for one in both]),
        breakdown={name: np.concatenate([one.breakdown[name] for one in both]) for name in packed.breakdown},
        by_placement={one.spec.placement: one.tokens_per_second_per_gpu for one in both},
        warnings=[*dict.fromkeys([*packed.warnings, *spread.warnings, EITHER])],
    )


EITHER = "placement = either: whether an expert-parallel group shares a node is not said, so both are run and pooled; packed or spread says it"


def _warnings(spec: TrainingStep, cluster: str, held: Memory) -> list[str]:
    found = []
    if not held.fits:
        found.append(
            f"memory: stage {held.stage} needs {held.total / 1e9:.1f} GB per GPU, there are {held.available / 1e9:.0f}: "
            "more nodes, recompute=full or fewer layers per stage"
        )
    query: dict[str, Any] = {"cluster": cluster}
    if spec.experts_over > 1:
        on = spec.experts_over if spec.placement == "spread" else -(-spec.experts_over // spec.gpus_per_node)
        query |= {"nodes": on, "tokens_per_device": spec.tokens, "hidden_size": spec.model.hidden_size}
        query |= {"sms": spec.communication_sms} if spec.communication_sms is not None else {}
    if spec.model.moe is not None and spec.experts_over > 1:
        query["num_experts_per_tok"] = spec.model.moe.num_experts_per_tok
    return found + outside(query)
