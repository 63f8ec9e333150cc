"""What each layer saves for the backward pass, and what that takes beside it, in float32 elements per token.

A line for each tensor, once for the compiled CPU kernels (`kernels`) and once for plain PyTorch.  It describes the code of
`research.model` and has to follow it: `tests/research/test_memory.py` holds the saved elements to 1 %.
"""

from dataclasses import dataclass

from research import accounting
from research.config import AttentionConfig, ModelConfig, MoEConfig

FLOAT32, INT64, BOOL = 1.0, 2.0, 0.25
"""Sizes in elements of float32."""


def attention_saved(model: ModelConfig, *, kernels: bool) -> dict[str, float]:
    """An attention layer, its norm included."""
    a, d = model.attention, model.hidden_size
    heads, key, value = a.num_attention_heads, a.qk_head_dim, a.v_head_dim
    to_latents = kernels and _absorbed(a)
    if to_latents:
        key, value = a.kv_lora_rank + a.qk_rope_head_dim, a.kv_lora_rank
    saved = _normed(d) | {"queries": heads * key, "log-sum-exp": heads, "input of the output projection": heads * value}
    if a.kind == "mla":
        rotary = a.qk_rope_head_dim if kernels else 0  # the kernel keeps the vector that was split off, and the rotary key
        saved |= {"query latent, 1 / rms, normed latent": 2.0 * a.q_lora_rank + 1} if a.q_lora_rank else {}
        saved |= {"latent and rotary key, 1 / rms, normed latent": 2.0 * a.kv_lora_rank + rotary + 1, "turned rotary key": rotary}
    if to_latents:
        return saved
    if kernels:
        return saved | {"keys and values": _rebuilt(a)}
    wide, groups = max(key, value), heads if a.kind == "mla" else a.key_value_heads
    values = wide if value < key or a.kind != "mla" else a.qk_nope_head_dim + value
    return saved | {"keys": groups * key, "values, padded to the width of keys": groups * values, "attention's output": heads * wide}


def _normed(width: int) -> dict[str, float]:
    """Plain PyTorch keeps the unit vector, the kernel the vector itself."""
    return {"norm's vector and 1 / rms": width + 1.0, "normed vector": width}


def _absorbed(a: AttentionConfig) -> bool:
    """Whether training attends to latents (`model.attention.expansion_pays`)."""
    return a.kind == "mla" and 2 * a.kv_lora_rank <= a.qk_nope_head_dim + a.v_head_dim


def _multiplied_projections(a: AttentionConfig, d: int) -> int:
    """The projections to queries and from heads, W^UK and W^UV multiplied in."""
    return a.num_attention_heads * ((a.kv_lora_rank + a.qk_rope_head_dim) * (a.q_lora_rank or d) + a.kv_lora_rank * d)


def _rebuilt(a: AttentionConfig) -> int:
    """Keys and values as their projections give them: of MLA the rotary part is one for all heads and counted with the latent."""
    if a.kind == "mla":
        return a.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return a.key_value_heads * (a.qk_head_dim + a.v_head_dim)


def dense_saved(model: ModelConfig, *, kernels: bool) -> dict[str, float]:
    """A dense FFN, its norm included."""
    tensors = hidden_tensors(gated=model.gated_ffn, fused=kernels and swiglu(model))
    return _normed(model.hidden_size) | {"hidden": float(tensors * model.intermediate_size)}


def swiglu(model: ModelConfig, *, experts: bool = False) -> bool:
    """Whether the FFNs (or the experts) are what the kernels are for."""
    gated = model.moe is not None and model.moe.gated_experts if experts else model.gated_ffn
    return gated and model.activation == "silu"


def hidden_tensors(*, gated: bool, fused: bool) -> int:
    """Tensors of an FFN's hidden width: up and its activation, or gate, its activation, up and their product (the kernel makes both anew)."""
    return (2 if fused else 4) if gated else 2


def experts_saved(model: ModelConfig, *, kernels: bool) -> dict[str, float]:
    """A DeepSeekMoE layer, its norm included; no assignment is taken as dropped."""
    moe, fused = model.moe, kernels and swiglu(model, experts=True)
    assert moe is not None
    chosen, width = moe.num_experts_per_tok, moe.moe_intermediate_size
    saved = _normed(model.hidden_size) | routing_kept(moe)
    if not (moe.selection == "affinity" or moe.n_shared_experts or fused):
        del saved["normed vector"]  # only its rows are needed, in the order of the experts
    if fused:
        saved |= {"slots of the assignments": chosen * INT64, "experts' gate and up": 2.0 * chosen * width}
    else:
        saved |= {
            "order, tokens and gates of the assignments": chosen * (2 * INT64 + FLOAT32),
            "experts' inputs and outputs": 2.0 * chosen * model.hidden_size,
            "experts' hidden": float(chosen * _weighted_tensors(moe) * width),
        }
    return saved | {"shared experts' hidden": float(_shared_hidden(moe, fused=fused))}


