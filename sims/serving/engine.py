"""Continuous batching, event by event: who is admitted, what each step computes, who is done.

Every step generates a token for each resident sequence and computes a chunk of the prompts that are not cached yet, within a
budget of tokens per rank (chunked prefill).  A rank is one attention group: a GPU with data-parallel attention, `tensor_parallel`
of them otherwise; all ranks step together, since the experts of each layer wait for all.  Steps that differ in nothing but the
length of the cache are one event.  What the steps take is the business of `StepCost`; the engine keeps a log of their
composition, so that they can be priced again with other constants.
"""

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import simpy

from sims.serving.requests import Requests

COLUMNS = ("decode", "context", "prompt", "pairs", "cached", "tokens", "heads", "steps")
"""A logged step: of its slowest rank the sequences that generate, the positions that they attend to, prompt tokens, (query, key) pairs
of those and cached positions before them; then tokens of all ranks, tokens of that rank with logits, and how many such steps in a row
(with the mean of the contexts)."""


Events = Generator[simpy.Event, Any, None]


class StepCost(Protocol):
    """What a step takes at the best estimate of the constants."""

    def rank_seconds(self, rows: np.ndarray) -> np.ndarray:
        """float64 (R,) of what the ranks do apart from each other: rows float64 (R, COLUMNS), `steps` left out."""

    def step_seconds(self, row: np.ndarray) -> float:
        """One step, of the slowest rank's row (COLUMNS)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduler:
    """How sequences are let in.

    `paged`: a sequence takes blocks as it grows; the youngest of a rank gives its blocks back and is computed again when there
    are none left.  `reserve`: it takes the blocks of its whole length at once and is never interrupted.
    """

    ranks: int
    blocks: int
    """Of cache, per rank."""
    block_tokens: int
    max_batched_tokens: int
    """Of one step, per rank: generated and prompt tokens together."""
    max_batch: int | None = None
    """Sequences over all ranks; None: as many as the cache holds."""
    reserve: bool = False
    watermark: float = 0.01
    """Share of the blocks that is left free at an admission, so that the residents can grow."""


@dataclass(kw_only=True, slots=True)
class Log:
    """What happened, event by event, and which events were which to each request."""

    rows: np.ndarray
    seconds: np.ndarray
    """float64 (events,), each with all its steps, at the best estimate."""
    start: np.ndarray
    """float64 (events,): a gap before it is a time without work."""
    rank_waiting: np.ndarray
    """float64 (events,): share of the slowest rank's own work that the average rank waits for it."""
    residents: np.ndarray
    waiting: np.ndarray
    """int64 (events,), sequences while the event lasts."""
    free_blocks: np.ndarray
    """int64 (events,), of the fullest rank."""
    prompt_tokens: np.ndarray
    generated: np.ndarray
    """int64 (events,), of all ranks: prompt tokens computed, and tokens that were new to a request."""
    issued_event: np.ndarray
    admitted_event: np.ndarray
    """int64 (N,), events at whose start a request came (in a closed loop) and was first admitted."""
    first_event: np.ndarray
    last_event: np.ndarray
    """int64 (N,), events at whose end it had its first and its last token."""
    tokens: np.ndarray
    """int64 (N,), tokens that each request was given."""
    preemptions: int
    recomputed_tokens: int
    sequence_seconds: float
    """Integral of the requests in the system over time, counted as they come and go."""


@dataclass(slots=True)
class _State:
    """Requests as arrays; lists of ids say where each of them is."""

    context: np.ndarray
    """Positions in the cache."""
    goal: np.ndarray
    """Positions that must be in the cache before the next token can be generated: prompt, and what was generated before a preemption."""
    done: np.ndarray
    """Tokens generated."""
    rank: np.ndarray
    blocks: np.ndarray
    order: np.ndarray
    """Count of admissions at its own: the youngest of a rank has the largest."""
    waiting: deque[int] = field(default_factory=deque)
    filling: list[deque[int]] = field(default_factory=list)
    running: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


