"""What a GPU keeps during a training step: weights, gradients, its shard of the optimizer's state, activations in flight."""

from dataclasses import asdict, dataclass

from research.config import ModelConfig
from sims.training.layout import stage_layers
from sims.training.schedules import stages_of
from sims.training.spec import TrainingStep
from sims.training.step import parameters

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12
"""Bytes per parameter: bfloat16, float32, and AdamW's float32 weight and two moments."""
ACTIVATION = 2


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the fullest GPU.  Not counted: the runtime's context, communication buffers, a layer's temporaries, fragmentation."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    total: float
    available: float

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def to_dict(self) -> dict[str, float | bool]:
        return {**asdict(self), "fits": self.fits}


def memory(spec: TrainingStep, available: float) -> Memory:
    """Of the position of the pipeline that needs most."""
    return max((_position(spec, position, available) for position in range(spec.stages)), key=lambda m: m.total)


def _position(spec: TrainingStep, position: int, available: float) -> Memory:
    held = stages_of(spec.schedule, spec.stages, position)
    alike = sum(parameters(spec, stage)[0] for stage in held)
    experts = sum(parameters(spec, stage)[1] for stage in held)
    shards = (spec.data_parallel * len(held), spec.units * len(held))
    parts = {
        "weights": WEIGHT * (alike + experts),
        "gradients": GRADIENT * (alike + experts),
        "optimizer": OPTIMIZER * (alike / shards[0] + experts / shards[1]),
        "activations": activations(spec, position),
    }
    return Memory(position, **parts, total=sum(parts.values()), available=available)


def in_flight(spec: TrainingStep, position: int) -> float:
    """Microbatches whose activations a position keeps at most.

    1F1B: P - i.  ZB-H1 keeps inputs of `position` weight gradients besides: P everywhere.  DualPipe: P + 1 (V3, table 2).
    """
    most = {"1f1b": spec.stages - position, "zero-bubble": spec.stages, "dualpipe": spec.stages + 1}[spec.schedule]
    return min(most, spec.microbatches)


def activations(spec: TrainingStep, position: int) -> float:
    """Bytes saved for the backward passes, and the logits with their gradient at the end of the pipeline."""
    held, model = stages_of(spec.schedule, spec.stages, position), spec.model
    layers = [layer for stage in held for layer in stage_layers(spec)[stage]]
    each = sum(saved_per_token(model, layer, spec.recompute) for layer in layers) / len(held)
    logits = (ACTIVATION + 4) * model.vocab_size if spec.stages - 1 in held else 0
    working = max((saved_per_token(model, layer, "none") for layer in layers), default=0.0) if spec.recompute == "full" else 0.0
    return spec.tokens / spec.tensor_parallel * (in_flight(spec, position) * each + logits + working)


def saved_per_token(model: ModelConfig, layer: int, recompute: str) -> float:
    """Bytes of one layer.  `full` keeps its input alone; `partial` what cannot be had again from norms, up-projections and activations.

    Gates are applied to the hidden activations of the experts, so that their outputs need not be kept.
    """
    a, d = model.attention, model.hidden_size
    if recompute == "full":
        return float(ACTIVATION * d)
    heads, keep_all = a.num_attention_heads, recompute == "none"
    kept = [2.0 * d, heads * a.v_head_dim, 2.0 * heads]  # the residual stream twice, attention's output, log-sum-exp
    rebuilt = [2.0 * d]  # both norms' outputs
    if a.kind == "mla":
        query = heads * a.qk_head_dim
        kept += [a.kv_lora_rank + a.qk_rope_head_dim, a.q_lora_rank if a.q_lora_rank else query]
        rebuilt += [a.kv_lora_rank, query + heads * (a.qk_head_dim + a.v_head_dim), a.q_lora_rank or 0]
        if not a.q_lora_rank:
            rebuilt.append(-query)
    else:
        kept.append(heads * a.qk_head_dim + a.key_value_heads * (a.qk_head_dim + a.v_head_dim))
    if model.moe is None or not model.is_moe_layer(layer):
        into = 2 if model.gated_ffn else 1
        kept.append(into * model.intermediate_size)
        rebuilt.append(model.intermediate_size)
    else:
        moe, into = model.moe, 2 if model.moe.gated_experts else 1
        hidden = (moe.num_experts_per_tok + moe.n_shared_experts) * moe.moe_intermediate_size
        kept += [moe.num_experts_per_tok * d, into * hidden, 2.0 * moe.n_routed_experts]
        rebuilt.append(hidden)
    return ACTIVATION * (sum(kept) + (sum(rebuilt) if keep_all else 0.0))
