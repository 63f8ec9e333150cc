"""What a layer computes, operation by operation, and how long a GPU takes for it.

An operation takes max(FLOPs / (peak x efficiency of its kind), bytes / (HBM bandwidth x efficiency of memory)), and of a
product the part of writing its result that nothing hides: inputs of a tile are loaded while the tile before is multiplied, but
a kernel with one tile per SM at a time stops to write it, which costs thin products (short inner dimensions) most.  FLOPs are
those of `research.accounting`, split: two for each parameter and token forward, as many again for the gradient of the inputs
(`backward-input`, B) and of the weights (`backward-weights`, W), and causal attention over half the sequence.  Bytes follow
from shapes.  Taken as fused: a residual's addition with the norm behind it, the rotation of queries in place, bias-free
projections of one input (gate and up, queries with keys and values), the gates' multiplication with the activation between two
products, a weight gradient's accumulation in float32 with its product, cross-entropy forward with backward.  Not fused, so that
they cost a pass over memory of their own: norms, keys put together from their two parts (MLA), the activation between two
products, sorting tokens by expert and back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from research.config import ModelConfig
from sims.cluster import Cluster

Kind = Literal["attention", "dense_gemm", "grouped_gemm", "memory"]
Pass = Literal["forward", "backward-input", "backward-weights", "prefill", "decode"]
KINDS: tuple[Kind, ...] = ("attention", "dense_gemm", "grouped_gemm", "memory")
ACTIVATION, FLOAT32 = 2.0, 4.0
"""Bytes of an activation (bfloat16) and of a gradient that is accumulated."""


class Efficiencies(Protocol):
    """Draws of each constant by name: `sims.constants.Constants`, or a plain dict."""

    def __getitem__(self, name: str, /) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel of one GPU: FLOPs and bytes of all its tokens.

    written: of the bytes, those of a product's result (read, too, where it is added to).
    tokens_per_expert: rows of each product of a grouped GEMM.  compute_bits: 8 uses the FP8 peak, where a cluster has one.
    recomputed: done again in a backward pass, so that it takes time and is none of the model's FLOPs.
    """

    name: str
    kind: Kind
    flops: float
    bytes: float
    tokens_per_expert: float | None = None
    compute_bits: int = 16
    recomputed: bool = False
    written: float = 0.0


def operation_seconds(operation: Operation, cluster: Cluster, constants: Efficiencies, sms_share: float = 1.0) -> np.ndarray:
    """float64 (draws,).  `sms_share` of the SMs compute: those of a collective that runs meanwhile do not.

    A grouped GEMM reaches grouped_gemm_share of a dense one's efficiency, times m / (m + grouped_gemm_half_tokens) for m rows
    per expert: rows are padded to whole tiles, and few rows leave SMs without work.  Memory-bound work is bytes alone.
    """
    bandwidth = cluster.hbm_bytes_per_second.value * constants["memory_efficiency"]
    moved = operation.bytes / bandwidth
    if operation.kind == "memory" or not operation.flops:
        return moved
    efficiency = constants["attention_efficiency" if operation.kind == "attention" else "dense_gemm_efficiency"]
    if operation.kind == "grouped_gemm":
        efficiency = efficiency * constants["grouped_gemm_share"]
    if operation.tokens_per_expert is not None:
        rows = operation.tokens_per_expert
        efficiency = efficiency * rows / (rows + constants["grouped_gemm_half_tokens"])
    computed = operation.flops / (peak(cluster, operation.compute_bits) * sms_share * efficiency)
    if not operation.written:
        return np.maximum(computed, moved)
    return np.maximum(computed, moved) + constants["exposed_write"] * np.minimum(computed, operation.written / bandwidth)


