"""The cluster model's speed: events per second beside a bare SimPy loop, one collective, a training step, a sweep, the curve over GPUs."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import simpy

from sims import AllToAll, TrainingStep, load_cluster, plan, simulate
from sims.all_to_all import answer
from sims.constants import load_constants
from sims.training.events import event_driven
from sims.training.step import closed_form

GRID = {"nodes": (1, 2, 4, 8, 16), "num_experts_per_tok": (2, 4, 6, 8, 10), "device_limit": (1, 2, 3, 4, 5, 6, 7, 8)}
"""200 points of M x K x nodes."""
CURVE = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def bare_events(processes: int, events: int) -> float:
    """Seconds that SimPy takes for `events` time-outs of `processes` processes that do nothing else: the most that it can do."""
    environment = simpy.Environment()

    def idle(number: int):
        for _ in range(number):
            yield environment.timeout(1.0)

    for _ in range(processes):
        environment.process(idle(events // processes))
    began = time.perf_counter()
    environment.run()
    return time.perf_counter() - began


def taken(form: Callable[[], object]) -> float:
    began = time.perf_counter()
    form()
    return time.perf_counter() - began


def median(form: Callable[[], object], rounds: int) -> float:
    """Of the wall seconds of several runs, after one that warms up."""
    form()
    return sorted(taken(form) for _ in range(rounds))[rounds // 2]


def measure_events(rounds: int, quick: bool) -> dict[str, float]:
    """Phase events per second of a training step in SimPy beside the bare loop with as many processes and events, interleaved."""
    spec = _step(batch_size=1152 if quick else 9216)
    cluster = load_cluster(spec.cluster)
    step = closed_form(spec, cluster, load_constants(cluster, 1))
    events = event_driven(spec, step)[1]
    ours, bare = [], []
    for _ in range(rounds):
        ours.append(taken(lambda: event_driven(spec, step)))
        bare.append(bare_events(spec.stages * len(step.units), events))
    seconds = sorted(ours)[len(ours) // 2], sorted(bare)[len(bare) // 2]
    return {
        "events": events,
        "events_per_second": events / seconds[0],
        "bare_events_per_second": events / seconds[1],
        "share": seconds[1] / seconds[0],
    }


def measure_collective(rounds: int) -> dict[str, float]:
    """T0 of 64 GPUs with 4,096 tokens each: bytes and time of all four moves, from routing that is given, and with its routing made up."""
    spec = AllToAll(nodes=8, n_routed_experts=256, num_experts_per_tok=8, hidden_size=7168, dispatch_bits=8, node_limit=4)
    trace = plan(spec).trace
    given = replace(spec, node_limit=None)
    constants = load_constants(spec.described_cluster(), spec.draws)
    repeats, began = 4 * rounds + 1, time.process_time()
    times = sorted(taken(lambda: answer(plan(given, trace), constants)) for _ in range(repeats))
    busy = (time.process_time() - began) / repeats
    return {
        "gpus": 64,
        "tokens_per_device": spec.tokens_per_device,
        "seconds": times[repeats // 2],
        "processor_seconds": busy,
        "seconds_with_routing": median(lambda: simulate(spec), rounds),
    }


def _step(**changes) -> TrainingStep:
    return replace(TrainingStep(nodes=16), **changes)


def measure_step(rounds: int, quick: bool) -> dict[str, float]:
    """DeepSeek-V2's step on 128 GPUs (one expert-parallel group of pipelines): the closed form with 64 draws, and with every event, too."""
    spec = _step(batch_size=1152 if quick else 9216)
    event = replace(spec, tier="event")
    found = {"gpus": spec.gpus, "seconds": median(lambda: simulate(spec), rounds), "seconds_events": median(lambda: simulate(event), rounds)}
    return found | {"events": simulate(event).events}


def measure_sweep(quick: bool) -> dict[str, float]:
    """Wall seconds of the points of GRID: routing, bytes, and P10 to P90 of each."""
    spec = AllToAll(n_routed_experts=256)
    points = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    points = points[::20] if quick else points
    return {"points": len(points), "seconds": taken(lambda: [simulate(replace(spec, **point)) for point in points])}


def measure_curve(quick: bool) -> list[dict[str, float]]:
    """Over GPUs, symmetry folded: expert-parallel groups of 64 that are alike, and pipelines that are alike, with a fixed batch per pipeline.

    Phases are those of all GPUs; the events are what is left of them to simulate.
    """
    rows = []
    for gpus in CURVE[:4] if quick else CURVE:
        nodes = gpus // 8
        collective = AllToAll(nodes=nodes, n_routed_experts=256, expert_parallel=min(gpus, 64), tokens_per_device=1024)
        row: dict[str, float] = {"gpus": gpus, "all_to_all_seconds": median(lambda q=collective: simulate(q), 2)}
        if gpus >= 128:
            spec = TrainingStep(nodes=nodes, batch_size=9 * gpus, tier="event")
            row |= {"step_seconds": taken(lambda s=spec: simulate(s))}
            result = simulate(spec)
            row |= {"step_events": result.events, "step_phases": sum(phase.copies for phase in result.timeline().phases)}
        rows.append(row)
    return rows


def measure_devices(quick: bool) -> list[dict[str, float]]:
    """One group over all GPUs, nothing folded: bytes between every pair, and T1 with a process for each GPU."""
    rows = []
    for gpus in (8, 16, 32) if quick else (8, 16, 32, 64, 128, 256):
        spec = AllToAll(nodes=gpus // 8, n_routed_experts=256, tokens_per_device=1024)
        events = taken(lambda r=simulate(spec): len(r.timeline().phases))
        rows.append({"gpus": gpus, "seconds": median(lambda s=spec: simulate(s), 2), "events_seconds": events})
    return rows


def measure_sims(rounds: int, quick: bool) -> dict[str, object]:
    """All of it."""
    return {
        "events": measure_events(rounds, quick),
        "collective": measure_collective(rounds),
        "step": measure_step(1 if quick else 3, quick),
        "sweep": measure_sweep(quick),
        "curve": measure_curve(quick),
        "devices": measure_devices(quick),
    }
