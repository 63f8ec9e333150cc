"""How much each constant matters, and what an explanation consists of.

Sensitivities cost one simulation: every simulator computes with an axis of draws, and here a draw is one constant 10 % up or down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sims.constants import Constants
from sims.quantiles import Quantiles

UP, DOWN = 1.1, 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """How the answer follows one constant: the elasticity is d ln(answer) / d ln(constant), from 10 % up and 10 % down."""

    constant: str
    elasticity: float
    up: float
    """The answer with the constant 10 % larger."""
    down: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """The answer of one question, explained."""

    question: str
    answer: Quantiles
    unit: str
    bottleneck: str
    """One sentence."""
    parts: Mapping[str, float]
    """Where time goes, seconds at the best fit."""
    sensitivities: Sequence[Sensitivity]
    """The largest first."""
    base: float
    """The answer at the best fit, which sensitivities are relative to."""
    switches: Sequence[str]
    """What would have to change for something else to bind, a sentence each."""
    warnings: Sequence[str] = ()
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        value = asdict(self)
        total = sum(self.parts.values())
        value["shares"] = {name: seconds / total if total else 0.0 for name, seconds in self.parts.items()}
        return value


def perturbed(constants: Constants) -> Constants:
    """Draw 0 is the best fit; in draws 2 i + 1 and 2 i + 2 constant i is 10 % up and 10 % down."""
    names = constants.names
    values = {}
    for index, name in enumerate(names):
        values[name] = np.full(1 + 2 * len(names), constants[name][0])
        values[name][2 * index + 1 : 2 * index + 3] *= (UP, DOWN)
    return Constants(values, constants.sources)


def best_fit(constants: Constants) -> Constants:
    """Draw 0 alone."""
    return Constants({name: values[:1] for name, values in constants.values.items()}, constants.sources)


def sensitivities(answers: np.ndarray, constants: Constants) -> list[Sensitivity]:
    """Of an answer for each draw of `perturbed(constants)`, float64 (draws,); constants that change nothing are left out."""
    found = []
    for index, name in enumerate(constants.names):
        up, down = answers[2 * index + 1 : 2 * index + 3]
        if up != down and min(up, down) > 0:
            elasticity = float(np.log(up / down) / np.log(UP / DOWN))
            found.append(Sensitivity(constant=name, elasticity=elasticity, up=float(up), down=float(down), source=constants.sources[name]))
    return sorted(found, key=lambda s: (-abs(s.elasticity), s.constant))
