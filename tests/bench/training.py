"""A training step against transformers' and against the core's products at the model's shapes; two workers against one."""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from research.accounting import train_flops_per_token
from research.config import BalanceConfig, ModelConfig, MoEConfig
from research.model.balance import balance_losses
from research.model.kernels import native
from research.model.loss import chunked_language_loss
from research.model.transformer import Transformer
from research.presets import preset
from tests.bench.common import Seconds, interleaved, pin, reference, spread_out

RATE, WARM_UP = 2.4e-4, 2000
"""The published rate and warm-up (V2 section 3.1.2): with a larger one, Adam's first steps are signs of rounding where a gradient is nothing else."""
Product = tuple[str, str, int, int, int]
"""op(A), op(B) and m, n, k of C (m, n) = op(A) op(B)."""


@dataclass
class Ours:
    """One optimizer step as in training; the balance losses are computed, and weigh nothing."""

    model: Transformer

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)

    def __call__(self, ids: Tensor, rate: float = RATE) -> float:
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        hidden, routings = self.model.hidden(ids[:, :-1])
        language = chunked_language_loss(hidden, self.model.lm_head.weight, ids[:, 1:])
        loss, moe = language, self.model.config.moe
        for routing in routings.values():
            losses = balance_losses(routing, moe, len(ids))
            loss = loss + 0.0 * (losses.expert + losses.device + losses.communication)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(language.detach())


@dataclass
class Theirs:
    """The same step of transformers' model."""

    model: torch.nn.Module

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, fused=True)

    def __call__(self, ids: Tensor, rate: float = RATE) -> float:
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(ids[:, :-1], use_cache=False).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())


DEPTHS = {"64-experts": 10, "64-experts-shallow": 3}


def model_of(name: str) -> ModelConfig:
    """A preset, or one of `DEPTHS`: wider models of 64 experts of which 6 are chosen, 34M and 13M activated parameters."""
    if name not in DEPTHS:
        return preset(name)
    return replace(
        preset("deepseek-v2-mini"),
        hidden_size=512,
        num_hidden_layers=DEPTHS[name],
        intermediate_size=1408,
        moe=MoEConfig(
            n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=176, n_shared_experts=2, first_k_dense_replace=1,
            balance=BalanceConfig(expert=0.001),
        ),
    )  # fmt: skip


def measure_step(name: str, batch: int, length: int, rounds: int) -> dict[str, object]:
    """Seconds per step of the three, interleaved; how far their first ten losses are apart; the share of the ceiling, that of the step's own
    products and that of the products as published."""
    config = model_of(name)
    random = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, config.vocab_size, (batch, length + 1), generator=random) for _ in range(10)]
    model = spread_out(config)
    steps = {"moelab": Ours(model)} | {f"transformers {kind}": Theirs(reference(model, kind).train()) for kind in ("grouped_mm", "eager")}
    losses = {name: [step(ids, rate=RATE * i / WARM_UP) for i, ids in enumerate(batches, 1)] for name, step in steps.items()}
    apart = max(abs(a - b) / b for name in losses for a, b in zip(losses["moelab"], losses[name], strict=True))
    forms = {name: lambda step=step: step(batches[0]) for name, step in steps.items()}
    seconds, tokens = interleaved(forms, rounds), batch * length
    # Once more beside the products: the machine is another one a minute later, and these two are quick.
    alone = {name: Products(found) for name, found in products_of(forms["moelab"]).items()}
    with mock.patch("research.model.attention.expansion_pays", return_value=1.0):
        published = Products(sum(products_of(forms["moelab"]).values(), Counter()))
    peak = Products({("N", "N", 1024, 1024, 1024): 1})
    beside = interleaved({"moelab": forms["moelab"], "published": published, "peak": peak, **alone}, 3 * rounds)
    mine, as_published, at_peak = beside.pop("moelab"), beside.pop("published"), beside.pop("peak")
    ceiling = sum(beside.values())
    flops = sum(products.flops for products in alone.values())
    return {
        "model": name,
        "batch": batch,
        "length": length,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / taken for name, taken in seconds.items()},
        "times": {name: taken / seconds["moelab"] for name, taken in seconds.items() if name != "moelab"},
        "first_losses_apart": apart,
        "products_seconds": ceiling,
        "products_gflops": flops / 1e9,
        "products_share": {name: taken / mine for name, taken in beside.items()},
        "share_of_ceiling": ceiling / mine,
        "share_of_published_ceiling": as_published / mine,
        "peak_seconds": flops * at_peak / peak.flops,
        "share_of_peak": train_flops_per_token(config, length) * tokens * at_peak / peak.flops / mine,
        "published_gflops": train_flops_per_token(config, length) * tokens / 1e9,
        "rest": where_the_rest_goes(lambda: steps["moelab"](batches[0])),
    }


