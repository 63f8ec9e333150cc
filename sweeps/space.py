"""What may vary: lists of choices and ranges, the cells of a design, and Optuna's word for them."""

import dataclasses
import itertools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import TypeAdapter, ValidationError

from research.config import RunConfig
from research.configfile import nearest, validate
from research.errors import ConfigError

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


def leaf_type(path: str) -> Any:
    """The annotation at a dotted path of RunConfig; KeyError when there is no such leaf."""
    owner: Any = RunConfig
    *parents, leaf = path.split(".")
    for part in parents:
        hint = typing.get_type_hints(owner)[part]
        owner = next(t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t))
    return typing.get_type_hints(owner)[leaf]


def value_problem(path: str, value: Any) -> str | None:
    """Why `path` of a run configuration cannot be `value`, or None."""
    if value is not None and not isinstance(value, str | int | float | bool):
        return f"a {type(value).__name__} cannot be searched over; only numbers, words, true, false and null can"
    hint = leaf_type(path)
    if isinstance(value, bool) and bool not in (hint, *typing.get_args(hint)):
        return "input should be a number or a word, not true or false"
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        message = str(error.errors()[0]["msg"])
        return message[0].lower() + message[1:]
    return None


def dimension_problems(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """What is wrong with one entry of a space, as (where, sentence); `path` must be a path of a run configuration."""
    where = f"space.{path}"
    if isinstance(value, Mapping):
        known = [field.name for field in dataclasses.fields(Range)]
        unknown = [key for key in value if key not in known]
        yield from ((f"{where}.{key} = {value[key]!r}", f"unknown key{nearest(str(key), known)}") for key in unknown)
        ends = {key: value[key] for key in ("low", "high", "step") if value.get(key) is not None}
        yield from ((f"{where}.{key} = {end!r}", problem) for key, end in ends.items() if (problem := value_problem(path, end)))
        if not unknown:
            try:
                validate(Range, value, where)
            except ConfigError as error:
                yield from ((where, p.removeprefix(f"{where}: ").removeprefix("(whole): ")) for p in error.problems)
    elif not isinstance(value, list) or not value:
        yield f"{where} = {value!r}", "expected a list of choices, or a range {low, high, log, step}"
    else:
        yield from ((f"{where} = {choice!r}", problem) for choice in value if (problem := value_problem(path, choice)))
        yield from ((f"{where} = {choice!r}", "the same choice stands there twice") for i, choice in enumerate(value) if choice in value[:i])


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
