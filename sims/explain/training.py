"""Why a training step takes as long as it does."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.explain.sensitivity import Explanation, best_fit, perturbed, sensitivities
from sims.quantiles import Quantiles
from sims.simulation import simulate
from sims.training.memory import memory
from sims.training.result import StepResult
from sims.training.spec import TrainingStep
from sims.training.step import closed_form

SAID = {
    "attention": "attention (compute)",
    "dense_gemm": "dense products (compute)",
    "grouped_gemm": "the experts' grouped products (compute)",
    "memory": "memory-bound work (HBM bandwidth)",
    "exposed_communication": "communication that nothing hides",
    "waiting": "waiting for the busiest expert device",
    "uneven_stages": "stages that have less to do than the busiest",
    "bubble": "the pipeline's bubble",
    "pipeline_sends": "sends between stages",
    "gradients": "reduction of gradients",
    "optimizer": "the optimizer",
}


def explain_training_step(spec: TrainingStep, trace: RoutingTrace | None = None) -> Explanation:
    """The step in closed form, and what other choices would make of it.

    The answer is the one that `training-step` gives; where it pools two placements, what follows it explains the packed one.
    """
    result: StepResult = simulate(spec, trace)
    cluster, constants, step = result.cluster, result.constants, result.point_step or result.step
    tilted, best, whole = perturbed(constants), best_fit(constants), float(step.seconds[0])
    parts = {name: float(seconds[0]) for name, seconds in step.breakdown.items() if seconds[0] > 1e-9 * whole}
    first, second = sorted(parts, key=lambda name: -parts[name])[:2]
    exposed = parts.get("exposed_communication", 0.0)
    hidden = max(float(step.communication[0]) - exposed, 0.0)
    bottleneck = (
        f"The step of {whole:,.2f} s goes first into {SAID.get(first, first)}, {100 * parts[first] / whole:.0f} %, then into "
        f"{SAID.get(second, second)}, {100 * parts[second] / whole:.0f} %."
    )
    if step.communication[0] > 0:
        bottleneck += f" Of {float(step.communication[0]):,.2f} s of communication {hidden:,.2f} s are hidden behind computing."
    if len(result.by_placement) > 1:
        bottleneck = f"Of the two placements in this answer the packed one is explained. {bottleneck}"
        spec = result.spec
    changed = []
    for said, other in alternatives(spec):
        try:
            seconds = float(closed_form(other, cluster, best, trace if other.model == spec.model else None).seconds[0])
        except (ConfigError, ValueError):
            continue
        held = memory(other, cluster.hbm_bytes.value)
        room = "" if held.fits else f", but needs {held.total / 1e9:.0f} GB of the {held.available / 1e9:.0f} GB that a GPU has"
        changed.append((seconds / whole - 1, f"{said}: {100 * (seconds / whole - 1):+.1f} % ({seconds:,.2f} s){room}."))
    return Explanation(
        question="training-step",
        answer=Quantiles.of(result.seconds),
        unit="s",
        bottleneck=bottleneck,
        parts=parts,
        sensitivities=sensitivities(closed_form(spec, cluster, tilted, trace).seconds, tilted),
        base=whole,
        switches=[sentence for _, sentence in sorted(changed)],
        warnings=result.warnings,
        seed=spec.seed,
    )


def alternatives(spec: TrainingStep) -> Iterator[tuple[str, TrainingStep]]:
    """Other choices of the same work, each one field away."""
    options: dict[str, tuple[Any, ...]] = {
        "schedule": ("1f1b", "zero-bubble", "dualpipe"),
        "recompute": ("none", "partial", "full"),
        "shared_expert_overlap": (True, False),
        "gradient_overlap": (True, False),
        "placement": ("packed", "spread"),
        "dispatch_bits": (8, 16),
        "micro_batch_size": (2 * spec.micro_batch_size,),
    }
    for name, values in options.items():
        for value in values:
            if value != getattr(spec, name):
                try:
                    yield f"{name} = {value}", replace(spec, **{name: value})
                except ValueError:
                    continue
    moe = spec.model.moe
    if moe is not None:
        for limit in (*range(1, moe.expert_devices), None):
            if limit != moe.device_limit:
                try:
                    yield f"model.moe.device_limit = {limit}", replace(spec, model=replace(spec.model, moe=replace(moe, device_limit=limit)))
                except ValueError:
                    continue
