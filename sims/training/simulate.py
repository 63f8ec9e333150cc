"""The Python door: `simulate(TrainingStep(...), trace)`."""

from typing import Any

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
    cluster = load_cluster(spec.cluster)
    if spec.gpus_per_node > cluster.gpus_per_node.value:
        raise ConfigError(f"gpus_per_node = {spec.gpus_per_node}: a node of {cluster.name} has {cluster.gpus_per_node.value:.0f}")
    if spec.communication_sms is not None and spec.communication_sms >= cluster.sms.value:
        raise ConfigError(f"communication_sms = {spec.communication_sms}: a GPU of {cluster.name} has {cluster.sms.value:.0f} SMs")
    constants = load_constants(cluster, spec.draws)
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
