"""Which layers a stage has, and which GPU is which rank."""

from functools import lru_cache

import numpy as np

from research import accounting
from research.config import ModelConfig
from sims.training.spec import TrainingStep


def stage_layers(spec: TrainingStep) -> list[range]:
    """Layers of each stage, in order."""
    sizes = spec.layers_per_stage or even_stages(spec.model, spec.stages, spec.sequence_length)
    ends = np.cumsum(sizes)
    return [range(int(end) - size, int(end)) for size, end in zip(sizes, ends, strict=True)]


@lru_cache(maxsize=64)
def even_stages(model: ModelConfig, stages: int, sequence_length: int) -> tuple[int, ...]:
    """Layers per stage such that the sum of the stages' squared FLOPs is least; the head belongs to the last stage."""
    cost = np.array([_layer_flops(model, layer, sequence_length) for layer in range(model.num_hidden_layers)])
    sums, layers = np.concatenate([[0.0], np.cumsum(cost)]), len(cost)
    head = 2.0 * model.vocab_size * model.hidden_size
    best = np.full((stages + 1, layers + 1), np.inf)
    cut = np.zeros((stages + 1, layers + 1), int)
    best[0, 0] = 0.0
    for stage in range(1, stages + 1):
        for end in range(stage, layers + 1):
            begins = np.arange(stage - 1, end)
            each = sums[end] - sums[begins] + (head if stage == stages else 0.0)
            values = best[stage - 1, begins] + each**2
            cut[stage, end] = begins[np.argmin(values)]
            best[stage, end] = values.min()
    sizes: list[int] = []
    end = layers
    for stage in range(stages, 0, -1):
        sizes.append(end - int(cut[stage, end]))
        end = int(cut[stage, end])
    return tuple(reversed(sizes))


def _layer_flops(model: ModelConfig, layer: int, sequence_length: int) -> float:
    a = model.attention
    weights = accounting.attention_parameters(a, model.hidden_size) + accounting.ffn_parameters(model, layer, activated=True)
    return 2.0 * weights + a.num_attention_heads * (a.qk_head_dim + a.v_head_dim) * sequence_length


def stage_parameters(model: ModelConfig, layers: range, *, first: bool, last: bool, expert_parallel: int) -> tuple[float, float]:
    """Parameters of one GPU of a stage: those that all data-parallel ranks have alike, and those of its own routed experts."""
    d = model.hidden_size
    alike, experts = 0.0, 0.0
    for layer in layers:
        ffn = accounting.ffn_parameters(model, layer)
        routed = 0
        if model.moe is not None and model.is_moe_layer(layer):
            moe = model.moe
            routed = (3 if moe.gated_experts else 2) * d * moe.moe_intermediate_size * moe.n_routed_experts
        alike += accounting.attention_parameters(model.attention, d) + 2 * d + ffn - routed
        experts += routed / expert_parallel
    return alike + (model.vocab_size * d if first else 0) + (model.vocab_size * d + d if last else 0), experts


def gpu_index(spec: TrainingStep, stage: int, unit: int, device: int, shard: int = 0) -> int:
    """The GPU of a stage that is device `device` of the expert-parallel group of `unit` (and tensor-parallel `shard`).

    packed: the GPUs of a stage lie one after the other, its groups too.  spread: a group takes one slot of as many nodes.
    """
    group, experts = stage * spec.units + unit, spec.experts_over
    if spec.placement == "packed" or experts == 1:
        return (group * experts + device) * spec.tensor_parallel + shard
    block, slot = divmod(group, spec.gpus_per_node)
    return (block * experts + device) * spec.gpus_per_node + slot


def group_per_node(spec: TrainingStep) -> int:
    """GPUs of an expert-parallel group that share a node."""
    return 1 if spec.placement == "spread" else min(spec.experts_over, spec.gpus_per_node)
