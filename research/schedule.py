"""Batch sizes over a run: constant, or the ramp of V2 section 3.1.2, with steps and tokens counted exactly.

The size of a step is a function of the tokens seen before it, and they are the sum of the sizes before:
so steps are kept as stages of equal size, which also makes a run of millions of steps cheap to look up.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Stage(NamedTuple):
    """Steps of one batch size: from `first_step` (counted from 1) on, when `tokens` had been seen."""

    first_step: int
    tokens: int
    batch_size: int


def batch_size_at(tokens: int, *, first: int, last: int, ramp_tokens: int, multiple: int = 1) -> int:
    """Sequences of the step that begins when `tokens` have been seen: linear from `first` to `last` over
    `ramp_tokens` tokens, rounded down to a multiple of `multiple` (which divides both)."""
    if tokens >= ramp_tokens:
        return last
    return (first + (last - first) * tokens // ramp_tokens) // multiple * multiple


@dataclass(frozen=True)
class BatchSchedule:
    """All the steps of a run; steps count from 1."""

    stages: tuple[Stage, ...]
    steps: int
    """As many whole batches as it takes to see the tokens asked for."""
    sequence_length: int

    def batch_size(self, step: int) -> int:
        return self._stage(step).batch_size

    def tokens(self, step: int) -> int:
        """Seen after `step` steps; 0 after none."""
        stage = self._stage(step)
        return stage.tokens + (step - stage.first_step + 1) * stage.batch_size * self.sequence_length

    def sequences(self, step: int) -> int:
        """Drawn in the first `step` steps: the position in the data."""
        return self.tokens(step) // self.sequence_length

    def _stage(self, step: int) -> Stage:
        return self.stages[max(bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1, 0)]


@lru_cache(maxsize=64)
def batch_schedule(*, train_tokens: int, sequence_length: int, batch_size: int, first: int | None, ramp_tokens: int, multiple: int) -> BatchSchedule:
    """The schedule that grows from `first` sequences (None: no ramp) to `batch_size` by `batch_size_at`."""
    stages, step, seen = list[Stage](), 1, 0
    sizes = range(first, batch_size, multiple) if first is not None else ()
    for size in sizes:
        assert first is not None
        # The least number of tokens at which the rule gives the next size.
        until = min(-(-(size + multiple - first) * ramp_tokens // (batch_size - first)), ramp_tokens, train_tokens)
        if until > seen:
            stages.append(Stage(step, seen, size))
            count = _steps(until - seen, size * sequence_length)
            step, seen = step + count, seen + count * size * sequence_length
    if seen < train_tokens:
        stages.append(Stage(step, seen, batch_size))
        step += _steps(train_tokens - seen, batch_size * sequence_length)
    return BatchSchedule(tuple(stages), step - 1, sequence_length)


def _steps(tokens: int, per_step: int) -> int:
    return -(-tokens // per_step)