class Engine:
    """One run over `requests`; `run` answers with its log.

    clients: with all arrivals at once, so many requests are in the system at a time and a finished one is followed by the next
    (a closed loop); None: the arrival times hold.
    """

    def __init__(self, requests: Requests, scheduler: Scheduler, cost: StepCost, *, clients: int | None = None) -> None:
        count = len(requests)
        self.requests, self.scheduler, self.cost, self.clients = requests, scheduler, cost, clients
        context, done, rank, blocks, order = (np.zeros(count, np.int64) for _ in range(5))
        filling = [deque[int]() for _ in range(scheduler.ranks)]
        self.state = _State(context, requests.prompt.copy(), done, rank, blocks, order, filling=filling)
        self.free = np.full(scheduler.ranks, scheduler.blocks, np.int64)
        self.residents = np.zeros(scheduler.ranks, np.int64)
        self.arrived, self.admissions, self.finished = 0, 0, 0
        self.preemptions, self.recomputed = 0, 0
        self.in_system, self.changed, self.sequence_seconds = 0, 0.0, 0.0
        self.events: list[tuple[Any, ...]] = []
        self.issued_event, self.admitted_event, self.first_event, self.last_event = (np.full(count, -1) for _ in range(4))
        self.environment = simpy.Environment()
        self.arrival = self.environment.event()

    def run(self) -> Log:
        self.environment.process(self._arrivals())
        self.environment.run(self.environment.process(self._steps()))
        columns = list(zip(*self.events, strict=True))
        rows, seconds, start, rank_waiting, residents, waiting, free, prompts, generated = (np.array(column) for column in columns)
        return Log(
            rows=rows,
            seconds=seconds,
            start=start,
            rank_waiting=rank_waiting,
            residents=residents,
            waiting=waiting,
            free_blocks=free,
            prompt_tokens=prompts,
            generated=generated,
            issued_event=self.issued_event,
            admitted_event=self.admitted_event,
            first_event=self.first_event,
            last_event=self.last_event,
            tokens=self.state.done,
            preemptions=self.preemptions,
            recomputed_tokens=self.recomputed,
            sequence_seconds=self.sequence_seconds,
        )

    def _arrivals(self) -> Events:
        if self.clients is not None:
            self._arrive(min(self.clients, len(self.requests)))
            return
        times, at = self.requests.arrival, 0
        while at < len(times):
            if times[at] > self.environment.now:
                yield self.environment.timeout(times[at] - self.environment.now)
            # All that have come by now, as one event.
            until = max(int(np.searchsorted(times, self.environment.now, side="right")), at + 1)
            self._arrive(until - at)
            at = until

    def _arrive(self, count: int, event: int = 0) -> None:
        self._count(count)
        self.issued_event[self.arrived : self.arrived + count] = event
        self.state.waiting.extend(range(self.arrived, self.arrived + count))
        self.arrived += count
        self.arrival.succeed()
        self.arrival = self.environment.event()

    def _count(self, change: int) -> None:
        """Requests in the system, integrated over time."""
        self.sequence_seconds += self.in_system * (self.environment.now - self.changed)
        self.in_system, self.changed = self.in_system + change, self.environment.now

    def _steps(self) -> Events:
        while self.finished < len(self.requests):
            self._admit()
            if not self.residents.any():
                yield self.arrival
                continue
            self._make_room()
            rows, chunks = self._compose()
            each = self.cost.rank_seconds(rows)
            slowest = rows[int(np.argmax(each))]
            slowest[5] = rows[:, 0].sum() + rows[:, 2].sum()
            steps = 1 if chunks else self._alike(slowest)
            # The cost is linear in the context as long as one rank stays the slowest: n steps cost n times their mean.
            slowest[1] += slowest[0] * (steps - 1) / 2
            slowest[7] = steps
            seconds = steps * self.cost.step_seconds(slowest)
            at = (slowest, seconds, self.environment.now, 1 - each.mean() / each.max(), int(self.residents.sum()), len(self.state.waiting))
            counts = (int(self.free.min()), sum(size for _, size in chunks))
            yield self.environment.timeout(seconds)
            self.events.append((*at, *counts, self._finish(chunks, steps)))

    def _admit(self) -> None:
        """First come, first served: the first that does not fit keeps those behind it waiting."""
        state, scheduler = self.state, self.scheduler
        kept = int(scheduler.watermark * scheduler.blocks)
        while state.waiting:
            request = state.waiting[0]
            length = state.goal[request] + 1
            if scheduler.reserve:
                length = self.requests.prompt[request] + self.requests.output[request]
            need = -(-int(length) // scheduler.block_tokens)
            rank = int(np.argmax(self.free))
            full = scheduler.max_batch is not None and self.residents.sum() >= scheduler.max_batch
            # An empty rank takes whatever fits at all.
            if full or self.free[rank] < need + (kept if self.residents[rank] and not scheduler.reserve else 0):
                return
            state.waiting.popleft()
            state.rank[request], state.blocks[request] = rank, need
            state.order[request] = self.admissions
            self.admissions += 1
            self.free[rank] -= need
            self.residents[rank] += 1
            state.filling[rank].append(request)
            if self.admitted_event[request] < 0:
                self.admitted_event[request] = len(self.events)

    def _make_room(self) -> None:
        """Blocks for one more token of each running sequence; where there are none, the youngest of the rank goes back to the queue."""
        state = self.state
        while True:
            need = self._growth(1)
            wanted = np.bincount(state.rank[state.running], weights=need, minlength=self.scheduler.ranks).astype(np.int64)
            short = np.flatnonzero(wanted > self.free)
            if not len(short):
                self.free -= wanted
                state.blocks[state.running] += need
                return
            for rank in short:
                self._preempt(int(rank))

    def _growth(self, steps: int) -> np.ndarray:
        """int64: blocks that each running sequence needs beyond its own for so many tokens more."""
        state = self.state
        return np.maximum(-(-(state.context[state.running] + steps) // self.scheduler.block_tokens) - state.blocks[state.running], 0)

    def _preempt(self, rank: int) -> None:
        state = self.state
        there = np.concatenate([state.running[state.rank[state.running] == rank], np.array(state.filling[rank], np.int64)])
        youngest = int(there[np.argmax(state.order[there])])
        if youngest in state.filling[rank]:
            state.filling[rank].remove(youngest)
        else:
            state.running = state.running[state.running != youngest]
        self.free[rank] += state.blocks[youngest]
        self.residents[rank] -= 1
        self.preemptions += 1
        self.recomputed += int(state.context[youngest])
        state.goal[youngest] = self.requests.prompt[youngest] + state.done[youngest]
        state.context[youngest], state.blocks[youngest] = 0, 0
        state.waiting.appendleft(youngest)

    def _compose(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Rows of the ranks, and the (request, tokens) of the prompts' chunks."""
        state, ranks = self.state, self.scheduler.ranks
        rows, chunks = np.zeros((ranks, len(COLUMNS))), list[tuple[int, int]]()
        of = state.rank[state.running]
        rows[:, 0] = np.bincount(of, minlength=ranks)
        rows[:, 1] = np.bincount(of, weights=state.context[state.running] + 1, minlength=ranks)
        rows[:, 6] = rows[:, 0]
        for rank in range(ranks):
            budget = self.scheduler.max_batched_tokens - int(rows[rank, 0])
            for request in state.filling[rank]:
                if budget <= 0:
                    break
                before = int(state.context[request])
                size = min(budget, int(state.goal[request]) - before)
                budget -= size
                rows[rank, 2:5] += (size, size * before + size * (size + 1) / 2, before)
                rows[rank, 6] += before + size == state.goal[request]
                chunks.append((request, size))
        return rows, chunks

    def _alike(self, row: np.ndarray) -> int:
        """How many steps in a row are like the next one: until a sequence ends, blocks run out, or someone who fits arrives."""
        state = self.state
        most = int((self.requests.output - state.done)[state.running].min())
        if self.clients is None and not state.waiting and self.arrived < len(self.requests):
            # The step in which the next one arrives is the last; the first step's cost is the least.
            gap = self.requests.arrival[self.arrived] - self.environment.now
            most = min(most, max(1, int(np.ceil(gap / self.cost.step_seconds(row))))) if gap < np.inf else most
            most = self._until(row, most, gap)
        while most > 1 and (np.bincount(state.rank[state.running], self._growth(most), self.scheduler.ranks) > self.free).any():
            most = max(1, most // 2)
        need = self._growth(most)
        self.free -= np.bincount(state.rank[state.running], weights=need, minlength=self.scheduler.ranks).astype(np.int64)
        state.blocks[state.running] += need
        return most

    def _until(self, row: np.ndarray, most: int, gap: float) -> int:
        """The fewest of at most `most` steps that last `gap` seconds."""
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            mean = row.copy()
            mean[1] += row[0] * (middle - 1) / 2
            if middle * self.cost.step_seconds(mean) >= gap:
                high = middle
            else:
                low = middle + 1
        return low

    def _finish(self, chunks: list[tuple[int, int]], steps: int) -> int:
        """Book what the steps have computed; the new tokens."""
        state, event = self.state, len(self.events)
        ready = list[int]()
        for request, size in chunks:
            state.context[request] += size
            if state.context[request] == state.goal[request]:
                state.filling[state.rank[request]].remove(request)
                ready.append(request)
        state.context[state.running] += steps
        state.done[state.running] += steps
        generated = steps * len(state.running) + len(ready)
        started = np.array(ready, np.int64)
        state.done[started] += 1
        self.first_event[started] = np.where(self.first_event[started] < 0, event, self.first_event[started])
        state.running = np.concatenate([state.running, started])
        over = state.done[state.running] >= self.requests.output[state.running]
        if over.any():
            self._leave(state.running[over], event)
            state.running = state.running[~over]
        return generated

    def _leave(self, gone: np.ndarray, event: int) -> None:
        state, ranks = self.state, self.scheduler.ranks
        self.last_event[gone] = event
        self.free += np.bincount(state.rank[gone], weights=state.blocks[gone], minlength=ranks).astype(np.int64)
        self.residents -= np.bincount(state.rank[gone], minlength=ranks)
        self.finished += len(gone)
        self._count(-len(gone))
        if self.clients is not None and self.arrived < len(self.requests):
            self._arrive(min(len(gone), len(self.requests) - self.arrived), event + 1)
