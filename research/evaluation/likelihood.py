"""Log-likelihood of given tokens, in right-padded batches."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from research.model.layers import at_least_float32
from research.model.transformer import Transformer

LARGEST_LOGITS = 2**26
"""Elements of one batch's logits (256 MB in float32)."""


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens, of which those from `start` (>= 1) on are scored, each under all tokens before it."""

    ids: tuple[int, ...]
    start: int


@torch.no_grad()
def log_likelihoods(model: Transformer, requests: Sequence[Request]) -> list[float]:
    """Sum of log P(token | all before it) of each request's scored tokens, in nats, in the order of `requests`.

    Sequences are padded behind: attention is causal and evaluation drops nothing, so padding changes no earlier
    position.  ValueError for a request that starts before 1, where nothing is given.
    """
    if bad := [r for r in requests if not 1 <= r.start <= len(r.ids)]:
        raise ValueError(f"start={bad[0].start} of {len(bad[0].ids)} tokens: must lie in 1..{len(bad[0].ids)}")
    scores = [math.nan] * len(requests)
    device = model.lm_head.weight.device
    for batch in _batches(requests, model.config.vocab_size):
        rows = [torch.tensor(requests[i].ids) for i in batch]
        ids = pad_sequence(rows, batch_first=True).to(device)
        logits = model(ids[:, :-1]).logits
        nats = F.cross_entropy(at_least_float32(logits.flatten(0, 1)), ids[:, 1:].flatten(), reduction="none").view(len(batch), -1)
        place = torch.arange(1, ids.shape[1])
        scored = torch.stack([(place >= requests[i].start) & (place < len(requests[i].ids)) for i in batch]).to(device)
        for i, value in zip(batch, nats.double().masked_fill(~scored, 0.0).sum(1).tolist(), strict=True):
            scores[i] = -value
    return scores


def _batches(requests: Sequence[Request], vocabulary: int) -> Iterator[list[int]]:
    """Indices, requests of similar length together, so many that the logits stay below LARGEST_LOGITS (but at least one)."""
    order = sorted((i for i, r in enumerate(requests)), key=lambda i: -len(requests[i].ids))
    while order:
        longest = len(requests[order[0]].ids)
        size = max(1, LARGEST_LOGITS // (longest * vocabulary))
        yield order[:size]
        order = order[size:]
