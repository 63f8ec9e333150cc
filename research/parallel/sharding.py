"""Gradients reduced in buckets while the backward pass goes on, and AdamW's state shared out over the workers (ZeRO-1).

Rajbhandari et al. 2020: each worker updates the slice of the parameters whose moments it keeps, and all gather the result.
What is held by all workers is sharded over all of them, routed experts over the replicas that hold the same ones.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from research.parallel.exchange import ParallelExperts
from research.parallel.world import World, all_gather, reduce_scatter

BUCKET_ELEMENTS = 2**22
"""Elements of one reduction: 16 MB in float32, enough that its latency does not count."""


class Bucket:
    """Parameters of one kind (same decay, rate and group) laid out one after the other in one buffer, of which this worker owns a slice."""

    def __init__(self, parameters: list[nn.Parameter], group: Any, workers: int, rank: int) -> None:
        self.group, self.workers, self.parameters = group, workers, parameters
        count = sum(p.numel() for p in parameters)
        size = -(-count // workers)
        like = parameters[0]
        self.values, self.gradients = (torch.zeros(size * workers, dtype=like.dtype, device=like.device) for _ in range(2))
        self.places: list[tuple[int, int]] = []
        at = 0
        for p in parameters:
            end = at + p.numel()
            self.values[at:end].copy_(p.detach().reshape(-1))
            p.data = self.values[at:end].view_as(p)
            p.grad = self.gradients[at:end].view_as(p)
            self.places.append((at, end))
            at = end
        self.slice = slice(rank * size, (rank + 1) * size)
        self.own = nn.Parameter(self.values[self.slice])
        self.own.grad = self.gradients[self.slice]
        self.waiting = 0
        """Parameters whose gradient of the last micro-batch has not come yet."""
        self.handle: Any = None

    def reduce(self, world: World) -> None:
        """Begin: sum the gradients of all workers; each needs its own slice only."""
        if self.workers > 1:
            # In place: gloo and nccl both allow the output to be a slice of the input.
            out = torch.empty_like(self.gradients[self.slice])
            self.handle = (
                world.run(lambda: reduce_scatter(out, self.gradients, group=self.group, async_op=True), "the reduction of the gradients"),
                out,
            )

    def finish(self, world: World) -> None:
        if self.handle is not None:
            handle, out = self.handle
            world.run(handle.wait, "the reduction of the gradients")
            self.gradients[self.slice].copy_(out)
            self.handle = None

    def gather(self, world: World) -> None:
        """The updated slices of all workers."""
        if self.workers > 1:
            mine = self.own.detach().clone()
            world.run(lambda: all_gather(self.values, mine, group=self.group), "gathering the updated weights")

    def whole(self, part: Tensor, world: World) -> list[Tensor]:
        """One tensor per parameter of what every worker keeps of its slice, such as a moment."""
        full = part.new_empty(self.values.numel())
        if self.workers > 1:
            world.run(lambda: all_gather(full, part.contiguous(), group=self.group), "gathering the optimizer's state")
        else:
            full.copy_(part)
        return [full[a:b].view_as(p) for (a, b), p in zip(self.places, self.parameters, strict=True)]


class ShardedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` over this worker's slices: the same groups and the same update, with `reduce` before and a gathering after it."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], world: World, **settings: Any) -> None:
        self.world = world
        experts = {id(p) for module in model.modules() if isinstance(module, ParallelExperts) for p in module.parameters()}
        self.buckets: list[Bucket] = []
        sliced: list[dict[str, Any]] = []
        for group in groups:
            kinds = (
                ([p for p in group["params"] if id(p) not in experts], None, world.size, world.rank),
                ([p for p in group["params"] if id(p) in experts], world.replica_group, world.replicas, world.rank // world.expert_parallel),
            )
            made = [Bucket(part, *where) for parameters, *where in kinds for part in _split(parameters)]
            self.buckets += made
            sliced.append({**group, "params": [bucket.own for bucket in made]})
        super().__init__([group for group in sliced if group["params"]], **settings)
        # All workers of a group begin its reductions in the same order, whatever the order in which gradients come.
        self.queues: list[list[Bucket]] = []
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The buffers stay: gradients are views of them."""
        for bucket in self.buckets:
            bucket.gradients.zero_()

    def last_pass(self) -> None:
        """From here on a bucket is reduced as soon as all its gradients have come (before the last micro-batch of a step)."""
        for bucket in self.buckets:
            bucket.waiting = len(bucket.parameters)
        self.queues = [[b for b in self.buckets if b.group is None], [b for b in self.buckets if b.group is not None]]

    def _arrived(self, bucket: Bucket) -> None:
        bucket.waiting -= 1
        for queue in self.queues:
            while queue and queue[0].waiting <= 0:
                queue.pop(0).reduce(self.world)

    def reduce(self) -> None:
        """Wait for the reductions; a parameter that got no gradient (experts without a token) has held its bucket back until now."""
        for queue in self.queues:
            for bucket in queue:
                bucket.reduce(self.world)
        self.queues = []
        for bucket in self.buckets:
            bucket.finish(self.world)

    def norm(self) -> Tensor:
        """Euclidean norm of the whole gradient: the workers' slices are disjoint and together all of it."""
        own = torch.stack([bucket.own.grad.square().sum() for bucket in self.buckets if bucket.own.grad is not None]).sum()
        return (self.world.mean(own, "the norm of the gradients") * self.world.size).sqrt()

    def clip(self, bound: float, norm: Tensor) -> None:
        torch.nn.utils.clip_grads_with_norm_([bucket.own for bucket in self.buckets], bound, norm)

    def step(self, closure: Any = None) -> Any:
        """Update the own slices, then gather those of the others."""
        loss = super().step(closure)
        with torch.no_grad():
            for bucket in self.buckets:
                bucket.gather(self.world)
        return loss

    # Checkpoints hold whole tensors under the model's names, whatever the number of workers.

    def moments(self, names: Mapping[nn.Parameter, str], model: nn.Module) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq of every parameter, experts joined; every worker has to take part."""
        found: dict[str, Tensor] = {}
        for bucket in self.buckets:
            for key in ("exp_avg", "exp_avg_sq"):
                part = self.state[bucket.own].get(key, torch.zeros_like(bucket.own))
                for parameter, tensor in zip(bucket.parameters, bucket.whole(part, self.world), strict=True):
                    found[f"{names[parameter]}.{key}"] = tensor
        return join_experts(found, model, self.world)

    def take(self, names: Mapping[nn.Parameter, str], moments: Mapping[str, Tensor], model: nn.Module, step: int) -> None:
        """Back from whole tensors; the values of the parameters have been loaded already."""
        own = own_experts(moments, model)
        for bucket in self.buckets:
            state: dict[str, Tensor] = {"step": torch.tensor(float(step), device=bucket.own.device if bucket.own.is_cuda else "cpu")}
            for key in ("exp_avg", "exp_avg_sq"):
                full = torch.zeros_like(bucket.values)
                for (a, b), parameter in zip(bucket.places, bucket.parameters, strict=True):
                    full[a:b].copy_(own[f"{names[parameter]}.{key}"].reshape(-1))
                state[key] = full[bucket.slice].clone()
            self.state[bucket.own] = state


def _split(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """In buckets, last parameters first: the order in which the backward pass is done with them."""
    parts: list[list[nn.Parameter]] = []
    size = BUCKET_ELEMENTS
    for parameter in reversed(parameters):
        if size + parameter.numel() > BUCKET_ELEMENTS:
            parts.append([])
            size = 0
        parts[-1].append(parameter)
        size += parameter.numel()
    return parts


def _expert_names(model: nn.Module) -> dict[str, ParallelExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ParallelExperts)}


def join_experts(tensors: Mapping[str, Tensor], model: nn.Module, world: World) -> dict[str, Tensor]:
    """Tensors by name, those of experts (`layers.1.mlp.experts.down_proj...`) joined over the workers that share them out."""
    owners = _expert_names(model)
    joined = {}
    for name, tensor in tensors.items():
        if any(name.startswith(f"{owner}.") for owner in owners) and world.expert_parallel > 1:
            out = tensor.new_empty(world.expert_parallel * tensor.shape[0], *tensor.shape[1:])
            own = tensor.detach().contiguous()
            world.run(partial(all_gather, out, own, group=world.expert_group), "gathering the experts")
            joined[name] = out
        else:
            joined[name] = tensor
    return joined


def own_experts(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The other way: of whole tensors, this worker's experts."""
    owners = _expert_names(model)
    return {name: next((module.own(t) for owner, module in owners.items() if name.startswith(f"{owner}.")), t) for name, t in tensors.items()}
