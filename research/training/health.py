"""Is the run well?  Divergence, experts that nobody uses, and memory that is not there."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from research.errors import OutOfMemory
from research.model.router import Routing

WORSE = 1.5
PATIENCE = 100
"""A run has diverged when its loss was above WORSE times the worse of ln V (knowing nothing) and its own first loss in
PATIENCE steps in a row.  No run that learns does that: it begins at its first loss, and a spike that heals falls below
the bound within a few dozen steps.  A loss that stays above it is that of a model sure of the wrong tokens."""

DEAD_AFTER = 10
"""Records in a row without a token, after which an expert counts as dead."""


class Diverged(Exception):
    """The step that was about to be taken would not have helped; the weights are those before it."""


@dataclass(slots=True)
class Health:
    """What has to be remembered from step to step, and so is part of a checkpoint."""

    first_loss: float | None = None
    worse_steps: int = 0
    """Steps in a row with a loss above the bound."""
    idle: dict[int, dict[int, int]] = field(default_factory=dict)
    """Layer -> expert -> records in a row without a token; only those with one at least."""
    warned: dict[int, list[int]] = field(default_factory=dict)
    """Layer -> experts of which it was said that they are dead."""
    warnings: list[str] = field(default_factory=list)

    def check_step(self, model: nn.Module, step: int, loss: float, gradient_norm: float, vocab_size: int) -> None:
        """Diverged, with the largest gradient by layer, if loss or gradient is not finite or the loss has been too high for too long.

        To be called with the gradients in place and before they are used.
        """
        if not math.isfinite(loss + gradient_norm):
            raise Diverged(f"loss {loss} with gradient norm {gradient_norm} at step {step}; {largest_gradients(model)}")
        if self.first_loss is None:
            self.first_loss = loss
        bound = WORSE * max(math.log(vocab_size), self.first_loss)
        self.worse_steps = self.worse_steps + 1 if loss > bound else 0
        if self.worse_steps >= PATIENCE:
            raise Diverged(
                f"loss {loss:.4g} at step {step}, and above {bound:.4g} ({WORSE:g} times what a model that knows nothing or this one's first "
                f"step has) for {PATIENCE} steps; gradient norm {gradient_norm:.4g}; {largest_gradients(model)}"
            )

    def check_experts(self, loads: Mapping[int, list[int]], step: int) -> tuple[int, list[str]]:
        """Of a record's tokens per expert by layer: how many experts are dead now, and a warning for each layer in which new ones are."""
        dead, said = 0, list[str]()
        for layer, load in loads.items():
            before = self.idle.get(layer, {})
            idle = {expert: before.get(expert, 0) + 1 for expert, tokens in enumerate(load) if not tokens}
            self.idle[layer] = idle
            gone = [expert for expert, records in idle.items() if records >= DEAD_AFTER]
            dead += len(gone)
            if new := [expert for expert in gone if expert not in self.warned.get(layer, [])]:
                self.warned[layer] = sorted([*self.warned.get(layer, []), *new])
                names = ", ".join(map(str, new))
                said.append(
                    f"warning: layer {layer}: expert{'s' * (len(new) > 1)} {names}: no token in the last {DEAD_AFTER} records, at step {step}"
                )
        self.warnings += said
        return dead, said

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which `from_dict` reads back."""
        return {
            "first_loss": self.first_loss,
            "worse_steps": self.worse_steps,
            "idle": {str(layer): [list(item) for item in idle.items()] for layer, idle in self.idle.items()},
            "warned": {str(layer): experts for layer, experts in self.warned.items()},
            "warnings": self.warnings,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Health":
        return cls(
            first_loss=value["first_loss"],
            worse_steps=value["worse_steps"],
            idle={int(layer): dict(idle) for layer, idle in value["idle"].items()},
            warned={int(layer): list(experts) for layer, experts in value["warned"].items()},
            warnings=list(value["warnings"]),
        )


def largest_gradients(model: nn.Module, layers: int = 4) -> str:
    """`largest gradient by layer: layers.1 (mlp.gate.weight 3.1e+04), ...`: of the `layers` layers with the largest, not-finite ones first."""
    norms: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found = re.match(r"(layers\.\d+)\.(.+)", name)
            layer, rest = (found[1], found[2]) if found else (name, "")
            norms[layer].append((float(parameter.grad.detach().double().norm()), rest))

    def size(item: tuple[float, str]) -> float:
        return item[0] if math.isfinite(item[0]) else math.inf

    largest = sorted(((layer, max(found, key=size)) for layer, found in norms.items()), key=lambda pair: -size(pair[1]))
    broken = sum(not math.isfinite(norm) for _, (norm, _) in largest)
    said = ", ".join(f"{layer} ({rest + ' ' if rest else ''}{norm:.3g})" for layer, (norm, rest) in largest[:layers])
    return f"largest gradient by layer: {said}" + (f"; not finite in {broken} of {len(largest)}" if broken else "")


@torch.no_grad()
def expert_loads(routings: Mapping[int, Routing]) -> dict[int, list[int]]:
    """Layer -> kept assignments of each expert (E)."""
    return {
        layer: torch.bincount(r.expert_ids_MK.flatten(), weights=r.kept_MK.flatten().double(), minlength=r.scores_ME.shape[1]).long().tolist()
        for layer, r in routings.items()
    }


_ASKED = (
    re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory: you tried to allocate (?P<number>\d+) bytes"),
    re.compile(r"Tried to allocate (?P<number>[\d.]+) (?P<unit>[KMGT]?i?B|bytes)"),  # CUDA's
    re.compile(r"Unable to allocate (?P<number>[\d.]+) (?P<unit>[KMGTPE]?i?B|bytes)"),  # NumPy's
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50, "E": 2**60}


@contextmanager
def naming_out_of_memory(place: torch.device, doing: str) -> Iterator[None]:
    """OutOfMemory, with what was asked and how much there is, for whatever the allocators of torch and NumPy raise in the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        asked = _asked(str(error))
        if asked is None and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        free, total = _memory(place)
        wanted = f"{_size(asked)} more were asked for" if asked is not None else "more was asked for"
        there = f"{_size(free)} of {_size(total)} are free" if free is not None and total is not None else "what is free is not known"
        raise OutOfMemory(
            f"out of memory on {place} {doing}: {wanted}, {there}; a smaller training.micro_batch_size, data.sequence_length or model needs less",
            asked=asked,
            free=free,
        ) from error


def _asked(text: str) -> int | None:
    found = next((match for pattern in _ASKED if (match := pattern.search(text))), None)
    if found is None:
        return None
    unit = found.groupdict().get("unit") or "bytes"
    return int(float(found["number"]) * _UNITS[unit.removesuffix("bytes").removesuffix("B").removesuffix("i")])


def _memory(place: torch.device) -> tuple[int | None, int | None]:
    """Free and total bytes of a GPU, or of this machine as Linux gives them."""
    if place.type == "cuda":
        free, total = torch.cuda.mem_get_info(place)
        return free, total
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024, int(lines["MemTotal"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None, None


def _size(count: int | None) -> str:
    value, units = float(count or 0), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:,.1f} {units[0]}"