def peak(cluster: Cluster, compute_bits: int = 16) -> float:
    """FLOP/s of the data sheet, dense."""
    figure = cluster.fp8_flops_per_second if compute_bits == 8 and cluster.fp8_flops_per_second else cluster.bf16_flops_per_second
    return figure.value


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """How much one GPU has to do of a layer, and in which direction.

    context: positions that a token attends to, on average (half a sequence in training).  routed_tokens: (token, expert)
    pairs that this GPU's experts get; None: as many as its own tokens send out.  experts_read: of its experts, those that
    get a token (their weights are read); None: all.  shards: GPUs that share heads and FFN widths (tensor parallelism, with
    the norms' tokens shared, too).
    """

    tokens: float
    context: float
    phase: Pass
    weight_bytes: float = ACTIVATION
    kv_bytes: float = ACTIVATION
    compute_bits: int = 16
    expert_parallel: int = 1
    routed_tokens: float | None = None
    experts_read: float | None = None
    shards: int = 1


def layer_operations(
    model: ModelConfig,
    layer: int,
    *,
    tokens: float,
    phase: Pass,
    sequence_length: float | None = None,
    context: float | None = None,
    weight_bits: float = 16,
    kv_bits: float = 16,
    compute_bits: int = 16,
    expert_parallel: int = 1,
    routed_tokens: float | None = None,
    experts_read: float | None = None,
    tensor_parallel: int = 1,
) -> list[Operation]:
    """Of one layer, in order, on one GPU.  Give `sequence_length` (causal: half of it is attended to) or `context`.

    `decode` attends to latents (absorbed MLA) and reads each token's whole cache at `kv_bits`; `prefill` is `forward` that
    also writes the cache.  Fields as in `Work`.
    """
    if (sequence_length is None) == (context is None):
        raise ValueError("give sequence_length (causal) or context (positions that a token attends to), one of the two")
    work = Work(
        tokens=tokens,
        context=sequence_length / 2 if sequence_length is not None else context or 0.0,
        phase=phase,
        weight_bytes=weight_bits / 8,
        kv_bytes=kv_bits / 8,
        compute_bits=compute_bits,
        expert_parallel=expert_parallel,
        routed_tokens=routed_tokens,
        experts_read=experts_read,
        shards=tensor_parallel,
    )
    return attention_operations(model, work) + ffn_operations(model, layer, work)


def attention_operations(model: ModelConfig, work: Work) -> list[Operation]:
    """The first half of a block: norm, projections, attention, output projection."""
    a, d, heads = model.attention, model.hidden_size, model.attention.num_attention_heads / work.shards
    if a.kind == "mla":
        projections = _mla_projections(model, work, heads)
    else:
        groups = a.key_value_heads / work.shards
        width = heads * a.qk_head_dim + groups * (a.qk_head_dim + a.v_head_dim)
        turned = (heads + groups) * a.qk_rope_head_dim
        projections = [*gemm("queries, keys, values", d, width, work), memory("rotary", 2 * turned, work)]
    return [*norm("attention norm", d, work, residual=True), *projections, *_core(model, work, heads), *gemm("output", heads * a.v_head_dim, d, work)]


def _mla_projections(model: ModelConfig, work: Work, heads: float) -> list[Operation]:
    a, d = model.attention, model.hidden_size
    latent, rotary, nope, value = a.kv_lora_rank, a.qk_rope_head_dim, a.qk_nope_head_dim, a.v_head_dim
    if a.q_lora_rank is None:
        query = gemm("queries", d, heads * a.qk_head_dim, work)
    else:
        query = [*gemm("query latent", d, a.q_lora_rank, work), *norm("query norm", a.q_lora_rank, work)]
        query += gemm("queries from latent", a.q_lora_rank, heads * a.qk_head_dim, work)
    down = [*gemm("key/value latent", d, latent + rotary, work), *norm("latent norm", latent, work)]
    turned = 2 * heads * rotary + 2 * rotary
    if work.phase == "decode":
        absorbed = gemm("queries to latents", nope, latent, work, matrices=heads, per_head=True)
        absorbed += gemm("latents to values", latent, value, work, matrices=heads, per_head=True)
        return [*query, *down, memory("rotary", turned, work), *absorbed]
    up = gemm("keys and values", latent, heads * (nope + value), work)
    # The key of a head is its own part and the rotary part that all share: both are written out for every head.
    joined = heads * nope + rotary + heads * a.qk_head_dim
    return [*query, *down, *up, memory("rotary and keys of two parts", turned + joined, work)]


