"""The DeepSeekMoE layer (V2 section 2.2): h' = u + shared(u) + sum of the gated routed experts."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.config import ModelConfig
from research.model.experts import RoutedExperts
from research.model.kernels import functions, native
from research.model.layers import FeedForward, at_least_float32, autocast_on, few_rows
from research.model.router import Decided, Routing, drop, hash_table, route, route_by_hash
from research.parallel.world import ALONE, World


class Gate(nn.Module):
    """Expert centroids e_i, (E, D): logits are u . e_i, in float32 at least whatever the model's precision."""

    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))

    def forward(self, x_MD: Tensor) -> Tensor:
        if not autocast_on(x_MD):
            return F.linear(at_least_float32(x_MD), at_least_float32(self.weight))
        with torch.autocast(x_MD.device.type, enabled=False):
            return F.linear(at_least_float32(x_MD), at_least_float32(self.weight))


class MoE(nn.Module):
    """Gate (or hash), routed experts and shared experts; the shared ones are one FFN of their summed width."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.config, self.layer = config.moe, layer
        self.world: World = ALONE
        hashed = self.config.selection == "hash"
        self.gate = None if hashed else Gate(config.hidden_size, self.config.n_routed_experts)
        self.register_buffer("table", hash_table(config.vocab_size, self.config, layer) if hashed else None, persistent=False)
        self.experts = RoutedExperts(config.hidden_size, self.config, config.activation)
        width = self.config.n_shared_experts * self.config.moe_intermediate_size
        self.shared_experts = (
            FeedForward(config.hidden_size, width, config.activation, gated=self.config.gated_experts) if self.config.n_shared_experts else None
        )

    def forward(
        self,
        x: Tensor,
        ids: Tensor,
        protected_B: Tensor | Decided | None = None,
        chance: torch.Generator | None = None,
        onto: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """x (B, T, D) of tokens ids (B, T) -> the FFN's output (B, T, D), added to `onto`, and the routing of the B * T tokens.

        `protected_B` turns dropping on and marks the sequences that a device's budget spares; None (evaluation) drops nothing,
        and `Decided` what was decided before, chance included.
        """
        flat = x.flatten(0, 1)
        if self.gate is None:
            assert isinstance(self.table, Tensor)
            routing = route_by_hash(ids.flatten(), self.table, self.config, at_least_float32(flat).dtype)
        else:
            routing = route(self.gate(flat), self.config, None if isinstance(protected_B, Decided) else chance, self.world)
        if isinstance(protected_B, Decided):
            routing = protected_B.apply(routing, self.layer)
        elif protected_B is not None:
            routing = drop(routing, self.config, protected_B.repeat_interleave(x.shape[1]), self.world)
        shared = self.shared_experts
        if shared is not None and self._fused(x, shared):
            base = None if onto is None else onto.flatten(0, 1)
            weights = shared.weights(), (self.experts.gate_up_proj, self.experts.down_proj)
            out = functions.sparse_feed_forward(flat, routing.gates_MK, routing.expert_ids_MK, routing.kept_MK, *weights, base)
            return out.view_as(x), routing
        finish = self.experts.begin(flat, routing)  # with several workers: the tokens travel meanwhile
        if shared is not None:
            onto = shared(x, onto)
        out = finish().view_as(x)
        return out if onto is None else onto + out, routing

    def _fused(self, x: Tensor, shared: FeedForward) -> bool:
        """Whether shared and routed experts are one function of the kernels: SwiGLU, all of them here, and not few tokens."""
        here = isinstance(self.experts, RoutedExperts) and self.config.gated_experts and shared.activation is F.silu
        return here and not few_rows(x) and native.usable(x, *shared.weights(), self.experts.gate_up_proj, self.experts.down_proj)
