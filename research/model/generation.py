"""Text from a model: prefill expanded, then one absorbed step per token over the latent cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from research.model.cache import Cache
from research.model.transformer import Transformer


@torch.no_grad()
def generate(model: Transformer, prompt: Tensor, new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Iterator[Tensor]:
    """Yield int64 (B,) per new position for prompts (B, T) of equal length.  Temperature 0 is greedy."""
    generator = torch.Generator().manual_seed(seed)
    weight = model.lm_head.weight
    cache = Cache.allocate(model.config, prompt.shape[0], prompt.shape[1] + new_tokens, dtype=weight.dtype, device=weight.device)
    ids = prompt
    for _ in range(new_tokens):
        logits = model(ids, cache).logits[:, -1]
        chosen = _choose(logits, temperature, top_p, generator)
        yield chosen
        ids = chosen[:, None]


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    probability, order = (logits.float().cpu() / temperature).softmax(-1).sort(-1, descending=True)
    # A token stays while the mass before it is below top_p, so that the first always stays.
    probability = probability.masked_fill(probability.cumsum(-1) - probability >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(probability, 1, generator=generator))[:, 0].to(logits.device)
