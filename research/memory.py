"""Peak memory of a float32 training step on one device in closed form, and of decoding; nothing is built.

Counted are the allocator's bytes, as `training.measured_memory` counts them on a CPU: what Python and its libraries take
themselves (half a GB) is not in it.  What a layer takes is in `memory_layers`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from research import accounting
from research.config import ModelConfig
from research.memory_layers import INT64, Layer, layers

CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
"""Logits of one chunk of the loss by device: as many as stay in a cache, or (not measured yet) as keep a GPU busy."""
LEAST_CHUNK = 256
"""Tokens of a chunk at least: the gradient of the head is read and written once for each chunk."""
BYTES = 4


def loss_chunk_tokens(vocab_size: int, device: str = "cpu") -> int:
    """Tokens whose logits exist at a time in `model.loss`.

    On one core 4 MB of logits, but 256 tokens at least, are within 3 % of the best size for 1,024 to 16,384 logits per token.
    """
    return max(LEAST_CHUNK, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // vocab_size)


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of one training step.  `peak` is the largest sum that exists at one time: gradients grow while activations go."""

    weights: int
    optimizer: int
    gradients: int
    activations: dict[str, int]
    """By kind of layer: what all layers keep from the forward to the backward pass."""
    loss: int
    """Logits of one chunk, the last hidden states and their gradient."""
    temporary: int
    """The largest that any one layer takes for itself in its backward pass, with what it computes again."""
    peak: int


def training_memory(model: ModelConfig, tokens: int, *, micro_batches: int = 1, checkpointed: bool = False, kernels: bool = True) -> StepMemory:
    """A step whose forward passes are of `tokens` (sequences times length) each.

    checkpointed: `training.activation_checkpointing: blocks`.
    kernels: with the compiled CPU kernels, or in plain PyTorch.  With several micro-batches the gradients of those before are there from the start.
    """
    parameters, d, blocks = accounting.total_parameters(model), model.hidden_size, layers(model, kernels=kernels)
    head = model.vocab_size * d
    ends = {"norm": d + 1.0, "embedding": INT64}  # the last norm, and the ids
    chunk = min(loss_chunk_tokens(model.vocab_size), tokens) * model.vocab_size
    earlier = parameters if micro_batches > 1 else 0
    outside = 2.0 * d  # hidden states and their gradient
    kept = [d + ffn.stays if checkpointed else attention.saved + ffn.saved for attention, ffn in blocks]
    after = 0 if earlier else head
    once = 0.0 if checkpointed else sum(attention.once for attention, _ in blocks)
    moments = [tokens * (sum(kept) + sum(ends.values()) + outside) + once + chunk + earlier + head]
    temporary = 0.0
    below = sum(kept) + sum(ends.values()) + outside - d  # the last hidden states' gradient is the residual's from here on
    for (attention, ffn), of_block in zip(reversed(blocks), reversed(kept), strict=True):
        inside = attention.saved + ffn.saved if checkpointed else 0.0
        for half in (ffn, attention):
            own = tokens * inside + half.backward(tokens) + (attention.once if checkpointed else 0.0)
            moments.append(tokens * below + once + after + earlier + own)
            temporary = max(temporary, own)
            after += 0 if earlier else half.parameters
            freed = half.saved
            inside, below = (inside - freed, below) if checkpointed else (inside, below - freed)
        below -= of_block if checkpointed else 0.0
        once -= 0.0 if checkpointed else attention.once
    moments.append(tokens * (below + d) + (earlier or parameters) + (head if earlier else 0))
    moments.append(parameters)
    return StepMemory(
        weights=BYTES * parameters,
        optimizer=2 * BYTES * parameters,
        gradients=BYTES * parameters,
        activations=_by_kind(blocks, ends, tokens, d if checkpointed else None),
        loss=round(BYTES * (tokens * outside + chunk)),
        temporary=round(BYTES * temporary),
        peak=round(BYTES * (3 * parameters + max(moments))),
    )


def _by_kind(blocks: Iterable[tuple[Layer, Layer]], ends: dict[str, float], tokens: int, inputs: int | None) -> dict[str, int]:
    elements: dict[str, float] = {} if inputs is None else {"inputs of blocks": 0.0}
    for attention, ffn in blocks:
        if inputs is not None:
            elements["inputs of blocks"] += inputs
        for half in (attention, ffn):
            elements[half.kind] = elements.get(half.kind, 0.0) + (half.saved + half.once / tokens if inputs is None else half.stays)
    return {kind: round(BYTES * tokens * value) for kind, value in (elements | {"last norm and ids": sum(ends.values())}).items() if value}


@dataclass(frozen=True, slots=True)
class DecodingMemory:
    """Bytes of decoding in float32: weights, the cache of all sequences, and the logits of one step."""

    weights: int
    cache: int
    logits: int
    peak: int


def decoding_memory(model: ModelConfig, sequences: int, positions: int, bits: float) -> DecodingMemory:
    """`sequences` with `positions` each, a cache of `bits` per element."""
    per_token = accounting.kv_cache_bytes_per_token(model, bits)
    if bits in accounting.KV_BITS:
        per_token = accounting.kv_cache_bytes_per_token_stored(model, int(bits))
    weights, cache, logits = (
        BYTES * accounting.total_parameters(model),
        round(sequences * positions * per_token),
        BYTES * sequences * model.vocab_size,
    )
    return DecodingMemory(weights, cache, logits, weights + cache + logits)


def describe(
    model: ModelConfig, *, batch_size: int, micro_batch_size: int | None, sequence_length: int, bits: float, kernels: bool = True
) -> dict[str, Any]:
    """Training without and with activation checkpointing, and decoding of as many sequences and positions, as JSON holds them."""
    size = micro_batch_size or batch_size
    steps = {
        name: asdict(training_memory(model, size * sequence_length, micro_batches=batch_size // size, checkpointed=name == "blocks", kernels=kernels))
        for name in ("none", "blocks")
    }
    shape = {"batch_size": batch_size, "micro_batch_size": size, "sequence_length": sequence_length, "kv_bits": bits, "kernels": kernels}
    return {**shape, "training": steps, "decoding": asdict(decoding_memory(model, batch_size, sequence_length, bits))}
