"""Constraints: sentences such as `kv_cache_bytes_per_token <= 4096`, `routing/device_violation <= 0.5` or `diverged`.

What is known in closed form is decided before a run starts, the rest when its runs have ended.  Optuna is told of each as
its relative violation (at most 0 where it is met), so that constraints of different units weigh alike.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from research.config import RunConfig
from research.configfile import nearest
from sweeps import schema
from sweeps.quantities import BEFORE_TRAINING

if TYPE_CHECKING:
    from sweeps.definition import Study

DIVERGED = "diverged"
FORM = "expected NAME <= NUMBER (or >=, <, >), such as 'kv_cache_bytes_per_token <= 4096', or 'diverged'"
_SENTENCE = re.compile(r"\s*([\w/.-]+)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """What must hold of a feasible cell: `metric` `relation` `bound`, or that none of its runs diverges."""

    text: str
    metric: str
    relation: str = "<="
    bound: float = 0.0

    @property
    def before_training(self) -> bool:
        return self.metric in BEFORE_TRAINING

    def violation(self, value: float) -> float:
        """By how much `value` misses, relative to the bound (absolute where that is 0); at most 0 where it holds."""
        bound = self.bound
        if self.relation in ("<", ">"):
            bound = math.nextafter(bound, -math.inf if self.relation == "<" else math.inf)
        missing = value - bound if self.relation in ("<=", "<") else bound - value
        return missing / (abs(self.bound) or 1.0)


def parse(text: str, metrics: Sequence[str]) -> Constraint:
    """A constraint over one of `metrics` (all that runs record) or a quantity known before training.

    A name may be given by its last part where only one has it.  ValueError with a sentence that says what would be valid.
    """
    words = " ".join(text.split())
    if words.removeprefix("not ") == DIVERGED:
        return Constraint(text=DIVERGED, metric=DIVERGED)
    found = _SENTENCE.fullmatch(text)
    if not found:
        raise ValueError(FORM)
    name, relation, number = found.groups()
    try:
        bound = float(number)
    except ValueError:
        raise ValueError(f"{number!r} is no number; {FORM}") from None
    if not math.isfinite(bound):
        raise ValueError(f"{number!r} bounds nothing; {FORM}")
    return Constraint(text=f"{name} {relation} {number}", metric=_whole_name(name, metrics), relation=relation, bound=bound)


def _whole_name(name: str, metrics: Sequence[str]) -> str:
    known = [*metrics, *BEFORE_TRAINING]
    if name in known or name.startswith((f"{schema.BITS_PER_BYTE}/", f"{schema.EXPERT_VIOLATION}/layer_")):
        return name
    full = sorted({k for k in known if k.endswith(f"/{name}")})
    if len(full) > 1:
        raise ValueError(f"{name!r} may be any of {', '.join(full)}: say which")
    if not full:
        short = {k.rsplit("/", 1)[-1] for k in known}
        raise ValueError(f"no run records {name!r} and it is not known before training{nearest(name, [*known, *short])}")
    return full[0]


def known_violations(constraints: Sequence[Constraint], study: "Study", config: RunConfig) -> dict[str, float]:
    """Violations of the constraints that need no training, by their text."""
    return {c.text: c.violation(BEFORE_TRAINING[c.metric](study, config)) for c in constraints if c.before_training}


def broken(constraints: Sequence[Constraint], study: "Study", config: RunConfig) -> list[str]:
    """Sentences about the constraints that this configuration cannot meet, whatever is trained."""
    values = [(c, BEFORE_TRAINING[c.metric](study, config)) for c in constraints if c.before_training]
    return [f"{c.text}: it is {value:,.6g}" for c, value in values if c.violation(value) > 0]


def measured_violations(constraints: Sequence[Constraint], summaries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Violations of the constraints on what is measured, from how a trial's runs ended: on the mean over the seeds that finished.

    A constraint whose metric no finished run has is left out; `diverged` is 1 if any run did.
    """
    finished = [s["metrics"] for s in summaries if s["state"] == schema.FINISHED]
    found: dict[str, float] = {}
    for constraint in (c for c in constraints if not c.before_training):
        if constraint.metric == DIVERGED:
            found[constraint.text] = float(any(s["state"] == schema.DIVERGED for s in summaries))
        elif values := [m[constraint.metric] for m in finished if constraint.metric in m]:
            found[constraint.text] = constraint.violation(sum(values) / len(values))
    return found
