"""Tokens to the workers of their experts and back: each token once to each worker that it needs, so that M bounds what is sent.

A collective is begun and ended apart, forward and backward, so that what lies between (the shared experts) overlaps it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from research.model.experts import RoutedExperts, grouped_experts
from research.model.router import Routing
from research.parallel import traffic
from research.parallel.world import World


class Plan(NamedTuple):
    """Which of its M tokens a worker sends where: S rows, sorted by destination, then by token.

    token_S: the token of each row; slot_S: how manieth destination of its token the row is (0 up); to_S: the destination.
    send, receive: rows to and from each of the P workers.
    """

    token_S: Tensor
    slot_S: Tensor
    to_S: Tensor
    send: list[int]
    receive: list[int]


@dataclass(slots=True, eq=False)
class _Transfer:
    """One all-to-all of rows: who gets how many, what it is called, and what is under way."""

    world: World
    layer: int
    phase: str
    back: str
    send: list[int]
    receive: list[int]
    under_way: Any = None
    came_back: Any = None
    """(gradient rows, handle) of the backward pass."""

    def start(self, rows: Tensor, phase: str, send: list[int], receive: list[int]) -> tuple[Tensor, Any]:
        rows = rows.contiguous()
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        width = rows[0].numel() * rows.element_size() if len(rows) else 0
        self.world.ledger.add(self.world.step, self.layer, phase, [count * width for count in send])
        handle = self.world.run(
            lambda: dist.all_to_all_single(out, rows, receive, send, group=self.world.expert_group, async_op=True), self.name(phase)
        )
        return out, handle

    def wait(self, handle: Any, phase: str) -> None:
        self.world.run(handle.wait, self.name(phase))

    def name(self, phase: str) -> str:
        return f"the {phase} of layer {self.layer}"


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        out, transfer.under_way = transfer.start(rows, transfer.phase, transfer.send, transfer.receive)
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        (rows, handle), transfer.came_back = transfer.came_back, None
        transfer.wait(handle, transfer.back)
        return rows, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.wait(transfer.under_way, transfer.phase)
        transfer.under_way = None
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        transfer = ctx.transfer
        transfer.came_back = transfer.start(gradients[0], transfer.back, transfer.receive, transfer.send)
        return gradients[0], None


def plan(routing: Routing, world: World, experts_per_worker: int, layer: int) -> Plan:
    """From the kept choices; the counts are told to the others (8 bytes to each)."""
    workers = world.expert_parallel
    needed_MP = torch.zeros(len(routing.expert_ids_MK), workers, dtype=torch.bool, device=routing.expert_ids_MK.device)
    worker_MK = routing.expert_ids_MK // experts_per_worker
    for choice in range(worker_MK.shape[1]):
        needed_MP |= torch.nn.functional.one_hot(worker_MK[:, choice], workers).bool() & routing.kept_MK[:, choice, None]
    to_S, token_S = needed_MP.T.nonzero(as_tuple=True)
    slot_S = (needed_MP.long().cumsum(1) - 1)[token_S, to_S]
    send = needed_MP.sum(0)
    receive = torch.empty_like(send)
    world.ledger.add(world.step, layer, traffic.METADATA, [8] * workers)
    world.run(lambda: dist.all_to_all_single(receive, send, group=world.expert_group), f"the counts of layer {layer}")
    return Plan(token_S, slot_S, to_S, send.tolist(), receive.tolist())


class ParallelExperts(nn.Module):
    """This worker's E / P of a layer's routed experts, under the names and with the layout of `RoutedExperts`."""

    def __init__(self, whole: RoutedExperts, world: World, layer: int) -> None:
        """ValueError if the workers do not divide the experts."""
        super().__init__()
        experts = len(whole.gate_up_proj)
        if experts % world.expert_parallel:
            raise ValueError(f"{experts} experts cannot be shared out among {world.expert_parallel} workers")
        self.world, self.layer, self.activation = world, layer, whole.activation
        self.per_worker = experts // world.expert_parallel
        self.gate_up_proj, self.down_proj = (nn.Parameter(self.own(w.detach()).clone()) for w in (whole.gate_up_proj, whole.down_proj))

    def own(self, whole: Tensor) -> Tensor:
        """The rows of this worker's experts in a tensor (E, ...)."""
        return whole[self.world.expert_rank * self.per_worker :][: self.per_worker]

    def begin(self, x_MD: Tensor, routing: Routing) -> Callable[[], Tensor]:
        """Sends the tokens off; the function that comes back waits for them, computes, and returns what `RoutedExperts` would, (M, D)."""
        there = plan(routing, self.world, self.per_worker, self.layer)
        if self.world.ledger.witness and torch.is_grad_enabled():
            ids = torch.where(routing.kept_MK, routing.expert_ids_MK, -1)
            self.world.ledger.route(self.world.step, self.layer, ids.cpu().numpy())
        kind = "" if torch.is_grad_enabled() else traffic.EVALUATION
        tokens = self._transfer(traffic.DISPATCH + kind, traffic.DISPATCH_BACKWARD, there.send, there.receive)
        gates = self._transfer(traffic.METADATA + kind, traffic.METADATA_BACKWARD, there.send, there.receive)
        here_SK = (routing.expert_ids_MK // self.per_worker)[there.token_S] == there.to_S[:, None]
        here_SK &= routing.kept_MK[there.token_S]
        ids_SK = torch.where(here_SK, routing.expert_ids_MK[there.token_S] - there.to_S[:, None] * self.per_worker, -1)
        sent_gates = routing.gates_MK.index_select(0, there.token_S) * here_SK
        ids, ids_handle = gates.start(ids_SK.to(torch.int32), gates.phase, there.send, there.receive)
        gates_R = _Begin.apply(sent_gates, gates)
        rows_R = _Begin.apply(x_MD.index_select(0, there.token_S), tokens)

        def finish() -> Tensor:
            gates.wait(ids_handle, gates.phase)
            weights, rows = _End.apply(gates_R, gates), _End.apply(rows_R, tokens)
            out = self._compute(rows, ids, weights)
            back = self._transfer(traffic.COMBINE + kind, traffic.COMBINE_BACKWARD, there.receive, there.send)
            returned = _End.apply(_Begin.apply(out, back), back)
            slots = min(routing.expert_ids_MK.shape[1], self.world.expert_parallel)
            parts = returned.new_zeros(len(x_MD) * slots, x_MD.shape[1])
            # A token's parts are added in the order of its workers, not as they come: the same sums twice.
            return parts.index_copy(0, there.token_S * slots + there.slot_S, returned).view(len(x_MD), slots, -1).sum(1)

        return finish

    def _transfer(self, phase: str, back: str, send: list[int], receive: list[int]) -> _Transfer:
        return _Transfer(self.world, self.layer, phase, back, send, receive)

    def _compute(self, rows: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        if not len(rows):
            return rows + gates.sum() * 0  # nothing to do, but the way back is waited for by the others
        kept = ids >= 0
        routing = Routing(ids.clamp(min=0).long(), gates, rows.new_zeros(len(rows), self.per_worker), kept)
        return grouped_experts(rows, routing, self.gate_up_proj, self.down_proj, self.activation, assignments=int(kept.sum()))


def spread_experts(model: nn.Module, world: World) -> None:
    """Leave each MoE layer of a Transformer, in place, this worker's experts only, and tell it of the others."""
    from research.model.moe import MoE  # noqa: PLC0415  (moe knows the world, the world not the model)

    for layer, block in enumerate(model.layers if world.size > 1 else ()):  # type: ignore[arg-type]
        if isinstance(block.mlp, MoE):
            block.mlp.experts = ParallelExperts(block.mlp.experts, world, layer)  # type: ignore[assignment]
            block.mlp.world = world