def _core(model: ModelConfig, work: Work, heads: float) -> list[Operation]:
    """Scores, softmax and mixing of values, in one kernel that keeps no scores."""
    a, tokens = model.attention, work.tokens
    groups = heads if a.kind == "mla" else a.key_value_heads / work.shards
    wide, value = a.qk_head_dim, a.v_head_dim
    if work.phase == "backward-weights":
        return []
    if work.phase == "decode":
        if a.kind == "mla":
            wide, value, groups, cached = a.kv_lora_rank + a.qk_rope_head_dim, a.kv_lora_rank, 1.0, a.kv_lora_rank + a.qk_rope_head_dim
        else:
            cached = int(a.key_value_heads * (a.qk_head_dim + a.v_head_dim))
        share = 1.0 if a.kind == "mla" else min(work.shards, a.key_value_heads)
        flops = 2 * heads * (wide + value) * work.context * tokens
        read = tokens * (cached / share * (work.context + 1) * work.kv_bytes + heads * (wide + value) * ACTIVATION)
        return [Operation("attention", "attention", flops, read, compute_bits=16)]
    flops = 2 * heads * (wide + value) * work.context * tokens
    each = heads * (wide + value) + groups * (wide + value)
    if work.phase == "backward-input":
        scores = Operation("attention's scores again", "attention", 2 * heads * wide * work.context * tokens, 0.0, recomputed=True)
        return [scores, Operation("attention", "attention", 2 * flops, 2 * each * tokens * ACTIVATION)]
    operations = [Operation("attention", "attention", flops, each * tokens * ACTIVATION)]
    if work.phase == "prefill":
        stored = a.kv_lora_rank + a.qk_rope_head_dim if a.kind == "mla" else groups * (wide + value)
        operations.append(Operation("cache", "memory", 0.0, tokens * stored * (ACTIVATION + work.kv_bytes)))
    return operations


def ffn_operations(model: ModelConfig, layer: int, work: Work) -> list[Operation]:
    """The second half of a block: norm, then a dense FFN, or gate, shared and routed experts."""
    d, first = model.hidden_size, norm("FFN norm", model.hidden_size, work, residual=True)
    if model.moe is None or not model.is_moe_layer(layer):
        return [*first, *ffn("FFN", d, model.intermediate_size / work.shards, work, gated=model.gated_ffn)]
    return [*first, *gate_operations(model, work), *shared_operations(model, work), *routed_operations(model, work)]


def ffn(name: str, width: float, hidden: float, work: Work, *, gated: bool) -> list[Operation]:
    """Two or three dense products and the activation between them."""
    into = 2 if gated else 1
    return [
        *gemm(f"{name} in", width, into * hidden, work),
        memory(f"{name} activation", (into + 1) * hidden, work),
        *gemm(f"{name} out", hidden, width, work),
    ]


def gate_operations(model: ModelConfig, work: Work) -> list[Operation]:
    """Affinities, softmax, the choice of experts; nothing to compute where experts are hashed."""
    assert model.moe is not None
    if model.moe.selection != "affinity":
        return []
    experts = model.moe.n_routed_experts
    # Affinities are float32 and are read by the softmax, by the choice of devices and by that of experts.
    return [*gemm("gate", model.hidden_size, experts, work), memory("choice of experts", 4 * 2 * experts, work)]


def shared_operations(model: ModelConfig, work: Work) -> list[Operation]:
    """The shared experts, which need nobody else's tokens: one FFN as wide as all of them."""
    assert model.moe is not None
    if not model.moe.n_shared_experts:
        return []
    hidden = model.moe.n_shared_experts * model.moe.moe_intermediate_size / work.shards
    return ffn("shared experts", model.hidden_size, hidden, work, gated=model.moe.gated_experts)


