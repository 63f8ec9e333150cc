"""Held-out text in bits per byte: comparable whatever the tokenizer."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from research.config import DataConfig
from research.data.batches import heldout_batches
from research.data.prepare import PreparedData
from research.model.cache import Cache
from research.model.loss import token_nats
from research.model.transformer import Transformer
from research.training import records


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """Summed code length of one domain's held-out tokens, and the bytes that they spell."""

    bits: float
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.bytes


@torch.no_grad()
def evaluate_domains(model: Transformer, data: PreparedData, config: DataConfig, max_tokens: int, bits: int | None = None) -> dict[str, DomainScore]:
    """Score every domain; nothing is dropped, windows do not overlap, a window's first token is context only.

    bits: every token is predicted from keys and values read back from a cache of that width; None: no cache.  A window is
    one pass through an empty cache: each layer attends to what the cache gives back, its own position included, which
    is what decoding token by token attends to.
    """
    weight = model.lm_head.weight
    token_bytes = np.asarray(data.token_bytes())
    scores = {}
    for domain in data.domains:
        length, size = 0.0, 0
        for window in heldout_batches(data, config, domain=domain, max_tokens=max_tokens):
            ids = torch.from_numpy(np.ascontiguousarray(window)).to(weight.device)
            given = ids[:, :-1]
            cache = None if bits is None else Cache.allocate(model.config, *given.shape, dtype=weight.dtype, device=weight.device, bits=bits)
            hidden, _ = model.hidden(given, cache)
            length += float(token_nats(hidden, weight, ids[:, 1:]).double().sum()) / math.log(2)
            size += int(token_bytes[window[:, 1:]].sum())
        scores[domain] = DomainScore(bits=length, bytes=size)
    return scores


def score_metrics(scores: dict[str, DomainScore]) -> dict[str, float]:
    """Metrics by name: each domain's, and all by bytes."""
    metrics = {f"{records.BITS_PER_BYTE}/{domain}": score.bits_per_byte for domain, score in scores.items()}
    metrics[records.BITS_PER_BYTE] = sum(s.bits for s in scores.values()) / sum(s.bytes for s in scores.values())
    return metrics
