"""Why an all-to-all takes as long as it does."""

from dataclasses import replace

import numpy as np

from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.all_to_all import AllToAll, Plan, plan, query
from sims.collective import CLASSES, collective_seconds, gpu_seconds, latency_seconds, notify_seconds, streams
from sims.constants import Constants, outside
from sims.explain.sensitivity import Explanation, best_fit, perturbed, sensitivities
from sims.quantiles import Quantiles
from sims.traffic import Traffic

LINK = {"nic": "InfiniBand", "nvlink": "NVLink", "sm": "SM work"}
NODES = (1, 2, 4, 8, 16)


def explain_all_to_all(spec: AllToAll, trace: RoutingTrace | None = None) -> Explanation:
    """Notify, dispatch and combine of the forward pass."""
    planned = plan(spec, trace)
    constants = planned.load_constants()
    sms = float(spec.sms if spec.sms is not None else planned.cluster.communication_sms.value)
    tilted = perturbed(constants)
    best = best_fit(constants)
    moves = {"dispatch": planned.dispatch, "combine": planned.combine}
    parts = {"notify": float(notify_seconds(planned.dispatch, planned.cluster, best)[0])}
    for name, traffic in moves.items():
        latency = float(latency_seconds(traffic, planned.cluster, best)[0])
        seconds = float(collective_seconds(traffic, planned.cluster, best, sms=sms, speed=planned.links)[0])
        parts |= {f"{name}, latency": latency, f"{name}, transmit": seconds - latency}
    busy = {name: class_seconds(planned, traffic, best, sms) for name, traffic in moves.items()}
    tilts = seconds_of(planned, tilted, sms)
    return Explanation(
        question="all-to-all",
        answer=Quantiles.of(seconds_of(planned, constants, sms)),
        unit="s",
        bottleneck=_bottleneck(planned, busy, parts),
        parts=parts,
        sensitivities=sensitivities(tilts, tilted),
        base=float(tilts[0]),
        switches=[*_factors(busy, sms), *_over_nodes(spec, trace)],
        warnings=[*planned.warnings, *outside(query(planned, sms))],
        seed=spec.seed,
    )


def seconds_of(planned: Plan, constants: Constants, sms: float) -> np.ndarray:
    """Notify, dispatch and combine, float64 (draws,)."""
    there = collective_seconds(planned.dispatch, planned.cluster, constants, sms=sms, notify=True, speed=planned.links)
    return there + collective_seconds(planned.combine, planned.cluster, constants, sms=sms, speed=planned.links)


def class_seconds(planned: Plan, traffic: Traffic, best: Constants, sms: float) -> dict[str, float]:
    """Busy seconds of the straggler's NICs, NVLink and SMs (`CLASSES`), the best fit."""
    found = streams(traffic, planned.cluster, best, sms=sms, speed=planned.links)
    straggler = int(gpu_seconds(found, best)[0].argmax())
    return {name: max(float(found[stream][0, straggler]) for stream in parts) for name, parts in CLASSES.items()}


def _ranked(busy: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(busy.items(), key=lambda item: -item[1])


def _bottleneck(planned: Plan, busy: dict[str, dict[str, float]], parts: dict[str, float]) -> str:
    if not planned.dispatch.moves:
        return "Nothing is sent: every token's experts are on its own GPU."
    sentences = []
    for name, classes in busy.items():
        (first, most), (second, next_) = _ranked(classes)[:2]
        share = (parts[f"{name}, transmit"] + parts[f"{name}, latency"]) or 1.0
        sentences.append(
            f"{name}: {LINK[first]} binds, busy {most * 1e6:,.0f} of {share * 1e6:,.0f} us at the slowest GPU; "
            f"{LINK[second]} is busy {100 * next_ / most:.0f} % of that"
        )
    return ". ".join(sentence[0].upper() + sentence[1:] for sentence in sentences) + "."


def _factors(busy: dict[str, dict[str, float]], sms: float) -> list[str]:
    """By how much the binding class must speed up before the next binds, and at how many SMs theirs would."""
    sentences = []
    for name, classes in busy.items():
        (first, most), (second, next_) = _ranked(classes)[:2]
        if most and next_:
            what = "SMs" if first == "sm" else f"{LINK[first]} bandwidth"
            sentences.append(f"{name}: with {most / next_:.2f} times the {what} or more, {LINK[second]} binds instead of {LINK[first]}.")
        if first != "sm" and classes["sm"]:
            sentences.append(f"{name}: with fewer than {sms * classes['sm'] / most:.1f} SMs (there are {sms:.0f}), SM work binds.")
    return sentences


def _over_nodes(spec: AllToAll, trace: RoutingTrace | None) -> list[str]:
    """What binds dispatch over other numbers of nodes, the rest of the question alike; numbers that it does not allow are left out."""
    if not isinstance(spec.placement, str) or spec.expert_placement is not None:
        return []
    found = {}
    for nodes in sorted({*NODES, spec.nodes}):
        try:
            planned = plan(replace(spec, nodes=nodes, expert_parallel=None if spec.nodes != nodes else spec.expert_parallel), trace)
        except (ConfigError, ValueError):
            continue
        if planned.placement.nodes != nodes or not planned.dispatch.moves:
            continue
        best = planned.load_constants(1)
        sms = float(spec.sms if spec.sms is not None else planned.cluster.communication_sms.value)
        found[nodes] = LINK[_ranked(class_seconds(planned, planned.dispatch, best, sms))[0][0]]
    groups: list[tuple[str, list[int]]] = []
    for nodes, link in found.items():
        if groups and groups[-1][0] == link:
            groups[-1][1].append(nodes)
        else:
            groups.append((link, [nodes]))
    said = "; ".join(f"{link} at {', '.join(map(str, nodes))}" for link, nodes in groups)
    return [f"Over nodes, dispatch is bound by {said}."] if len(found) > 1 else []
