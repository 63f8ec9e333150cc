"""The routed experts: tokens sorted by expert once, then one grouped product per projection."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from research.config import Activation, MoEConfig
from research.model.kernels import functions, native
from research.model.layers import ACTIVATIONS, autocast_on
from research.model.router import Routing


class RoutedExperts(nn.Module):
    """E gated experts (SwiGLU with `silu`) of width F, held as two tensors.

    gate_up_proj (E, 2F, D) holds each expert's gate rows, then its up rows ((E, F, D), up rows only, where
    experts are not gated); down_proj (E, D, F).
    """

    def __init__(self, hidden_size: int, config: MoEConfig, activation: Activation = "silu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, (2 if config.gated_experts else 1) * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x_MD: Tensor, routing: Routing) -> Tensor:
        """sum over the kept choices of gate * expert(x): (M, D) -> (M, D)."""
        return grouped_experts(x_MD, routing, self.gate_up_proj, self.down_proj, self.activation)

    def begin(self, x_MD: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """`forward` in two halves, as `research.parallel.exchange.ParallelExperts` has them; here all is done in the first."""
        out = self(x_MD, routing)
        return lambda: out


def grouped_experts(
    x_MD: Tensor,
    routing: Routing,
    gate_up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor] = F.silu,
    *,
    assignments: int | None = None,
) -> Tensor:
    """The fast form: assignments sorted by expert once, one grouped product per projection, without waiting for a GPU.

    The gate is applied to the hidden activations, the narrowest place of the path.  `assignments`: how many choices are kept, where
    the caller knows it; the others then cost nothing on a GPU either.
    """
    gated = gate_up.shape[1] == 2 * down.shape[-1]
    if gated and activation is F.silu and native.usable(x_MD, routing.gates_MK, gate_up, down):
        return functions.routed_experts(x_MD, routing.gates_MK, routing.expert_ids_MK, routing.kept_MK, gate_up, down)
    experts, (tokens, chosen) = gate_up.shape[0], routing.expert_ids_MK.shape
    expert = routing.expert_ids_MK.flatten()
    if assignments is None and x_MD.device.type == "cpu":
        assignments = int(routing.kept_MK.sum())  # elsewhere it would wait for the device: dropped ones are computed there, and weigh 0
    if assignments is None:
        assignments = tokens * chosen
    else:
        expert = torch.where(routing.kept_MK.flatten(), expert, experts)
    order = expert.argsort(stable=True)[:assignments]
    ends = torch.searchsorted(expert[order], torch.arange(experts, device=expert.device), right=True)
    rows = x_MD.index_select(0, order // chosen).to(_product_dtype(x_MD))
    hidden = _grouped_product(rows, gate_up, ends)
    gates = routing.gates_MK.flatten().index_select(0, order)[:, None].to(hidden.dtype)
    out = _grouped_product(_activate(hidden, down.shape[-1], activation) * gates, down, ends).to(x_MD.dtype)
    # Summed over a token's choices in their order, not as they come: on a GPU too, the same sums twice.
    return out.new_zeros(tokens * chosen, out.shape[1]).index_copy(0, order, out).view(tokens, chosen, -1).sum(1)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's precision where it is on, which does not know the grouped product."""
    return torch.get_autocast_dtype(x.device.type) if autocast_on(x) else x.dtype


def _activate(hidden: Tensor, width: int, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """act(gate) * up of (..., 2F), act(up) of (..., F)."""
    if hidden.shape[-1] == width:
        return activation(hidden)
    gate, up = hidden.chunk(2, -1)
    return activation(gate) * up


def _grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows (A, in) sorted by expert, weight (E, out, in), ends (E,) cumulative loads -> (A, out)."""
    aligned = rows.shape[-1] * rows.element_size() % 16 == 0 and weight.shape[1] * rows.element_size() % 16 == 0
    kernel = (torch.float32, torch.bfloat16) if rows.device.type == "cpu" else (torch.bfloat16,)
    if aligned and rows.shape[0] and rows.dtype in kernel:
        return F.grouped_mm(rows, weight.to(rows.dtype).transpose(1, 2), offs=ends.to(torch.int32))
    # Odd widths do not meet the kernel's 16-byte strides, and it knows no float64.
    starts = [0, *ends.tolist()]
    return torch.cat([rows[a:b] @ weight[e].to(rows.dtype).T for e, (a, b) in enumerate(itertools.pairwise(starts))])


def looped_experts(x_MD: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """The slow twin and specification: one token and one choice at a time."""
    rows = []
    for token in range(x_MD.shape[0]):
        total = torch.zeros_like(x_MD[token])
        for choice in range(routing.expert_ids_MK.shape[1]):
            if not routing.kept_MK[token, choice]:
                continue
            expert = int(routing.expert_ids_MK[token, choice])
            hidden = gate_up[expert] @ x_MD[token]
            width = down.shape[-1]
            hidden = activation(hidden[:width]) * hidden[width:] if len(hidden) > width else activation(hidden)
            total = total + routing.gates_MK[token, choice] * (down[expert] @ hidden)
        rows.append(total)
    return torch.stack(rows)
