"""Batches as a function of (seed, step): the same tokens whatever model they train, now or after a resume."""

from collections.abc import Iterator

import numpy as np

from research.config import DataConfig
from research.data.prepare import PreparedData


def batch(data: PreparedData, config: DataConfig, *, seed: int, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """int64 (batch_size / world_size, sequence_length + 1): crops at random places of domains drawn by the mixture.

    Runs that differ in the model only see the same tokens in the same order (common random numbers).  The global
    batch does not depend on `world_size`: rank r of W has its rows r B / W up to (r + 1) B / W.  ValueError if W
    does not divide the batch or has no such rank.
    """
    if world_size < 1 or batch_size % world_size:
        raise ValueError(f"world_size={world_size} must divide batch_size={batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} must lie in 0..{world_size - 1} (world_size={world_size})")
    random = np.random.default_rng((seed, step, 0))
    shards = [np.asarray(data.train_tokens(domain)) for domain in data.domains]  # still mapped, but cheaper to slice
    # Every rank draws for the whole batch, which costs little, and reads its own rows only.
    chosen = random.choice(len(shards), size=batch_size, p=mixture_shares(data, config))
    places = random.random(batch_size)
    size, length = batch_size // world_size, config.sequence_length + 1
    mine = slice(rank * size, (rank + 1) * size)
    rows = np.empty((size, length), np.int64)
    for row, (domain, place) in enumerate(zip(chosen[mine], places[mine], strict=True)):
        shard = shards[domain]
        start = int(place * (len(shard) - length + 1))
        rows[row] = shard[start : start + length]
    return rows


def heldout_batches(data: PreparedData, config: DataConfig, *, domain: str, max_tokens: int, rows: int = 8) -> Iterator[np.ndarray]:
    """int64 (<= rows, sequence_length + 1): windows in order, each new token predicted once, about max_tokens in all."""
    tokens = data.heldout_tokens(domain)
    length = config.sequence_length
    windows = max(1, min((len(tokens) - 1) // length, max_tokens // length))
    for first in range(0, windows, rows):
        starts = np.arange(first, min(first + rows, windows)) * length
        yield np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)


def mixture_shares(data: PreparedData, config: DataConfig) -> np.ndarray:
    """float64 (domains,), sum 1: how often a sequence is drawn from each of `data.domains`."""
    weights = [config.mixture.get(d, 0.0) if config.mixture else len(data.train_tokens(d)) for d in data.domains]
    return np.array(weights, float) / sum(weights)
