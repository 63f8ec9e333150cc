"""The cluster model's speed: events per second beside a bare SimPy loop, one collective, a training step, a sweep, the curve over GPUs."""

import time
from collections.abc import Callable

import simpy


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


def best(form: Callable[[], object], rounds: int) -> float:
    """Shortest wall seconds of several runs, after one that warms up."""
    form()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        form()
        taken.append(time.perf_counter() - began)
    return min(taken)