class _Products(TorchDispatchMode):
    """Counts torch's own products by shape."""

    def __init__(self, found: Counter[Product]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm"):
            a, b = args[-2:]
            count = a.shape[0] if name == "bmm" else 1
            ways = ["N" if x.stride(-1) == 1 else "T" for x in (a, b)]
            self.found[(*ways, a.shape[-2], b.shape[-1], a.shape[-1])] += count
        return func(*args, **(kwargs or {}))


def products_of(step) -> dict[str, Counter[Product]]:
    """Every matrix product of one step by shape: `torch`'s own, and those of the `kernels`."""
    found, inside = Counter[Product](), Counter[Product]()
    library = native.library()
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)
    blas = native.blas()

    def spy(*pointers):
        first, second = (ctypes.cast(p, ctypes.POINTER(ctypes.c_char))[0].decode() for p in pointers[:2])
        n, m, k = (ctypes.cast(p, ctypes.POINTER(ctypes.c_int))[0] for p in pointers[2:5])
        inside[(second, first, m, n, k)] += 1
        blas(*map(ctypes.c_void_p, pointers))

    watched = signature(spy)
    if library is not None:
        library.set_sgemm(ctypes.cast(watched, ctypes.c_void_p))
    try:
        with _Products(found):
            step()
    finally:
        if library is not None:
            library.set_sgemm(ctypes.cast(blas, ctypes.c_void_p))
    return {"torch": found, "kernels": inside}


class Products:
    """The same products alone, as often, each shape repeated in C on operands that lie in the cache: seconds that they take."""

    def __init__(self, found: Mapping[Product, int]) -> None:
        self.products = [(_Repeated(*shape), count) for shape, count in found.items()]
        self.flops = sum(2.0 * count * product.m * product.n * product.k for product, count in self.products)

    def __call__(self) -> Seconds:
        total = 0.0
        for product, count in self.products:
            product(1)
            began = time.perf_counter()
            product(count)
            total += time.perf_counter() - began
        return Seconds(total)


@dataclass
class _Repeated:
    """C (m, n) = op(A) op(B) on operands of its own."""

    ta: str
    tb: str
    m: int
    n: int
    k: int

    def __post_init__(self) -> None:
        self.operands = torch.randn(self.m * self.k), torch.randn(self.k * self.n), torch.empty(self.m * self.n)

    def __call__(self, times: int) -> None:
        library = native.library()
        assert library is not None, "the ceiling is measured through the compiled kernels"
        m, n, k = self.m, self.n, self.k
        a, b, c = (operand.data_ptr() for operand in self.operands)
        lda, ldb = (k if self.ta == "N" else m), (n if self.tb == "N" else k)
        library.repeat_product(self.ta.encode(), self.tb.encode(), m, n, k, a, lda, b, ldb, c, n, times)


def product_seconds(ta: str, tb: str, m: int, n: int, k: int) -> float:
    """The best of several repetitions of C (m, n) = op(A) op(B)."""
    product, times = _Repeated(ta, tb, m, n, k), max(1, int(2e8 / (2 * m * n * k + 1)))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        product(times)
        best = min(best, (time.perf_counter() - began) / times)
    return best


def where_the_rest_goes(step, rows: int = 12) -> dict[str, float]:
    """Share of a step by operation, products and all, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(4):
            step()
    events = profile.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:rows]
    return {event.key: event.self_cpu_time_total / whole for event in largest}


def measure_workers(name: str, steps: int) -> dict[str, float]:
    """Tokens per second of one pinned worker, and of two at once on two cores, interleaved."""
    alone: list[float] = []
    both: list[float] = []
    for _ in range(2):
        alone.append(sum(_workers(name, steps, [0])))
        both.append(sum(_workers(name, steps, [0, 1])))
    return {"one": sum(alone) / 2, "two": sum(both) / 2, "times": sum(both) / sum(alone)}


def _workers(name: str, steps: int, cores: list[int]) -> list[float]:
    """Each worker is a process that trains for as long as its neighbours do, and says how fast it was meanwhile."""
    started = [
        subprocess.Popen([sys.executable, "-m", "tests.bench.training", name, str(steps), str(core)], stdout=subprocess.PIPE, text=True)
        for core in cores
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1])["tokens_per_second"] for process in started]


def _worker(name: str, steps: int, core: int) -> None:
    pin(core)
    step, ids = Ours(spread_out(preset(name))), torch.randint(0, preset(name).vocab_size, (8, 257), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        step(ids)
    began = time.perf_counter()
    for _ in range(steps):
        step(ids)
    print(json.dumps({"tokens_per_second": steps * 8 * 256 / (time.perf_counter() - began), "pid": os.getpid()}))
    for _ in range(5):  # whoever is later still has company
        step(ids)


if __name__ == "__main__":
    _worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
