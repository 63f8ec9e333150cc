"""Cross-entropy of the language model without its logits: a chunk of tokens at a time.

The logits (B T, V) and their gradient are the largest tensors of a training step.  Here a chunk's logits live in one
buffer, from which the loss and both gradients are taken at once, so that nothing is kept or computed again
(as in Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, section 3.2).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from research.memory import loss_chunk_tokens
from research.model.kernels import functions, native
from research.model.layers import at_least_float32


class _Chunk(NamedTuple):
    """Tokens `rows`; e^(logit - largest logit) (c, V), its sums (c, 1), and the nats (c,) of the targets (c, 1)."""

    rows: slice
    exponentials: Tensor
    sums: Tensor
    nats: Tensor
    targets: Tensor


def chunked_language_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Mean cross-entropy in nats per token of the logits hidden @ weight^T; the fast form of `transformer.language_loss`.

    hidden (B, T, D), weight (V, D), targets int64 (B, T) -> scalar, float32 at least.  Logits are computed in the type of
    an enclosing autocast (bfloat16), their softmax in float32 at least.  chunk_tokens: tokens whose logits
    exist at a time; None: `memory.loss_chunk_tokens`.  Gradients are exact for hidden and weight, and once only.
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return token_nats(hidden, weight, targets, chunk_tokens).mean()
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten(), chunk_tokens)
    return loss


@torch.no_grad()
def token_nats(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Cross-entropy of each token, (B, T), in float32 at least and without a gradient; arguments as `chunked_language_loss`."""
    chunks = _chunks(hidden.flatten(0, 1), _as_computed(weight), targets.flatten(), chunk_tokens)
    return torch.cat([chunk.nats for chunk in chunks]).view(targets.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """hidden (M, D), weight (V, D), targets (M,) -> mean nats.

    The gradient of a token's logits is (e - s [v = target]) / (s M) with exponentials e and their sum s.  Its
    division is left to the products, whose rows are D wide instead of V.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None) -> Tensor:
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=at_least_float32(weight).dtype) if ctx.needs_input_grad[1] else None
        head, nats = _as_computed(weight), []
        for chunk in _chunks(hidden, head, targets, chunk_tokens):
            nats.append(chunk.nats)
            scale = (chunk.sums * len(targets)).reciprocal_()
            gradient = chunk.exponentials.scatter_add_(1, chunk.targets, -chunk.sums).to(head.dtype)
            if to_hidden is not None:
                to_hidden[chunk.rows] = (gradient @ head).to(scale.dtype).mul_(scale)
            if to_weight is not None:
                _add_product(to_weight, gradient.T, (hidden[chunk.rows] * scale).to(head.dtype))
        ctx.save_for_backward(to_hidden, None if to_weight is None else to_weight.to(weight.dtype))
        return torch.cat(nats).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # Scaled out of place: with retain_graph the same gradients serve again.  On a GPU a look at `outer` would wait for it.
        if outer.device.type == "cpu" and float(outer) == 1.0:
            return *ctx.saved_tensors, None, None
        to_hidden, to_weight = (None if saved is None else saved * outer.to(saved.dtype) for saved in ctx.saved_tensors)
        return to_hidden, to_weight, None, None


def _chunks(hidden: Tensor, head: Tensor, targets: Tensor, chunk_tokens: int | None) -> Iterator[_Chunk]:
    """Chunks of hidden (M, D) in order.  All share one buffer: a chunk is used, or overwritten, before the next is taken."""
    size = min(chunk_tokens or loss_chunk_tokens(len(head), hidden.device.type), len(hidden))
    buffer = torch.empty(size, len(head), dtype=head.dtype, device=hidden.device)
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        target = targets[rows, None]
        logits = at_least_float32(torch.mm(hidden[rows].to(head.dtype), head.T, out=buffer[: rows.stop - start]))
        at_target = logits.gather(1, target)
        if native.usable(logits) and logits.is_contiguous():
            largest, sums = functions.exponentials(logits)
        else:
            largest = logits.amax(-1, keepdim=True)
            sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
        yield _Chunk(rows, logits, sums, (sums.log() + largest - at_target)[:, 0], target)


def _as_computed(weight: Tensor) -> Tensor:
    """The head's weight in what its product is computed in: an enclosing autocast's type (which leaves float64 alone), else its own."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64 else weight


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place; partial sums are kept as precisely as `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
