"""Who is who among the workers of one run, and the collectives between them, each with a name should it not end.

Ranks r P to r P + P - 1 hold the routed experts of replica r between them (P = `expert_parallel`); everything else is held
by all.  `ALONE` is the world of a run in one process, in which every method is the identity.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from research.config import RunConfig
from research.errors import CollectiveFailed, ConfigError
from research.parallel.sharing import sharing_problems
from research.parallel.traffic import Ledger

T = TypeVar("T")
# torch renamed the two; the old names warn at every call.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
GRACE_SECONDS = 3.0
"""After a collective failed: how long the others have to say that they noticed, too."""


@dataclass(slots=True, eq=False)
class World:
    """`rank` of `size` workers."""

    rank: int = 0
    size: int = 1
    expert_parallel: int = 1
    """P: workers that share the routed experts of one replica out."""
    timeout_seconds: float = 600.0
    expert_group: Any = None
    replica_group: Any = None
    """Workers that hold the same experts in different replicas."""
    store: Any = None
    ledger: Ledger = field(default_factory=Ledger)
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds in the collectives of training steps by what they are for, without the layer."""
    step: int = 0
    steps: int = 0
    """Training steps that are in `waited`."""
    training: bool = False

    @property
    def expert_rank(self) -> int:
        """Which part of the experts this worker holds, 0 to P - 1."""
        return self.rank % self.expert_parallel

    @property
    def replicas(self) -> int:
        return self.size // self.expert_parallel

    def check(self, config: RunConfig) -> None:
        """ConfigError if this many workers cannot share the run out."""
        if problems := sharing_problems(config, self.size, self.expert_parallel):
            raise ConfigError(*problems)

    # Rows of a batch

    def share(self, rows: Tensor) -> Tensor:
        """This worker's equal, contiguous share of rows that all of them have."""
        if self.size == 1:
            return rows
        count = len(rows) // self.size
        return rows[self.rank * count : (self.rank + 1) * count]

    def padded_share(self, rows: Tensor) -> Tensor:
        """The same where the rows need not go around: the last one is repeated as often as it takes."""
        if self.size == 1:
            return rows
        lacking = -len(rows) % self.size
        return self.share(torch.cat([rows, rows[-1:].expand(lacking, *rows.shape[1:])]) if lacking else rows)

    def gather(self, rows: Tensor, name: str = "gathering") -> Tensor:
        """The rows of all workers, in the order of the ranks; each has equally many.  No gradient passes."""
        if self.size == 1:
            return rows
        sent = rows.detach().contiguous()
        sent = sent.to(torch.uint8) if sent.dtype == torch.bool else sent
        out = sent.new_empty(self.size * sent.shape[0], *sent.shape[1:])
        self.run(lambda: all_gather(out, sent), name)
        return out.to(rows.dtype)

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """`count` uniform numbers of this worker, out of those that one worker with all rows would draw."""
        drawn = torch.rand(count * self.size, generator=generator, device=device)
        return drawn[self.rank * count : (self.rank + 1) * count]

    # Sums

    def mean(self, values: Tensor, name: str = "averaging") -> Tensor:
        """Over the workers, without gradient."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        self.run(lambda: dist.all_reduce(total), name)
        return total / self.size

    def begin_step(self, step: int) -> None:
        self.step, self.training = step, True
        self.steps += 1

    def end_step(self) -> None:
        self.training = False

    def seconds_per_step(self) -> float:
        """Of this worker in collectives, since it was last asked."""
        seconds = sum(self.waited.values()) / max(self.steps, 1)
        self.waited.clear()
        self.steps = 0
        return seconds

    def mean_of(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Of numbers by name, which all workers have under the same names."""
        if self.size == 1 or not metrics:
            return dict(metrics)
        values = self.mean(torch.tensor(list(metrics.values()), dtype=torch.float64, device=self._device()), "averaging the metrics")
        return dict(zip(metrics, values.tolist(), strict=True))

    def gather_objects(self, value: T) -> list[T]:
        """Everyone's, in the order of the ranks: for what is small and rare."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self.run(lambda: dist.all_gather_object(found, value), "gathering what was counted")
        return found

    def agree(self, flag: bool) -> bool:
        """What rank 0 says."""
        if self.size == 1:
            return flag
        said = torch.tensor([int(flag)], dtype=torch.int64, device=self._device())
        self.run(lambda: dist.broadcast(said, 0), "agreeing whether to stop")
        return bool(said.item())

    def _device(self) -> str:
        return "cuda" if dist.get_backend() == "nccl" else "cpu"

    def run(self, collective: Callable[[], T], name: str) -> T:
        """A collective (begun, or waited for); CollectiveFailed says which one, at which step, and who was not there."""
        began = time.perf_counter()
        try:
            return collective()
        except RuntimeError as error:
            timed_out = "imed out" in str(error) or "imeout" in str(error)
            raise CollectiveFailed(self._who_is_missing(name, error, timed_out), timed_out=timed_out) from error
        finally:
            if self.training:
                self.waited[name.partition(" of layer")[0]] += time.perf_counter() - began

    def _who_is_missing(self, name: str, error: RuntimeError, timed_out: bool) -> str:
        text = str(error).strip().splitlines()[0]
        what = f"did not end within {self.timeout_seconds:g} s" if timed_out else "failed"
        where = f"rank {self.rank} of {self.size}: {name} of step {self.step} {what}"
        missing: list[int] = []
        try:
            self.store.set(f"noticed/{self.rank}", name)
            until = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < until:
                missing = [r for r in range(self.size) if not self.store.check([f"noticed/{r}"])]
                if not missing:
                    break
                time.sleep(0.05)
        except Exception:  # the store is gone with the worker that kept it
            return f"{where}; rank 0, which keeps the rendezvous, does not answer ({text})"
        if missing:
            return f"{where}; it waited for rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} ({text})"
        return f"{where} ({text})"


ALONE = World()


def join(
    rank: int,
    size: int,
    *,
    address: str,
    expert_parallel: int | None = None,
    backend: str | None = None,
    timeout_seconds: float = 600.0,
    store: Any = None,
) -> World:
    """Meet the other workers at `address` (host:port, kept by rank 0) and agree on groups.

    backend: nccl with a GPU per worker, gloo otherwise.  expert_parallel: P, by default all workers; ConfigError if it does not
    divide them, CollectiveFailed if they do not meet within the time limit.
    """
    parts = expert_parallel or size
    if size % parts:
        raise ConfigError(f"expert_parallel={parts} must divide the {size} workers of the run")
    limit = timedelta(seconds=timeout_seconds)
    try:
        if store is None:
            host, _, port = address.rpartition(":")
            store = dist.TCPStore(host, int(port), size, is_master=rank == 0, timeout=limit)
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        experts, replica = _groups(rank, size, parts, limit)
    except RuntimeError as error:
        what = f"rank {rank} of {size}: the workers did not all meet at {address} within {timeout_seconds:g} s"
        raise CollectiveFailed(f"{what} ({str(error).strip().splitlines()[0]})") from error
    return World(rank, size, parts, timeout_seconds, experts, replica, dist.PrefixStore("moelab", store), Ledger(parts))


def _groups(rank: int, size: int, parts: int, limit: timedelta) -> tuple[Any, Any]:
    """Of this worker: those that share a replica's experts out, and those that hold the same ones."""
    experts = replica = None
    # Every worker takes part in making every group.
    for first in range(0, size, parts):
        group = dist.new_group(range(first, first + parts), timeout=limit)
        experts = group if first <= rank < first + parts else experts
    for part in range(parts):
        group = dist.new_group(range(part, size, parts), timeout=limit)
        replica = group if rank % parts == part else replica
    return experts, replica


def leave() -> None:
    """End the process group; a worker whose neighbours are gone says nothing more."""
    with suppress(Exception):
        dist.destroy_process_group()
