"""Peak memory of a float32 training step on one device in closed form, and of decoding; nothing is built.

Counted are the allocator's bytes, as `training.measured_memory` counts them on a CPU: what Python and its libraries take
themselves is not in it.  What a layer saves for the backward pass is a table of elements per token, a line for each tensor
(`attention_saved`, `dense_saved`, `experts_saved`): it describes the model's code and has to follow it.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from research import accounting
from research.config import ModelConfig, MoEConfig

CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
"""Logits of one chunk of the loss by device: as many as stay in a cache, or (not measured yet) as keep a GPU busy."""
LEAST_CHUNK = 256
"""Tokens of a chunk at least: the gradient of the head is read and written once for each chunk."""
FLOAT32, INT64, BOOL = 1.0, 2.0, 0.25
"""Sizes in elements of float32, in which everything is counted here."""
BYTES = 4


def loss_chunk_tokens(vocab_size: int, device: str = "cpu") -> int:
    """Tokens whose logits exist at a time in `model.loss`.

    On one core 4 MB of logits, but 256 tokens at least, are within 3 % of the best size for 1,024 to 16,384 logits per token.
    """
    return max(LEAST_CHUNK, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cuda"]) // vocab_size)


def attention_saved(model: ModelConfig) -> dict[str, float]:
    """Elements per token that an attention layer saves, its norm included."""
    a, d = model.attention, model.hidden_size
    heads, key, value = a.num_attention_heads, a.qk_head_dim, a.v_head_dim
    saved = {"norm's unit vector and 1 / rms": d + 1.0, "input of the projections": d}
    if a.kind == "mla":
        for name, rank in (("query", a.q_lora_rank or 0), ("key/value", a.kv_lora_rank)):
            saved |= {f"{name} latent: unit vector, 1 / rms, normed": 2.0 * rank + 1} if rank else {}
        padded = max(key, value)  # values are padded to the width of keys
        saved |= {"keys of all heads": heads * key, "values of all heads": heads * padded, "attention's output": heads * padded}
    else:
        groups = a.key_value_heads
        saved |= {"keys": groups * key, "values": groups * max(key, value), "attention's output": heads * max(key, value)}
    return saved | {"queries": heads * key, "log-sum-exp": heads, "input of the output projection": heads * value}


def dense_saved(model: ModelConfig) -> dict[str, float]:
    """Elements per token that a dense FFN saves, its norm included."""
    d = model.hidden_size
    return {"norm's unit vector and 1 / rms": d + 1.0, "input of the projections": d} | _hidden_saved(model.intermediate_size, model.gated_ffn)


def _hidden_saved(width: int, gated: bool) -> dict[str, float]:
    return {"gate, its activation, up, their product" if gated else "up and its activation": (4.0 if gated else 2.0) * width}


def experts_saved(model: ModelConfig) -> dict[str, float]:
    """Elements per token that a DeepSeekMoE layer saves, its norm included; no assignment is taken as dropped."""
    moe, d = model.moe, model.hidden_size
    assert moe is not None
    chosen, width = moe.num_experts_per_tok, moe.moe_intermediate_size
    saved = {
        "norm's unit vector and 1 / rms": d + 1.0,
        "input of gate and shared experts": d if moe.selection == "affinity" or moe.n_shared_experts else 0,
        **routing_kept(moe),
        "order, tokens and gates of the assignments": chosen * (2 * INT64 + FLOAT32),
        "experts' inputs and outputs": 2.0 * chosen * d,
        "experts' hidden activations": chosen * _expert_hidden(moe) * width,
    }
    if moe.n_shared_experts:
        saved |= {f"shared experts: {k}": v for k, v in _hidden_saved(moe.n_shared_experts * width, moe.gated_experts).items()}
    return saved


def _expert_hidden(moe: MoEConfig) -> int:
    """Tensors of an expert's width: up, gate beside it, activation, their product, what the weights are applied to, and the result."""
    return (4 if moe.gated_experts else 2) + (1 if moe.selection == "affinity" else 0)  # constant weights need no gradient


def routing_kept(moe: MoEConfig) -> dict[str, float]:
    """Elements per token of the routing that a layer gives back, which the step holds for losses and statistics."""
    return {"routing: affinities": moe.n_routed_experts, "routing: ids, gates, kept": moe.num_experts_per_tok * (INT64 + 2 * FLOAT32 + BOOL)}


@dataclass(frozen=True, slots=True)
class Layer:
    """One half of a block: its parameters; elements per token that it saves, and of these those that stay when it is computed again.

    moments: points of its backward pass, each with the elements that exist beyond the saved ones: per token, and not per token.
    """

    kind: str
    parameters: int
    saved: float
    stays: float
    moments: tuple[tuple[float, float], ...]

    def backward(self, tokens: int) -> float:
        """The most that its backward pass has beside what is saved."""
        return max(tokens * each + fixed for each, fixed in self.moments)


