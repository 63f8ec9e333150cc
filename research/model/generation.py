"""Text from a model: prefill expanded, then one absorbed step per token over the latent cache."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from research.model.cache import Cache
from research.model.transformer import Transformer

PREFILL = 512
"""Positions of a prompt that pass the model at a time."""


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Iterable[Tensor],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    bits: int | None = None,
    vocabulary: int | None = None,
) -> Iterator[Tensor]:
    """Yield int64 (B,) per new position for B prompts, int64 (T_b,) each, of any lengths but 0 (so rows of a matrix will do).

    Temperature 0 is greedy.  `bits` is the cache's width (`Cache.allocate`); ids from
    `vocabulary` on are never chosen: a tokenizer may have fewer than the model.  Each prompt draws from a generator of
    its own with the same seed: what follows it does not depend on the other prompts of the batch, up to the rounding
    of sums in another order.  ValueError without prompts, or with an empty one.
    """
    prompts = list(prompts)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(f"prompts of {[len(prompt) for prompt in prompts]} tokens: there must be one, and each must hold a token")
    weight = model.lm_head.weight
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    cache = Cache.allocate(model.config, len(prompts), int(lengths.max()) + new_tokens, dtype=weight.dtype, device=weight.device, bits=bits)
    ids = pad_sequence(prompts, batch_first=True).to(weight.device)
    last = (lengths - 1).to(weight.device)
    new: Tensor | None = lengths
    for _ in range(new_tokens):
        logits = model.lm_head(_last_hidden(model, ids, cache, new, last))[..., :vocabulary]
        chosen = _choose(logits, temperature, top_p, generators)
        yield chosen
        ids, last, new = chosen[:, None], torch.zeros_like(last), None


def _last_hidden(model: Transformer, ids: Tensor, cache: Cache, new: Tensor | None, last: Tensor) -> Tensor:
    """(B, D) behind the token `last` (B,) of each row of ids (B, T), of which the first `new` (B,; None: all) are real.

    A long prompt is taken PREFILL positions at a time: what is held beside the cache does not grow with it, and only one position meets the head.
    """
    rows, found = torch.arange(len(ids), device=ids.device), None
    for start in range(0, ids.shape[1], PREFILL):
        piece = ids[:, start : start + PREFILL]
        real = None if new is None else (new - start).clamp(0, piece.shape[1])
        hidden, _ = model.hidden(piece, cache, new_B=real)
        behind = hidden[rows, (last - start).clamp(0, piece.shape[1] - 1)]
        here = (last >= start)[:, None]
        found = behind if found is None else torch.where(here, behind, found)
    assert found is not None
    return found


def _choose(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> Tensor:
    """int64 (B,) for logits (B, vocabulary), row b drawn with generator b."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float().cpu()
    # The largest becomes 0 before it is divided: however small the temperature, nothing overflows.
    probability = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probability.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p; the first always does, for top_p = 0 too.
        outside = ranked.cumsum(-1) - ranked >= top_p
        outside[:, 0] = False
        probability = probability.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    # argmax p / e with e ~ Exp(1) for each token of the vocabulary draws from p.  Unlike a draw along the ranks, it does not
    # change when rounding lets two almost equal tokens swap theirs.
    noise = torch.stack([torch.empty(probability.shape[1]).exponential_(generator=g) for g in generators])
    return (probability / noise).argmax(-1).to(logits.device)
