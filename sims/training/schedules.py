"""Pipeline schedules as dependency graphs, and the time of the longest path through them.

A schedule is an order of work for each position of the pipeline; a position does one thing at a time, and a forward pass
needs the activations of the stage before, a backward pass the gradients of the stage behind.  With equal times the longest
path is the published closed form (F forward, B backward for inputs, W for weights, P positions):

* `1f1b`: (P - 1) (F + B + W) of idle time (Narayanan et al. 2021).
* `zero-bubble`, ZB-H1 of Qi et al. 2024: (P - 1) (F + B - W) where W <= F, else (P - 1) B; DeepSeek's "ZB1P".
* `dualpipe` (DeepSeek-V3, table 2; the order is that of the released schedule): (P / 2 - 1) (F&B + B - 2W), F&B being a
  forward and a whole backward pass that run into each other.

DeepSeek's own table writes B for B + W: (P - 1) (F + B), (P - 1) (F + B - 2W), (P / 2 - 1) (F&B + B - 3W).
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

Schedule = Literal["1f1b", "zero-bubble", "dualpipe"]
SCHEDULES: tuple[Schedule, ...] = ("1f1b", "zero-bubble", "dualpipe")


class Job(NamedTuple):
    """Work of one position: `F`, `B` (inputs alone), `W` (weights alone), `BW` (both), or `FB`: a forward pass and a whole
    backward pass that overlap.

    stage and microbatch: of the forward pass of `FB`, and of whatever else; `back_stage`, `back_microbatch`: of the backward pass of `FB`.
    direction: microbatches of DualPipe enter at both ends; those of direction 1 at the last position.
    """

    kind: str
    stage: int
    microbatch: int
    direction: int = 0
    back_stage: int = -1
    back_microbatch: int = -1


def orders(schedule: Schedule, positions: int, microbatches: int) -> list[list[Job]]:
    """What each position does, in order.  ValueError where the schedule cannot have so many positions or microbatches."""
    if schedule == "dualpipe":
        return [_dualpipe(positions, microbatches, position) for position in range(positions)]
    return [_one_direction(positions, microbatches, stage, split=schedule == "zero-bubble") for stage in range(positions)]


def stages_of(schedule: Schedule, positions: int, position: int) -> tuple[int, ...]:
    """Stages whose weights a position holds: DualPipe keeps two."""
    return (position, positions - 1 - position) if schedule == "dualpipe" else (position,)


def _one_direction(positions: int, microbatches: int, stage: int, *, split: bool) -> list[Job]:
    """One forward, one backward.  ZB-H1 keeps the last `stage` weight gradients back, to fill the end with them."""
    jobs = [Job("F", stage, i) for i in range(min(positions - stage - 1, microbatches))]
    started = len(jobs)
    for done in range(microbatches):
        if started < microbatches:
            jobs.append(Job("F", stage, started))
            started += 1
        jobs.append(Job("B" if split else "BW", stage, done))
        if split and done >= stage:
            jobs.append(Job("W", stage, done - stage))
    return jobs + [Job("W", stage, i) for i in range(max(microbatches - stage, 0), microbatches) if split]


def _dualpipe(positions: int, microbatches: int, position: int) -> list[Job]:
    """The eight steps of DualPipe's released schedule for one position."""
    if positions % 2 or microbatches % 2 or microbatches < 2 * positions:
        raise ValueError(f"dualpipe needs an even number of stages and an even number of microbatches >= 2 x stages, not {positions}, {microbatches}")
    half, near = positions // 2, min(position, positions - 1 - position)
    each = microbatches // 2
    writer = _Dual(position, positions)
    for _ in range((half - near - 1) * 2):
        writer.forward(0)
    for _ in range(near + 1):
        writer.forward(0)
        writer.forward(1)
    for _ in range(half - near - 1):
        writer.backward(1, split=True)
        writer.weights()
        writer.forward(1)
    for i in range(each - positions + near + 1):
        if i == 0 and near == half - 1:
            writer.forward(0)
            writer.backward(1)
        else:
            writer.both(0, 1)
        writer.both(1, 0)
    for _ in range(half - near - 1):
        writer.backward(1)
        writer.both(1, 0)
    split = False
    for i in range(near + 1):
        split = split or (i == (near + 1) // 2 and near % 2 == 1)
        writer.backward(1, split=split)
        split = split or (i == (near + 1) // 2 and near % 2 == 0)
        writer.backward(0, split=split)
    for _ in range(half - near - 1):
        writer.weights()
        writer.backward(0, split=True)
    for _ in range(near + 1):
        writer.weights()
    return writer.jobs


class _Dual:
    """Counts the microbatches of the two directions, as seen from one position; weight gradients wait in a queue."""

    def __init__(self, position: int, positions: int) -> None:
        self.jobs: list[Job] = []
        self.position, self.positions = position, positions
        self.started, self.returned = [0, 0], [0, 0]
        self.waiting: list[tuple[int, int, int]] = []

    def _direction(self, phase: int) -> int:
        """Phase 0 is the direction whose first stages are near."""
        return phase ^ int(self.position >= self.positions // 2)

    def _stage(self, direction: int) -> int:
        return self.positions - 1 - self.position if direction else self.position

    def _next(self, counts: list[int], phase: int) -> tuple[int, int, int]:
        direction = self._direction(phase)
        counts[direction] += 1
        return self._stage(direction), counts[direction] - 1, direction

    def forward(self, phase: int) -> None:
        self.jobs.append(Job("F", *self._next(self.started, phase)))

    def backward(self, phase: int, *, split: bool = False) -> None:
        place = self._next(self.returned, phase)
        self.jobs.append(Job("B" if split else "BW", *place))
        if split:
            self.waiting.append(place)

    def both(self, forward: int, backward: int) -> None:
        stage, microbatch, direction = self._next(self.started, forward)
        back_stage, back_microbatch, _ = self._next(self.returned, backward)
        self.jobs.append(Job("FB", stage, microbatch, direction, back_stage, back_microbatch))

    def weights(self) -> None:
        self.jobs.append(Job("W", *self.waiting.pop(0)))


class Step(NamedTuple):
    """A job in an order in which all that it needs comes before it, and the indices of what it needs from other positions.

    forward_from: the job that sends the activations; backward_from: that sends the gradients; -1: none.
    """

    position: int
    job: Job
    forward_from: int
    backward_from: int


@lru_cache(maxsize=32)
def graph(schedule: Schedule, positions: int, microbatches: int) -> tuple[Step, ...]:
    """All jobs of all positions in topological order.  ValueError if the schedule can never finish."""
    queues, at = orders(schedule, positions, microbatches), [0] * positions
    steps: list[Step] = []
    forward: dict[tuple[int, int, int], int] = {}
    backward: dict[tuple[int, int, int], int] = {}
    left = sum(map(len, queues))
    while left:
        before = left
        for position, queue in enumerate(queues):
            while at[position] < len(queue):
                step = _ready(position, queue[at[position]], positions, forward, backward)
                if step is None:
                    break
                _record(step.job, len(steps), forward, backward)
                steps.append(step)
                at[position] += 1
                left -= 1
        if left == before:
            raise ValueError(f"{schedule} with {positions} stages and {microbatches} microbatches waits for itself")
    return tuple(steps)


def _ready(
    position: int, job: Job, positions: int, forward: dict[tuple[int, int, int], int], backward: dict[tuple[int, int, int], int]
) -> Step | None:
    """The step, once all that it needs was recorded."""
    sent = returned = -1
    if "F" in job.kind and job.stage > 0:
        sent = forward.get((job.direction, job.microbatch, job.stage - 1), -2)
    if "B" in job.kind:
        direction, microbatch, stage = _back(job)
        needs = backward if stage < positions - 1 else forward
        returned = needs.get((direction, microbatch, stage + (stage < positions - 1)), -2)
        if stage == positions - 1 and returned >= 0:
            returned = -1  # its own forward pass, earlier in the same order
    return None if -2 in (sent, returned) else Step(position, job, sent, returned)


def _back(job: Job) -> tuple[int, int, int]:
    if job.kind == "FB":
        return 1 - job.direction, job.back_microbatch, job.back_stage
    return job.direction, job.microbatch, job.stage


def _record(job: Job, index: int, forward: dict[tuple[int, int, int], int], backward: dict[tuple[int, int, int], int]) -> None:
    if "F" in job.kind:
        forward[job.direction, job.microbatch, job.stage] = index
    if "B" in job.kind:
        backward[_back(job)] = index


def longest_path(
    steps: tuple[Step, ...],
    positions: int,
    seconds: Callable[[Job], np.ndarray | float],
    send: np.ndarray | float = 0.0,
    sends: Mapping[tuple[int, int], np.ndarray] | None = None,
) -> list[np.ndarray | float]:
    """When each position is done with its last job; `seconds` of a job, and `send` from one position to the next, may hold draws.

    `sends` are those from position to position that take another time.
    """
    other = sends or {}
    free: list[np.ndarray | float] = [0.0] * positions
    done: list[np.ndarray | float] = []
    for position, job, sent, returned in steps:
        start = free[position]
        if sent >= 0:
            start = np.maximum(start, done[sent] + other.get((steps[sent].position, position), send))
        if returned >= 0:
            start = np.maximum(start, done[returned] + other.get((steps[returned].position, position), send))
        free[position] = start + seconds(job)
        done.append(free[position])
    return free


def bubble(schedule: Schedule, positions: int, *, F: float, B: float, W: float, FB: float | None = None) -> float:
    """Idle seconds of a position in closed form, for equal stages and no time to send (see the head of this module)."""
    if schedule == "1f1b":
        return (positions - 1) * (F + B + W)
    if schedule == "zero-bubble":
        return (positions - 1) * (B + max(F - W, 0.0))
    return (positions // 2 - 1) * ((F + B + W if FB is None else FB) + B - 2 * W)
