"""Saturation in closed form: residents by memory, a step at its mean composition, and which resource binds.

What the engine finds request by request, without its events: no preemption, no synchronised start, and means in place of draws.
It serves for curves over the batch, for sensitivities, and to check the engine.
"""

from dataclasses import dataclass

import numpy as np

from sims.serving.capacity import Capacity
from sims.serving.cost import Cost, Priced
from sims.serving.requests import Requests
from sims.serving.spec import Serving


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """Of the requests, per generated token of a resident sequence."""

    output: float
    prompt: float
    decode: float
    """Tokens that come of a step over a cache: all but the first of each request."""
    context: float
    """Positions that a generated token attends to, times `decode`."""
    pairs: float
    resident: float
    """Positions of cache that a sequence takes while it is resident, blocks filled up."""


def means(requests: Requests, block_tokens: int, *, reserve: bool = False) -> Means:
    """Averages over the steps of all sequences: a sequence of o tokens is resident for o steps, the first of which computes its prompt."""
    p, o = requests.prompt.astype(float), requests.output.astype(float)
    steps = o.sum()
    attended = (o - 1) * p + o * (o - 1) / 2
    held = (p + o) * o + o * (block_tokens - 1) / 2 if reserve else o * p + o * (o + 1) / 2 + o * (block_tokens - 1) / 2
    return Means(
        output=float(o.mean()),
        prompt=float(p.sum() / steps),
        decode=float((o - 1).sum() / steps),
        context=float(attended.sum() / steps),
        pairs=float((p * (p + 1) / 2).sum() / steps),
        resident=float(held.sum() / steps),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Saturated:
    """A server that always has someone waiting, at one batch.  Arrays float64 (draws,)."""

    residents: float
    """Sequences over all ranks and replicas."""
    step_seconds: np.ndarray
    generated: np.ndarray
    """Tokens per second over all GPUs, of steps that compute the prompts' chunks, too."""
    decode_seconds: np.ndarray
    generated_alone: np.ndarray
    """Tokens per second of steps that only generate, prompts being computed elsewhere."""
    priced: Priced


def saturated(means_: Means, cost: Cost, spec: Serving, residents: float) -> Saturated:
    """At so many resident sequences (all ranks and replicas together)."""
    ranks, replicas = cost.split.ranks, cost.split.replicas
    each = residents / ranks / replicas
    mixed = _row(each, means_, ranks, prompts=True)
    alone = _row(each, means_, ranks, prompts=False)
    priced, decoding = cost.price(mixed), cost.price(alone)
    return Saturated(
        residents=residents,
        step_seconds=priced.seconds[0],
        generated=residents / priced.seconds[0],
        decode_seconds=decoding.seconds[0],
        generated_alone=residents / decoding.seconds[0],
        priced=priced,
    )


def _row(each: float, m: Means, ranks: int, *, prompts: bool) -> np.ndarray:
    """Of one rank with `each` sequences; alone, every one of them generates over a cache."""
    if not prompts:
        context = m.context / m.decode if m.decode else m.prompt * m.output + 1
        return np.array([[each, each * context, 0.0, 0.0, 0.0, ranks * each, each, 1.0]])
    row = [each * m.decode, each * m.context, each * m.prompt, each * m.pairs, 0.0, ranks * each * (m.decode + m.prompt), each, 1.0]
    return np.array([row])


def residents(m: Means, room: Capacity, cost: Cost, spec: Serving) -> tuple[float, str]:
    """Sequences at saturation over all ranks and replicas, and what holds them there.

    `memory capacity`, `batch limit` (max_batch, clients), or `token budget`: max_batched_tokens are spent before prompts have
    been let in as fast as sequences end.
    """
    groups = cost.split.ranks * cost.split.replicas
    limits = {"memory capacity": room.tokens / m.resident, "token budget": groups * spec.max_batched_tokens / (m.decode + m.prompt)}
    for asked in (spec.max_batch, spec.clients):
        if asked is not None:
            limits["batch limit"] = min(float(asked), limits.get("batch limit", np.inf))
    name = min(limits, key=lambda key: limits[key])
    return limits[name], name


def prompt_rate(m: Means, cost: Cost, spec: Serving) -> np.ndarray:
    """Prompt tokens per second over all GPUs of steps that compute prompts alone, float64 (draws,)."""
    ranks, tokens = cost.split.ranks, float(spec.max_batched_tokens)
    prompts = tokens / (m.prompt * m.output)
    row = np.array([[0.0, 0.0, tokens, tokens * m.pairs / m.prompt, 0.0, ranks * tokens, prompts, 1.0]])
    return ranks * cost.split.replicas * tokens / cost.price(row).seconds[0]


def elasticities(m: Means, room: Capacity, cost: Cost, spec: Serving) -> dict[str, float]:
    """By how many per cent the saturated rate grows with one per cent more of each resource, at the best estimate.

    Compute, bandwidths and host: the share of a step that each is the bound of.  Memory, or what else limits the residents: by
    finite difference, as more residents make longer steps.
    """
    most, limit = residents(m, room, cost, spec)
    here = saturated(m, cost, spec, most)
    total = float(here.priced.seconds[0, 0])
    found = {name: float(value[0]) / total for name, value in here.priced.resources.items()}
    more = saturated(m, cost, spec, most * 1.01)
    gain = float(np.log(more.generated[0] / here.generated[0]) / np.log(1.01))
    # What weights and activations leave is a part of the memory: one per cent of the whole is more of the cache.
    found[limit] = gain * (room.memory_bytes - room.runtime_bytes) / room.cache_bytes if limit == "memory capacity" else gain
    return found