def _weighted_tensors(moe: MoEConfig) -> int:
    """As `hidden_tensors`, and what the gates are applied to: hashed experts' constant gates need no gradient."""
    return hidden_tensors(gated=moe.gated_experts, fused=False) + (1 if moe.selection == "affinity" else 0)


def _shared_hidden(moe: MoEConfig, *, fused: bool) -> int:
    return hidden_tensors(gated=moe.gated_experts, fused=fused) * moe.n_shared_experts * moe.moe_intermediate_size


def routing_kept(moe: MoEConfig) -> dict[str, float]:
    """The routing that a layer gives back, which the step holds for losses and statistics."""
    return {"affinities": moe.n_routed_experts, "ids, gates, kept": moe.num_experts_per_tok * (INT64 + 2 * FLOAT32 + BOOL)}


@dataclass(frozen=True, slots=True)
class Layer:
    """One half of a block: its parameters; elements per token that it saves, and of these those that stay when it is computed again.

    once: elements that it saves for all tokens together.
    moments: points of its backward pass, each with the elements that exist beyond the saved ones: per token, and not per token.
    """

    kind: str
    parameters: int
    saved: float
    stays: float
    moments: tuple[tuple[float, float], ...]
    once: float = 0.0

    def backward(self, tokens: int) -> float:
        """The most that its backward pass has beside what is saved."""
        return max(tokens * each + fixed for each, fixed in self.moments)


def layers(model: ModelConfig, *, kernels: bool) -> list[tuple[Layer, Layer]]:
    """Attention and FFN of each block, in order."""
    attention = _attention(model, kernels=kernels)
    return [
        (attention, (_experts if model.is_moe_layer(index) else _dense)(model, index, kernels=kernels)) for index in range(model.num_hidden_layers)
    ]


def _attention(model: ModelConfig, *, kernels: bool) -> Layer:
    a, d = model.attention, model.hidden_size
    heads, parameters = a.num_attention_heads, accounting.attention_parameters(a, d) + d
    once = float(_multiplied_projections(a, d)) if kernels and _absorbed(a) else 0.0
    # Gradients: of the residual; of output, queries, keys and values.
    if kernels and _absorbed(a):
        each = d + heads * (2.0 * a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank + a.qk_rope_head_dim
    elif kernels:
        each = d + heads * (a.v_head_dim + a.qk_head_dim) + float(_rebuilt(a))
    else:
        groups = heads if a.kind == "mla" else a.key_value_heads
        each = 2.0 * d + 2 * max(a.qk_head_dim, a.v_head_dim) * (heads + groups)
    return Layer("attention", parameters, sum(attention_saved(model, kernels=kernels).values()), 0.0, ((each, parameters + once),), once)


def _dense(model: ModelConfig, index: int, *, kernels: bool) -> Layer:
    d, parameters = model.hidden_size, accounting.ffn_parameters(model, index) + model.hidden_size
    # Gradients of the residual, of the input and of the hidden activations, whose own tensors go meanwhile; the kernel has their product too.
    each = d + 3.0 * model.intermediate_size if kernels and swiglu(model) else 2.0 * d + model.intermediate_size
    return Layer("dense FFN", parameters, sum(dense_saved(model, kernels=kernels).values()), 0.0, ((each, parameters),))


def _experts(model: ModelConfig, index: int, *, kernels: bool) -> Layer:
    moe, d, fused = model.moe, model.hidden_size, kernels and swiglu(model, experts=True)
    assert moe is not None
    chosen, width = moe.num_experts_per_tok, moe.moe_intermediate_size
    down, up = moe.n_routed_experts * d * width, (2 if moe.gated_experts else 1) * moe.n_routed_experts * d * width
    hidden = float(moe.n_shared_experts * width)
    if fused:
        moments: tuple[tuple[float, float], ...] = (
            (d + 3 * hidden, 0.0),  # gradients of the residual and of the shared experts' hidden, and their product
            (2.0 * d + chosen, down + up + 3 * d * hidden),  # of the residual, the input and the gates; of all weights
        )
    else:
        gone = _shared_hidden(moe, fused=fused)  # shared experts go back first
        moments = (
            (2.0 * d + hidden, 0.0),  # gradients of residual and layer; of the shared experts' hidden
            (3.0 * d + chosen * d - gone, 0.0),  # of the shared experts' input; of the routed experts' outputs
            (3.0 * d + chosen * width - gone, 2.0 * down),  # those outputs are gone; weights' gradients exist a second time, transposed
            (3.0 * d - chosen * (_weighted_tensors(moe) - up / down) * width - gone, down + 2.0 * up),  # the hidden are gone, too
        )
    stays = sum(routing_kept(moe).values())
    saved = sum(experts_saved(model, kernels=kernels).values())
    return Layer("experts", accounting.ffn_parameters(model, index) + d, saved, stays, moments)
