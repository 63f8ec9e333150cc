"""T1: the collective in events (SimPy): a process per GPU, one event per stream and phase, a barrier for the exchange of counts.

With one collective it equals the closed form to rounding; what it adds is who waited for whom, and the phases as rows.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from sims.cluster import Cluster
from sims.collective import STREAMS, Speed, gpu_seconds, latency_seconds, notify_seconds, streams
from sims.constants import Constants
from sims.placement import Placement
from sims.timeline import Phase, Timeline
from sims.traffic import Traffic

Events = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One collective as T1 plays it (best fit): seconds of notify and latency, busy seconds (G,) by stream, and transmit seconds (G,)
    of each GPU, which its streams together need."""

    name: str
    notify: float
    latency: float
    busy: Mapping[str, np.ndarray]
    transmit: np.ndarray
    traffic: Traffic


def step(name: str, traffic: Traffic, cluster: Cluster, constants: Constants, *, sms: float, notify: bool, speed: Speed | None = None) -> Step:
    """A collective at the point estimate of the constants."""
    found = streams(traffic, cluster, constants, sms=sms, speed=speed)
    return Step(
        name=name,
        notify=float(notify_seconds(traffic, cluster, constants)[0]) if notify else 0.0,
        latency=float(latency_seconds(traffic, cluster, constants)[0]),
        busy={key: value[0] for key, value in found.items()},
        transmit=gpu_seconds(found, constants)[0],
        traffic=traffic,
    )


@dataclass(frozen=True, slots=True)
class Played:
    """When the last GPU was done, when each was with each collective (steps, G), and the phases."""

    seconds: float
    finished: np.ndarray
    timeline: Timeline


def play(steps: Sequence[Step], placement: Placement, *, gpus_per_node: int, ready: np.ndarray | None = None, copies: int = 1) -> Played:
    """Collectives one after the other; a GPU takes part in the first from `ready` (G,) on, and each waits for all of the group.

    A collective is over when its last GPU is: whoever is done earlier waits for that one, on that one's slowest stream.
    """
    environment = simpy.Environment()
    gpus = placement.devices
    finished = np.zeros((len(steps), gpus))
    began = np.zeros(gpus) if ready is None else np.asarray(ready, float)
    rows = Timeline()
    gates = [_Gate(environment, gpus) for _ in range(len(steps) + 1)]

    def gpu(index: int) -> Events:
        where: dict[str, Any] = {"node": int(placement.node[index]), "gpu": int(placement.node[index] * gpus_per_node + placement.rail[index])}
        yield environment.timeout(float(began[index]))
        for number, at in enumerate(steps):
            arrived = environment.now
            yield gates[number].arrive(index)
            waited, culprit = environment.now - arrived, gates[number].last
            held_up = _slowest(steps[number - 1], culprit) if number else "compute"
            start = environment.now
            if at.notify:
                yield environment.timeout(at.notify)
            rows.phases.append(Phase(
                name="notify" if at.notify else "start", stream="all-to-all", start_seconds=start, end_seconds=environment.now,
                waits_for=_global(placement, culprit, gpus_per_node) if waited > 0 else -1, wait_seconds=waited,
                wait_link=held_up if waited > 0 else "", direction="forward", copies=copies, **where,
            ))  # fmt: skip
            begin = environment.now + at.latency
            yield environment.timeout(at.latency)
            yield environment.all_of([environment.process(stream(at, name, index, begin, where)) for name in STREAMS])
            # Streams that are nearly as busy as the busiest hold each other up for the rest.
            yield environment.timeout(max(0.0, float(begin + at.transmit[index] - environment.now)))
            finished[number, index] = environment.now
        yield gates[-1].arrive(index)

    def stream(at: Step, name: str, index: int, begin: float, where: Mapping[str, Any]) -> Events:
        seconds = float(at.busy[name][index])
        if seconds > 0:
            yield environment.timeout(seconds)
            rows.phases.append(Phase(
                name=at.name, stream=name, start_seconds=begin, end_seconds=environment.now, direction="forward", copies=copies,
                nvlink_bytes=int(at.traffic.nvlink[index].sum()) if name == "nvlink out" else 0,
                infiniband_bytes=int(at.traffic.infiniband[index].sum()) if name == "nic out" else 0, **where,
            ))  # fmt: skip

    environment.run(environment.all_of([environment.process(gpu(i)) for i in range(gpus)]))
    return Played(float(environment.now), finished, rows)


class _Gate:
    """A barrier of all GPUs: opens when the last has arrived, and remembers which that was."""

    def __init__(self, environment: simpy.Environment, expected: int) -> None:
        self._open, self._missing, self.last = environment.event(), expected, -1

    def arrive(self, index: int) -> simpy.Event:
        self._missing -= 1
        if not self._missing:
            self.last = index
            self._open.succeed()
        return self._open


def _slowest(at: Step, index: int) -> str:
    return max(STREAMS, key=lambda name: at.busy[name][index])


def _global(placement: Placement, index: int, gpus_per_node: int) -> int:
    return int(placement.node[index] * gpus_per_node + placement.rail[index])
