"""What may vary: lists of choices and ranges, the cells of a design, and Optuna's word for them."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

if TYPE_CHECKING:
    from sweeps.study import Study


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers from low to high; whole numbers when both ends are."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be < high={self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log: true needs low={self.low} > 0 and no step")

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


def contains(choices: list[Any] | Range, value: Any) -> bool:
    if isinstance(choices, Range):
        return isinstance(value, int | float) and choices.low <= value <= choices.high
    return value in choices


def distribution(choices: list[Any] | Range) -> BaseDistribution:
    if not isinstance(choices, Range):
        return CategoricalDistribution(choices)
    if choices.whole:
        return IntDistribution(int(choices.low), int(choices.high), log=choices.log, step=int(choices.step or 1))
    return FloatDistribution(choices.low, choices.high, log=choices.log, step=choices.step)


def cells(study: "Study") -> list[dict[str, Any]]:
    """The cells of a one-factor or grid design, baseline first, each once.  A range counts with its two ends."""
    choices = {path: [c.low, c.high] if isinstance(c, Range) else list(c) for path, c in study.space.items()}
    found: list[Mapping[str, Any]] = [study.baseline]
    if study.search.sampler == "grid":
        found += [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    else:
        found += [{**study.baseline, path: value} for path, values in choices.items() for value in values]
    unique: list[dict[str, Any]] = []
    for cell in found:
        ordered = {path: cell[path] for path in study.space}
        if ordered not in unique:
            unique.append(ordered)
    return unique
