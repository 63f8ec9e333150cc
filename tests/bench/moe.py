"""A whole MoE layer over a dense FFN of the same activated FLOPs, balanced and skewed; the plain form and transformers' beside it."""

from collections import Counter

import torch

from research.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig
from research.model.layers import FeedForward
from research.model.moe import MoE
from tests.bench.common import interleaved
from tests.bench.training import Products, products_of

SIZES = {"small": (256, 32, 4, 128), "larger": (512, 64, 6, 176)}
"""Hidden size, experts, chosen, expert width; two shared experts each."""


def measure_moe(size: str, tokens_per_expert: int, skew: float, rounds: int) -> dict[str, object]:
    """Seconds of forward and backward of both, and their ratio.  With `skew` the busiest expert gets that many times the average.

    `products`: the ratio of their matrix products alone, each shape repeated on operands in the cache.
    """
    d, experts, chosen, width = SIZES[size]
    tokens = tokens_per_expert * experts // chosen
    moe = MoEConfig(
        n_routed_experts=experts, num_experts_per_tok=chosen, moe_intermediate_size=width, n_shared_experts=2, balance=BalanceConfig(expert=0.0)
    )
    config = ModelConfig(
        vocab_size=512, hidden_size=d, num_hidden_layers=2, intermediate_size=4 * d, moe=moe,
        attention=AttentionConfig(num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
    )  # fmt: skip
    torch.manual_seed(0)
    layer, dense = MoE(config, 1), FeedForward(d, (chosen + 2) * width)
    for parameter in (*layer.parameters(), *dense.parameters()):
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    x = torch.randn(1, tokens, d)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    if skew > 1:
        _skew(layer, x, skew, tokens * chosen / experts)

    def both(module, *inputs):
        given = x.clone().requires_grad_()
        out = module(given, *inputs)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        module.zero_grad(set_to_none=True)

    forms = {"moe": lambda: both(layer, ids), "dense": lambda: both(dense)}
    alone = {f"products of {name}": Products(sum(products_of(form).values(), Counter())) for name, form in forms.items()}
    seconds = interleaved(forms | alone, rounds)
    load = torch.bincount(layer(x, ids)[1].expert_ids_MK.flatten(), minlength=experts)
    return {
        "size": size,
        "tokens_per_expert": tokens_per_expert,
        "busiest_over_average": float(load.max() / load.float().mean()),
        "seconds": seconds,
        "times": seconds["moe"] / seconds["dense"],
        "products": seconds["products of moe"] / seconds["products of dense"],
        "gflops": {name: products.flops / 1e9 for name, products in alone.items()},
    }


def _skew(layer: MoE, x: torch.Tensor, skew: float, average: float) -> None:
    """Tilt the gate along the mean of its inputs until the busiest expert has `skew` times the average."""
    direction = torch.zeros(x.shape[-1])
    direction[0] = 1.0
    with torch.no_grad():
        x[..., 0] = 1.0
        low, high = 0.0, 60.0
        for _ in range(30):
            strength = (low + high) / 2
            layer.gate.weight[:, 0] = torch.linspace(strength, 0.0, len(layer.gate.weight))
            ids = layer(x, torch.zeros(x.shape[:2], dtype=torch.int64))[1].expert_ids_MK
            busiest = torch.bincount(ids.flatten(), minlength=len(layer.gate.weight)).max() / average
            low, high = (strength, high) if busiest < skew else (low, strength)