def routed_operations(model: ModelConfig, work: Work) -> list[Operation]:
    """Tokens sorted by expert, the grouped products, tokens put back in order and weighted."""
    moe, d = model.moe, model.hidden_size
    assert moe is not None
    pairs = work.tokens * moe.num_experts_per_tok if work.routed_tokens is None else work.routed_tokens
    held = moe.n_routed_experts / work.expert_parallel
    experts = held if work.experts_read is None else work.experts_read
    hidden, into = moe.moe_intermediate_size / work.shards, 2 if moe.gated_experts else 1
    sized = replace(work, tokens=pairs)
    products = [
        *_sort("tokens by expert", d, sized),
        *gemm("routed experts in", d, into * hidden, sized, matrices=experts),
        memory("routed experts activation", (into + 1) * hidden, sized),
        *gemm("routed experts out", hidden, d, sized, matrices=experts),
        *_sort("tokens in order", d, sized),
    ]
    each = pairs / max(experts, 1e-9)
    return [replace(o, kind="grouped_gemm", tokens_per_expert=each) if o.kind == "dense_gemm" else o for o in products]


def _sort(name: str, width: int, work: Work) -> list[Operation]:
    """A row read and a row written for each pair; backward the same, the other way."""
    return [] if work.phase == "backward-weights" else [Operation(name, "memory", 0.0, 2 * width * work.tokens * ACTIVATION)]


def embedding_operations(model: ModelConfig, work: Work) -> list[Operation]:
    """A row read and one written for each token; backward the gradient is added to that row in float32."""
    each = model.hidden_size * work.tokens / work.shards
    if work.phase == "backward-input":
        return []
    moved = ACTIVATION + 2 * FLOAT32 if work.phase == "backward-weights" else 2 * ACTIVATION
    return [Operation("embedding", "memory", 0.0, moved * each)]


def head_operations(model: ModelConfig, work: Work) -> list[Operation]:
    """The last norm, the logits and, in training, cross-entropy: logits are read three times and their gradient written once."""
    vocabulary = model.vocab_size / work.shards
    operations = [*norm("last norm", model.hidden_size, work, residual=True), *gemm("head", model.hidden_size, vocabulary, work)]
    if work.phase == "forward":
        operations.append(Operation("cross-entropy", "memory", 0.0, 4 * vocabulary * work.tokens * ACTIVATION))
    return operations


def gemm(name: str, into: float, out: float, work: Work, *, matrices: float = 1.0, per_head: bool = False) -> list[Operation]:
    """A product with matrices of into x out: of one of them for each row (experts), or of each for every token (`per_head`)."""
    rows, weights = work.tokens * (matrices if per_head else 1.0), matrices * into * out
    if work.phase == "backward-weights":
        # A weight gradient is added to what the micro-batches before left in float32: read and written.
        written = 2 * FLOAT32 * weights
        moved = rows * (into + out) * ACTIVATION + written
    else:
        written = rows * (into if work.phase == "backward-input" else out) * ACTIVATION
        moved = rows * (into + out) * ACTIVATION + weights * work.weight_bytes
    return [Operation(name, "dense_gemm", 2 * rows * into * out, moved, compute_bits=work.compute_bits, written=written)]


def norm(name: str, width: int, work: Work, *, residual: bool = False) -> list[Operation]:
    """RMSNorm, with the residual's addition before it.  Two FLOPs per gain, as every parameter is counted.

    Tensor-parallel GPUs share the tokens of the residual stream (sequence parallelism), and repeat a latent's norm.
    """
    tokens = work.tokens / (work.shards if residual else 1)
    backward = work.phase == "backward-input"
    passes = 0 if work.phase == "backward-weights" else (4 if residual else 3 if backward else 2)
    return [Operation(name, "memory", 2 * width * tokens, passes * width * tokens * ACTIVATION)]


def memory(name: str, elements: float, work: Work) -> Operation:
    """Elements read and written for each token, forward; backward also reads what was saved: half as many again."""
    factor = {"backward-input": 1.5, "backward-weights": 0.0}.get(work.phase, 1.0)
    return Operation(name, "memory", 0.0, factor * elements * work.tokens * ACTIVATION)


def total_flops(operations: Iterable[Operation]) -> float:
    """The model's own: what is computed again is not counted."""
    return sum(operation.flops for operation in operations if not operation.recomputed)
