"""T2: collectives that share links, by max-min fair shares (progressive filling) over each GPU's links.

A kernel's channels go through all destinations together, so a collective's flows are weighted by their sizes, and collectives
among each other alike: one alone takes exactly its busiest link's time, the closed form's bound; beside others it takes longer.
Shares are taken anew whenever flows start or end; ends within a hundredth of what remains are taken together.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from sims.cluster import Cluster
from sims.collective import collective_seconds, streams
from sims.constants import Constants
from sims.traffic import Traffic

WINDOW = 0.01
"""Share of the remaining time within which ends are taken together: bandwidth idles at most so long."""
LINKS = ("nvlink out", "nvlink in", "nic out", "nic in")

_cache: dict[tuple[str, tuple[float, ...]], np.ndarray] = {}
CACHED = 256


def shared_seconds(
    collectives: Sequence[Traffic],
    cluster: Cluster,
    constants: Constants,
    *,
    starts: Sequence[float] | None = None,
    sms: float | None = None,
) -> np.ndarray:
    """Seconds from its own start to its end of each collective, float64 (collectives, draws).

    The same GPUs take part in all; `starts` in seconds (all 0 if left out).  Never less than `collective_seconds` of each.
    """
    factors = stretch(collectives, cluster, constants, starts=starts)
    return np.stack([collective_seconds(t, cluster, constants, sms=sms, contention=f) for t, f in zip(collectives, factors, strict=True)])


def stretch(collectives: Sequence[Traffic], cluster: Cluster, constants: Constants, *, starts: Sequence[float] | None = None) -> np.ndarray:
    """By what each collective's busiest link is slower than alone, float64 (collectives,) >= 1, at the point estimate."""
    begin = np.zeros(len(collectives)) if starts is None else np.asarray(starts, float)
    # Each link's busy seconds are its size: every link then has capacity 1.
    busy = [_seconds(traffic, cluster, constants) for traffic in collectives]
    digest = hashlib.sha256(b"".join(array.tobytes() for pair in busy for array in pair)).hexdigest()
    key = (digest, tuple(begin))
    if key not in _cache:
        if len(_cache) >= CACHED:
            _cache.pop(next(iter(_cache)))
        alone = np.array([max((float(s.max(initial=0)) for m in pair for s in (m.sum(0), m.sum(1))), default=0.0) for pair in busy])
        ends = _ends(busy, begin, alone)
        _cache[key] = np.maximum(1.0, np.divide(ends - begin, alone, out=np.ones(len(alone)), where=alone > 0))
    return _cache[key]


def _seconds(traffic: Traffic, cluster: Cluster, constants: Constants) -> tuple[np.ndarray, np.ndarray]:
    """Seconds that each flow (source, destination) keeps a link of its own busy, over NVLink and over NICs."""
    found = streams(traffic, cluster, constants)
    pairs = []
    for matrix, name in ((traffic.nvlink, "nvlink out"), (traffic.infiniband, "nic out")):
        total = matrix.sum()
        pairs.append(matrix * (float(found[name][0].sum()) / total) if total else np.zeros(matrix.shape))
    return pairs[0], pairs[1]


def _ends(busy: Sequence[tuple[np.ndarray, np.ndarray]], begin: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """When each collective's last flow ends, `alone` being what it takes by itself."""
    gpus = len(busy[0][0])
    owner, out, into, size = [], [], [], []
    for index, pair in enumerate(busy):
        for kind, matrix in enumerate(pair):
            source, destination = np.nonzero(matrix)
            owner.append(np.full(len(source), index))
            out.append(source + 2 * kind * gpus)
            into.append(destination + (2 * kind + 1) * gpus)
            size.append(matrix[source, destination])
    which, links, left = np.concatenate(owner), (np.concatenate(out), np.concatenate(into)), np.concatenate(size)
    ends, now = begin.copy(), float(begin.min(initial=0.0))
    weight = left / alone[which]
    while (left > 0).any():
        active = (left > 0) & (begin[which] <= now)
        later = begin[begin > now]
        if not active.any():
            now = float(later.min())
            continue
        rate = np.zeros(len(left))
        rate[active] = _rates(weight[active], links[0][active], links[1][active], 4 * gpus)
        over = np.where(active, left / np.where(rate > 0, rate, 1.0), np.inf)
        ahead = max(float(over.min()), WINDOW * float(over[active].max()))
        if len(later):
            ahead = min(ahead, float(later.min()) - now)
        done = active & (over <= ahead * (1 + 1e-12))
        np.maximum.at(ends, which[done], now + over[done])
        left = np.where(done, 0.0, np.where(active, left - rate * ahead, left))
        now += ahead
    return ends


def _rates(weight: np.ndarray, out: np.ndarray, into: np.ndarray, links: int) -> np.ndarray:
    """Weighted max-min fair rates of flows over two links each of capacity 1: the fullest link fixes its flows' share, then the next."""
    rate, free, room = np.zeros(len(weight)), np.ones(len(weight), bool), np.ones(links)
    while free.any():
        demand = np.bincount(out[free], weight[free], links) + np.bincount(into[free], weight[free], links)
        level = np.divide(np.maximum(room, 0.0), demand, out=np.full(links, np.inf), where=demand > 0)
        lowest = level.min()
        # Links whose level is within a thousandth are fixed together, at the lowest.
        full = level <= lowest * 1.001 + 1e-300
        fixed = free & (full[out] | full[into])
        rate[fixed] = weight[fixed] * lowest
        room -= np.bincount(out[fixed], rate[fixed], links) + np.bincount(into[fixed], rate[fixed], links)
        free &= ~fixed
    return rate
