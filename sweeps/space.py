"""What may vary: lists of choices, ranges, dimensions that exist only under a condition; and the cells of a design.

A *cell* gives every searched path a value.  A dimension whose condition does not hold has the baseline's value there, so
that two draws which differ only in what does not exist are one cell.
"""

import dataclasses
import functools
import itertools
import json
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from optuna.trial import BaseTrial
from pydantic import TypeAdapter, ValidationError

from research.config import RunConfig
from research.configfile import nearest, validate
from research.errors import ConfigError
from sweeps.variants import VARIANT

if TYPE_CHECKING:
    from sweeps.definition import Study

_FORBID_UNKNOWN: Any = {"extra": "forbid", "allow_inf_nan": False}
EXPECTED = "expected a list of choices, a range {low, high, log, step}, or {when: {path: values}, choices: ...}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers from low to high, evenly or (`log`) evenly in their logarithm; whole numbers where both ends are and the setting is."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be < high={self.high}")
        if not math.isfinite(float(self.high) - float(self.low)):
            raise ValueError(f"low={self.low} and high={self.high} are too far apart")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log: true needs low={self.low} > 0 and no step")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step={self.step} must be > 0 and at most high - low = {self.high - self.low}")

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.step, int | None)

    @property
    def count(self) -> int:
        """How many levels there are."""
        return 2 if self.step is None else math.floor((self.high - self.low) / self.step + 1e-9) + 1

    @property
    def last(self) -> int | float:
        """The highest level."""
        return self.high if self.step is None else self.low + (self.count - 1) * self.step

    @property
    def levels(self) -> list[int | float]:
        """What a design tries: every step, or the two ends of a range without steps."""
        return [self.low, self.high] if self.step is None else [self.low + i * self.step for i in range(self.count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditional:
    """A dimension that exists only in cells where every path of `when` has its value, or one of its list of values."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    when: dict[str, Any]
    choices: list[Any] | Range

    def holds(self, cell: Mapping[str, Any]) -> bool:
        return all(cell[path] in as_list(values) for path, values in self.when.items())


Choices = list[Any] | Range
Entry = list[Any] | Range | Conditional


def as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def choices_of(entry: Entry) -> Choices:
    return entry.choices if isinstance(entry, Conditional) else entry


def conditions_of(entry: Entry) -> dict[str, Any]:
    return entry.when if isinstance(entry, Conditional) else {}


def contains(choices: Choices, value: Any) -> bool:
    if isinstance(choices, Range):
        return isinstance(value, int | float) and choices.low <= value <= choices.high
    return value in choices


def in_order(space: Mapping[str, Entry]) -> list[str]:
    """Paths such that each comes after those its condition names; ValueError if conditions go round in a circle."""
    order: list[str] = []
    left = list(space)
    while left:
        ready = [path for path in left if not set(conditions_of(space[path])) & set(left)]
        if not ready:
            raise ValueError(f"the conditions of {', '.join(left)} go round in a circle")
        order += ready
        left = [path for path in left if path not in ready]
    return order


def exists(entry: Entry, cell: Mapping[str, Any]) -> bool:
    """Whether a dimension exists beside the values of the dimensions that its condition names."""
    return not isinstance(entry, Conditional) or entry.holds(cell)


def resolve(space: Mapping[str, Entry], baseline: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The cell of `values`: the baseline's value wherever a dimension does not exist, or has none."""
    cell: dict[str, Any] = {}
    for path in in_order(space):
        cell[path] = values[path] if path in values and exists(space[path], cell) else baseline[path]
    return {path: cell[path] for path in space}


def cell_key(cell: Mapping[str, Any]) -> str:
    """Equal for equal cells alone; 1 and 1.0 are equal."""
    whole = {path: int(value) if isinstance(value, float) and value.is_integer() else value for path, value in cell.items()}
    return json.dumps(whole, sort_keys=True)


def suggest(trial: BaseTrial, path: str, choices: Choices) -> Any:
    """Optuna's value for one dimension."""
    if not isinstance(choices, Range):
        return trial.suggest_categorical(path, choices)
    high = choices.last
    if choices.whole and int in _types(path):
        return trial.suggest_int(path, int(choices.low), int(high), step=int(choices.step or 1), log=choices.log)
    return trial.suggest_float(path, choices.low, high, step=choices.step, log=choices.log)


def suggest_cell(trial: BaseTrial, space: Mapping[str, Entry], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """A whole cell; only dimensions that exist in it are asked for."""
    cell: dict[str, Any] = {}
    for path in in_order(space):
        cell[path] = suggest(trial, path, choices_of(space[path])) if exists(space[path], cell) else baseline[path]
    return {path: cell[path] for path in space}


def cells(study: "Study") -> list[dict[str, Any]]:
    """The cells of a one-factor or grid design, baseline first, each once.

    A conditional dimension is varied where it exists: one factor at a time means then that its condition's first values
    are set together with it.
    """
    found: list[Mapping[str, Any]] = [study.baseline]
    levels = {path: levels_of(entry) for path, entry in study.space.items()}
    if study.search.sampler == "grid":
        found += [dict(zip(levels, values, strict=True)) for values in itertools.product(*levels.values())]
    else:
        found += [{**study.baseline, **needs(study, path), path: value} for path, values in levels.items() for value in values]
    unique: dict[str, dict[str, Any]] = {}
    for values in found:
        cell = resolve(study.space, study.baseline, values)
        unique.setdefault(cell_key(cell), cell)
    return list(unique.values())


def count_of(entry: Entry) -> int:
    """How many levels a design tries of a dimension."""
    choices = choices_of(entry)
    return choices.count if isinstance(choices, Range) else len(choices)


def levels_of(entry: Entry) -> list[Any]:
    choices = choices_of(entry)
    return choices.levels if isinstance(choices, Range) else list(choices)


def needs(study: "Study", path: str) -> dict[str, Any]:
    """What else has to be set for `path` to exist; nothing if it exists in the baseline."""
    found: dict[str, Any] = {}
    for parent, values in conditions_of(study.space[path]).items():
        if study.baseline[parent] not in as_list(values):
            found |= {**needs(study, parent), parent: as_list(values)[0]}
    return found


def _types(path: str) -> tuple[Any, ...]:
    hint = leaf_type(path)
    return (hint, *typing.get_args(hint))


def leaf_type(path: str) -> Any:
    """The annotation at a dotted path of RunConfig, a name for the variant; KeyError when there is no such leaf."""
    if path == VARIANT:
        return str
    owner: Any = RunConfig
    *parents, leaf = path.split(".")
    for part in parents:
        hint = typing.get_type_hints(owner)[part]
        owner = next(t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t))
    return typing.get_type_hints(owner)[leaf]


@functools.lru_cache(maxsize=512)
def _adapter(path: str) -> TypeAdapter[Any]:
    return TypeAdapter(leaf_type(path))


def coerced(path: str, value: Any) -> Any:
    """`value` as a run configuration holds it at `path` (0 where a float is expected is 0.0); ValueError if it cannot."""
    return _adapter(path).validate_python(value)


def value_problem(path: str, value: Any) -> str | None:
    """Why `path` of a run configuration cannot be `value`, or None."""
    if value is not None and not isinstance(value, str | int | float | bool):
        return f"a {type(value).__name__} cannot be searched over; only numbers, words, true, false and null can"
    types = _types(path)
    if isinstance(value, bool) and bool not in types:
        return "input should be a number or a word, not true or false"
    if bool in types and value is not None and not isinstance(value, bool):
        return "input should be true or false"
    if isinstance(value, float) and not math.isfinite(value):
        return "input should be a finite number"
    return _type_problem(path, value, types)


def _type_problem(path: str, value: Any, types: tuple[Any, ...]) -> str | None:
    try:
        coerced(path, value)
    except ValidationError as error:
        message = str(error.errors()[0]["msg"])
        return message[0].lower() + message[1:]
    return "is a word, in quotes; write the number without them" if isinstance(value, str) and {int, float} & set(types) else None


def dimension_problems(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """What is wrong with one entry of a space, as (where, sentence); `path` must be a path of a run configuration."""
    where = f"space.{path}"
    if not isinstance(value, Mapping) or not {"when", "choices"} & value.keys():
        yield from _choices_problems(where, path, value)
        return
    known = [field.name for field in dataclasses.fields(Conditional)]
    yield from ((f"{where}.{key} = {value[key]!r}", f"unknown key{nearest(str(key), known)}") for key in value if key not in known)
    yield from ((f"{where}.{key}", f"is missing: {EXPECTED}") for key in known if key not in value)
    if "choices" in value:
        yield from _choices_problems(f"{where}.choices", path, value["choices"])
    if "when" in value and (not isinstance(value["when"], Mapping) or not value["when"]):
        yield f"{where}.when = {value['when']!r}", "expected a mapping of other searched settings to their value or list of values"


def _choices_problems(where: str, path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        known = [field.name for field in dataclasses.fields(Range)]
        unknown = [key for key in value if key not in known]
        yield from ((f"{where}.{key} = {value[key]!r}", f"unknown key{nearest(str(key), known)}") for key in unknown)
        ends = {key: value[key] for key in ("low", "high", "step") if value.get(key) is not None}
        wrong = [(f"{where}.{key} = {end!r}", problem) for key, end in ends.items() if (problem := value_problem(path, end))]
        yield from wrong
        if not unknown and not wrong:
            try:
                validate(Range, value, where)
            except ConfigError as error:
                yield from ((where, p.removeprefix(f"{where}: ").removeprefix("(whole): ")) for p in error.problems)
    elif not isinstance(value, list) or not value:
        yield f"{where} = {value!r}", EXPECTED
    else:
        yield from ((f"{where} = {choice!r}", problem) for choice in value if (problem := value_problem(path, choice)))
        yield from ((f"{where} = {choice!r}", "the same choice stands there twice") for i, choice in enumerate(value) if choice in value[:i])


def condition_problems(space: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Conditions on what is not in the space, that can never hold, or that go round in a circle; entries are as in the file."""
    parents: dict[str, list[str]] = {}
    for path, entry in space.items():
        when = entry.get("when") if isinstance(entry, Mapping) else None
        for parent, values in when.items() if isinstance(when, Mapping) else ():
            where = f"space.{path}.when.{parent} = {values!r}"
            if parent not in space:
                yield where, f"is not in the space{nearest(str(parent), [other for other in space if other != path])}"
                continue
            parents.setdefault(path, []).append(parent)
            if not as_list(values):
                yield where, "never holds: the list of values is empty"
            for value in as_list(values):
                if not may_be(space[parent], value):
                    yield where, f"never holds: space.{parent} has no {value!r}"
    for path in parents:
        if path in _ancestors(path, parents):
            yield f"space.{path}.when", "the conditions go round in a circle"


def may_be(entry: Any, value: Any) -> bool:
    """Whether a dimension, as in the file, has a value; True where the entry is wrong itself."""
    choices = entry["choices"] if isinstance(entry, Mapping) and "choices" in entry else entry
    if isinstance(choices, Mapping):
        low, high = choices.get("low"), choices.get("high")
        numbers = all(isinstance(n, int | float) for n in (low, high))
        return not numbers or (isinstance(value, int | float) and low <= value <= high)  # type: ignore[operator]
    return not isinstance(choices, list) or value in choices


def _ancestors(path: str, parents: Mapping[str, list[str]]) -> set[str]:
    found: set[str] = set()
    left = list(parents.get(path, ()))
    while left:
        if (parent := left.pop()) not in found:
            found.add(parent)
            left += parents.get(parent, ())
    return found