def layers(model: ModelConfig) -> list[tuple[Layer, Layer]]:
    """Attention and FFN of each block, in order."""
    attention = _attention(model)
    return [(attention, _experts(model, i) if model.is_moe_layer(i) else _dense(model, i)) for i in range(model.num_hidden_layers)]


def _attention(model: ModelConfig) -> Layer:
    a, d = model.attention, model.hidden_size
    parameters = accounting.attention_parameters(a, d) + d
    width, groups = max(a.qk_head_dim, a.v_head_dim), a.num_attention_heads if a.kind == "mla" else a.key_value_heads
    # Gradients of the residual and the layer's input; of output, queries, keys and values as the attention kernel has them.
    each = 2.0 * d + 2 * width * (a.num_attention_heads + groups)
    return Layer("attention", parameters, sum(attention_saved(model).values()), 0.0, ((each, parameters),))


def _dense(model: ModelConfig, index: int) -> Layer:
    parameters = accounting.ffn_parameters(model, index) + model.hidden_size
    each = 2.0 * model.hidden_size + model.intermediate_size
    return Layer("dense FFN", parameters, sum(dense_saved(model).values()), 0.0, ((each, parameters),))


def _experts(model: ModelConfig, index: int) -> Layer:
    moe, d = model.moe, model.hidden_size
    assert moe is not None
    chosen, width = moe.num_experts_per_tok, moe.moe_intermediate_size
    down, up = moe.n_routed_experts * d * width, (2 if moe.gated_experts else 1) * moe.n_routed_experts * d * width
    shared = moe.n_shared_experts * width
    gone = sum(_hidden_saved(shared, moe.gated_experts).values())  # shared experts go back first
    moments = (
        (2.0 * d + shared, 0.0),  # gradients of residual and layer; of the shared experts' hidden activations
        (3.0 * d + chosen * d - gone, 0.0),  # of the shared experts' input; of the routed experts' outputs
        (3.0 * d + chosen * width - gone, 2.0 * down),  # those outputs are gone; weights' gradients exist a second time, transposed
        (3.0 * d - chosen * (_expert_hidden(moe) - up / down) * width - gone, down + 2.0 * up),  # hidden activations are gone, too
    )
    stays = sum(routing_kept(moe).values())
    return Layer("experts", accounting.ffn_parameters(model, index) + d, sum(experts_saved(model).values()), stays, moments)


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


def training_memory(model: ModelConfig, tokens: int, *, micro_batches: int = 1, checkpointed: bool = False) -> StepMemory:
    """A step whose forward passes are of `tokens` (sequences times length) each.

    checkpointed: `training.activation_checkpointing: blocks`.  With several micro-batches the gradients of those before are there from the start.
    """
    parameters, d, blocks = accounting.total_parameters(model), model.hidden_size, layers(model)
    head = model.vocab_size * d
    ends = {"norm": d + 1.0, "embedding": INT64}  # the last norm, and the ids
    chunk = min(loss_chunk_tokens(model.vocab_size), tokens) * model.vocab_size
    earlier = parameters if micro_batches > 1 else 0
    outside = 2.0 * d  # hidden states and their gradient
    kept = [d + ffn.stays if checkpointed else attention.saved + ffn.saved for attention, ffn in blocks]
    after = 0 if earlier else head
    moments = [tokens * (sum(kept) + sum(ends.values()) + outside) + chunk + earlier + head]
    temporary = 0.0
    below = sum(kept) + sum(ends.values()) + outside - d  # the last hidden states' gradient is the residual's from here on
    for (attention, ffn), of_block in zip(reversed(blocks), reversed(kept), strict=True):
        inside = attention.saved + ffn.saved if checkpointed else 0.0
        for half in (ffn, attention):
            own = tokens * inside + half.backward(tokens)
            moments.append(tokens * below + after + earlier + own)
            temporary = max(temporary, own)
            after += 0 if earlier else half.parameters
            freed = half.saved
            inside, below = (inside - freed, below) if checkpointed else (inside, below - freed)
        below -= of_block if checkpointed else 0.0
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
            elements[half.kind] = elements.get(half.kind, 0.0) + (half.saved if inputs is None else half.stays)
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


def describe(model: ModelConfig, *, batch_size: int, micro_batch_size: int | None, sequence_length: int, bits: float) -> dict[str, Any]:
    """Training without and with activation checkpointing, and decoding of as many sequences and positions, as JSON holds them."""
    size = micro_batch_size or batch_size
    steps = {
        name: asdict(training_memory(model, size * sequence_length, micro_batches=batch_size // size, checkpointed=name == "blocks"))
        for name in ("none", "blocks")
    }
    shape = {"batch_size": batch_size, "micro_batch_size": size, "sequence_length": sequence_length, "kv_bits": bits}
    return {**shape, "training": steps, "decoding": asdict(decoding_memory(model, batch_size, sequence_length, bits))}
