"""The DeepSeekMoE layer (V2 section 2.2): h' = u + shared(u) + sum of the gated routed experts."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.config import ModelConfig
from research.model.experts import RoutedExperts
from research.model.layers import SwiGLU, at_least_float32
from research.model.router import Routing, drop_over_capacity, route


class Gate(nn.Module):
    """Expert centroids e_i, (E, D): logits are u . e_i, in float32 at least whatever the model's precision."""

    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))

    def forward(self, x_MD: Tensor) -> Tensor:
        with torch.autocast(x_MD.device.type, enabled=False):
            return F.linear(at_least_float32(x_MD), at_least_float32(self.weight))


class MoE(nn.Module):
    """Gate, routed experts and shared experts; the shared ones are one FFN of their summed width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.config = config.moe
        self.gate = Gate(config.hidden_size, self.config.n_routed_experts)
        self.experts = RoutedExperts(config.hidden_size, self.config)
        self.shared_experts = (
            SwiGLU(config.hidden_size, self.config.n_shared_experts * self.config.moe_intermediate_size) if self.config.n_shared_experts else None
        )

    def forward(self, x: Tensor, protected_B: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (B, T, D) -> the FFN's output (B, T, D) without the residual, and the routing of the B * T tokens.

        `protected_B` marks the sequences whose tokens are never dropped; None (evaluation) drops nothing.
        """
        flat = x.flatten(0, 1)
        routing = route(self.gate(flat), self.config)
        if protected_B is not None and self.config.capacity_factor is not None:
            routing = drop_over_capacity(routing, self.config, protected_B.repeat_interleave(x.shape[1]))
        out = self.experts(flat, routing).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, routing
