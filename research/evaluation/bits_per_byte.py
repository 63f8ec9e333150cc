"""Held-out text in bits per byte: comparable whatever the tokenizer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from research.config import DataConfig
from research.data.batches import heldout_batches
from research.data.packing import documents
from research.data.prepare import PreparedData
from research.evaluation.intervals import percentile_interval, resampled_sums
from research.model.cache import Cache
from research.model.loss import token_nats
from research.model.transformer import Transformer
from research.parallel.world import ALONE, World
from research.training import records

TEXTS_AT_LEAST = 10
"""With fewer held-out texts than this, windows are resampled instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """Summed code length of one domain's held-out tokens, and the bytes that they spell.

    `parts` holds (bits, bytes) of what an interval resamples: held-out texts (blocks of one document, ended by the
    end-of-text token), which are drawn by a hash and so hardly depend on each other; where there are fewer than
    TEXTS_AT_LEAST, the windows, whose neighbours do, so that their interval is too narrow rather than too wide.
    """

    bits: float
    bytes: int
    unit: Literal["texts", "windows"] = "windows"
    parts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)), compare=False, repr=False)

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


@torch.no_grad()
def evaluate_domains(
    model: Transformer, data: PreparedData, config: DataConfig, max_tokens: int, bits: int | None = None, world: World = ALONE
) -> dict[str, DomainScore]:
    """Score every domain; nothing is dropped, windows do not overlap, a window's first token is context only.

    bits: every token is predicted from keys and values read back from a cache of that width; None: no cache.  A window is
    one pass through an empty cache: each layer attends to what the cache gives back, its own position included, which
    is what decoding token by token attends to.
    """
    weight = model.lm_head.weight
    token_bytes = np.asarray(data.token_bytes())
    scores = {}
    for domain in data.domains:
        lengths, targets = [], []
        for window in heldout_batches(data, config, domain=domain, max_tokens=max_tokens):
            ids = torch.from_numpy(np.ascontiguousarray(window)).to(weight.device)
            own = world.padded_share(ids)
            given = own[:, :-1]
            cache = None if bits is None else Cache.allocate(model.config, *given.shape, dtype=weight.dtype, device=weight.device, bits=bits)
            hidden, _ = model.hidden(given, cache, documents=documents(data, config, given))
            nats = world.gather(token_nats(hidden, weight, own[:, 1:]), "gathering the validation")[: len(ids)]
            lengths.append(nats.double().cpu().numpy() / math.log(2))
            targets.append(window[:, 1:])
        scores[domain] = _score(np.concatenate(lengths), token_bytes[np.concatenate(targets)])
    return scores


def _score(bits: np.ndarray, sizes: np.ndarray) -> DomainScore:
    """bits float64 and sizes (bytes) int64, both (windows, T), of a stream of tokens; a token of no bytes ends a text."""
    ends = sizes.ravel() == 0
    text = ends.cumsum() - ends  # an end-of-text token belongs to the text that it ends
    found = np.stack([np.bincount(text, of.ravel()) for of in (bits, sizes)], 1)
    texts = len(found) >= TEXTS_AT_LEAST
    parts = found if texts else np.stack([of.sum(1) for of in (bits, sizes)], 1).astype(float)
    return DomainScore(bits=float(bits.sum()), bytes=int(sizes.sum()), unit="texts" if texts else "windows", parts=parts)


def score_metrics(scores: dict[str, DomainScore]) -> dict[str, float]:
    """Metrics by name: each domain's, and all by bytes."""
    metrics = {f"{records.BITS_PER_BYTE}/{domain}": score.bits_per_byte for domain, score in scores.items()}
    metrics[records.BITS_PER_BYTE] = sum(s.bits for s in scores.values()) / sum(s.bytes for s in scores.values())
    return metrics


def domain_intervals(scores: Mapping[str, DomainScore], baseline: Mapping[str, DomainScore] | None = None) -> dict[str, tuple[float, float] | None]:
    """95 % intervals of bits per byte by domain, and of `all` by bytes; with a `baseline` on the same text, of the difference to it.

    Bootstrap over each domain's `parts` (`all`: within every domain), always with the same draws; None for a single part.
    """
    sums: dict[str, np.ndarray | None] = {}
    for index, (domain, score) in enumerate(scores.items()):
        parts = score.parts if baseline is None else np.column_stack([score.parts, baseline[domain].parts[:, 0]])
        sums[domain] = resampled_sums(parts, seed=(0, index)) if len(parts) > 1 else None
    known = [s for s in sums.values() if s is not None]
    return {domain: _interval(s) for domain, s in sums.items()} | {"all": _interval(np.sum(known, axis=0) if len(known) == len(sums) else None)}


def _interval(sums: np.ndarray | None) -> tuple[float, float] | None:
    """sums (R, 2): bits, bytes; (R, 3): also the baseline's bits."""
    if sums is None:
        return None
    bits, size = sums[:, 0], sums[:, 1]
    return percentile_interval((bits if sums.shape[1] == 2 else bits - sums[:, 2]) / size)
