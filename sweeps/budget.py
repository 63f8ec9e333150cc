"""Budgets: what is held equal between the variants, and the one setting that is turned to hold it equal."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from research.config import RunConfig
from research.errors import ConfigError
from sweeps.quantities import QUANTITIES

if TYPE_CHECKING:
    from sweeps.definition import Study

TOKENS = "training.train_tokens"
KNOBS = {
    "training_flops": (TOKENS, "model.num_hidden_layers", "model.moe.moe_intermediate_size"),
    "activated_parameters": ("model.moe.moe_intermediate_size", "model.num_hidden_layers"),
    "total_parameters": ("model.moe.moe_intermediate_size", "model.num_hidden_layers"),
    "kv_bytes": ("model.attention.kv_lora_rank", "model.attention.num_key_value_heads", "model.num_hidden_layers"),
    "communication_seconds": (TOKENS, "model.moe.device_limit"),
    "communication_bytes": (TOKENS, "model.moe.device_limit"),
}
"""Settings that change a quantity, for the remedy in a message; any whole number of a configuration may be one."""
STRIDES = 256
"""How far from its value the next possible one of a knob is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What is held equal between the variants: the baseline's amount of it, or `target`."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    matched: Literal[
        "tokens",
        "training_flops",
        "activated_parameters",
        "total_parameters",
        "kv_bytes",
        "communication_seconds",
        "communication_bytes",
        "none",
    ] = "tokens"
    adjust: str | None = None
    """The setting that is turned in each variant; null: the variants must match as they are."""
    multiple_of: int | None = None
    """Values of the knob are multiples of it; null: one batch for training.train_tokens, any possible value for others."""
    within: float = 0.02
    """Relative difference to what is asked for that still counts as equal."""
    target: float | None = None

    def __post_init__(self) -> None:
        if self.matched in ("tokens", "none") and (self.adjust is not None or self.target is not None):
            given = {key: value for key, value in (("adjust", self.adjust), ("target", self.target)) if value is not None}
            raise ValueError(f"matched={self.matched} with {given}: nothing is adjusted then; leave it out, or match one of {', '.join(KNOBS)}")
        if self.multiple_of is not None and self.adjust is None:
            raise ValueError(f"multiple_of={self.multiple_of} without adjust: it is of the adjusted setting")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise ValueError(f"multiple_of={self.multiple_of} must be >= 1")
        if not 0 < self.within < 1:
            raise ValueError(f"within={self.within} must lie between 0 and 1")
        if self.target is not None and self.target <= 0:
            raise ValueError(f"target={self.target} must be > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """How well one variant meets the budget."""

    quantity: str
    requested: float
    achieved: float
    adjusted: str | None
    value: int | None
    """Of the adjusted setting."""

    @property
    def difference(self) -> float:
        """Relative, signed."""
        return self.achieved / self.requested - 1 if self.requested else float(self.achieved != 0)

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"difference": self.difference}


def match(study: "Study", config: RunConfig, requested: float) -> tuple[RunConfig, Match]:
    """`config` with the knob turned so that its budget is `requested`.

    ConfigError, with the closest that can be had, if no value of the knob comes within `budget.within`.
    """
    budget, knob, value = study.budget, study.budget.adjust, None
    try:
        achieved = QUANTITIES[budget.matched](study, config)
    except ValueError as error:
        raise ConfigError(f"budget.matched = {budget.matched}: {error}") from error
    if knob is not None:
        value = value_at(config, knob)
        if not math.isclose(achieved, requested, rel_tol=1e-12):
            value, achieved = closest(_amount(study, config, knob), 1 if value is None else value, requested, _unit(budget, config))
            config = with_value(config, knob, value)
    found = Match(quantity=budget.matched, requested=requested, achieved=achieved, adjusted=knob, value=value)
    if abs(found.difference) > budget.within:
        nothing = f"no setting is adjusted (budget.adjust, such as {KNOBS[budget.matched][0]}), it has"
        remedy = f"the closest {knob} = {value} gives" if knob else nothing
        raise ConfigError(
            f"budget.matched = {budget.matched}: cannot be held at {requested:,.6g} within {budget.within:.1%}; "
            f"{remedy} {achieved:,.6g} ({found.difference:+.1%})"
        )
    return config, found


def _amount(study: "Study", config: RunConfig, knob: str) -> Callable[[int], float | None]:
    """The matched quantity as a function of the knob; None where that value is not possible."""
    quantity = QUANTITIES[study.budget.matched]

    def amount(value: int) -> float | None:
        try:
            return quantity(study, with_value(config, knob, value))
        except (ValueError, ConfigError):
            return None

    return amount


def _unit(budget: Budget, config: RunConfig) -> int | None:
    if budget.multiple_of is None and budget.adjust == TOKENS:
        return config.training.batch_size * config.data.sequence_length
    return budget.multiple_of


def closest(amount: Callable[[int], float | None], start: int, target: float, unit: int | None) -> tuple[int, float]:
    """The whole number near `start` whose amount is closest to `target`, and that amount.

    `amount` is monotone in either direction and None for values that are not possible.  Candidates are the multiples of
    `unit`; without one, `start` and what is a whole number of the smallest possible strides away from it.  ConfigError if
    there is no possible value at all.
    """
    unit, origin = (unit, 0) if unit else (_stride(amount, start), start)
    seen: dict[int, float | None] = {}

    def at(index: int) -> float | None:
        value = origin + index * unit
        if value not in seen:
            seen[value] = amount(value) if value >= 0 else None
        return seen[value]

    home = (start - origin) // unit
    home = next((home + d for d in (0, 1, -1, 2, -2) if at(home + d) is not None), home)
    first = at(home)
    if first is None:
        raise ConfigError(f"no multiple of {unit} near {start} is possible")
    for direction in (1, -1):
        _walk(at, home, direction, above=first > target, target=target)
    possible = [(abs(found - target), abs(value - start), value) for value, found in seen.items() if found is not None]
    value = min(possible)[2]
    found = seen[value]
    assert found is not None
    return value, found


def _stride(amount: Callable[[int], float | None], start: int) -> int:
    return next((n for n in range(1, STRIDES) if amount(start + n) is not None or (n <= start and amount(start - n) is not None)), 1)


def _walk(at: Callable[[int], float | None], home: int, direction: int, *, above: bool, target: float) -> None:
    """Look at values farther and farther away while that brings the amount nearer, then between the last two by halves."""
    near, step, before = home, 1, at(home)
    assert before is not None
    while True:
        far = home + direction * step
        found = at(far)
        if found is None or (found > target) != above:
            break
        if abs(found - target) > abs(before - target) or (step > STRIDES and found == before):
            return
        near, before, step = far, found, step * 2
    while abs(far - near) > 1:
        middle = (near + far) // 2
        found = at(middle)
        if found is None or (found > target) != above:
            far = middle
        else:
            near = middle


def value_at(config: Any, path: str) -> Any:
    """The value at a dotted path; None beneath a part that is not there."""
    for part in path.split("."):
        config = getattr(config, part) if config is not None else None
    return config


def with_value(config: Any, path: str, value: Any) -> Any:
    """A copy with one leaf changed; ValueError if it is then impossible, or has no such part."""
    return with_values(config, {path: value})


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy with the leaves at dotted paths changed all at once; ValueError if it is then impossible, or has no such part."""
    changed: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        part, _, rest = path.partition(".")
        if rest:
            inner.setdefault(part, {})[rest] = value
        else:
            changed[part] = value
    for part, below in inner.items():
        owner = getattr(config, part)
        if not is_dataclass(owner):
            raise ValueError(f"{part} is null: there is no {next(iter(below))} to change")
        changed[part] = with_values(owner, below)
    return replace(config, **changed)


def matched_about(found: Match | None) -> Mapping[str, Any]:
    """What run.json says of it."""
    return {} if found is None else {"matched": found.to_dict()}
