"""All checks and rates in one go; what fails is written down as failed, and the rest goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from research.benchmark.correctness import Check, run_checks
from research.benchmark.models import DecodeRate, TrainingRate, measure_decode, measure_training
from research.benchmark.peaks import GroupedRate, Peaks, measure_grouped, measure_peaks
from research.benchmark.plan import Plan, model_config


@dataclass(kw_only=True, slots=True)
class Measured:
    """`failures`: what could not be measured, with the reason."""

    checks: list[Check]
    peaks: Peaks
    grouped: list[GroupedRate] = field(default_factory=list)
    training: list[TrainingRate] = field(default_factory=list)
    decode: list[DecodeRate] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks) and not self.failures


def measure(device: torch.device, plan: Plan, announce: Callable[[str], None]) -> Measured:
    """Correctness first: a rate of wrong numbers is none.  RuntimeError when not even the peaks can be measured."""
    announce("correctness")
    checks = run_checks(device)
    announce("peaks of products and of memory")
    found = Measured(checks=checks, peaks=measure_peaks(device, size=plan.product_size, copy_bytes=plan.copy_bytes, repeats=plan.repeats))
    for tokens in plan.tokens_per_expert:
        with _noting(found, f"grouped product, {tokens} tokens per expert", announce):
            found.grouped.append(measure_grouped(device, found.peaks, plan.grouped, tokens, repeats=plan.repeats))
    for name, (batch, length) in plan.training.items():
        with _noting(found, f"training {name}", announce):
            found.training.append(measure_training(name, model_config(name), device, found.peaks, batch, length, repeats=plan.repeats))
    for name in plan.decode:
        with _noting(found, f"decoding {name}", announce):
            places = (plan.contexts, plan.decode_steps)
            found.decode += measure_decode(name, model_config(name), device, found.peaks, *places, repeats=plan.repeats)
    return found


@contextmanager
def _noting(found: Measured, what: str, announce: Callable[[str], None]) -> Iterator[None]:
    """torch says with a RuntimeError that a kernel does not exist, that memory is spent, or that a card gave up."""
    announce(what)
    try:
        yield
    except (RuntimeError, ValueError, NotImplementedError) as error:
        found.failures.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
