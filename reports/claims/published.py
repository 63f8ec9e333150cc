"""What was published, out of `data/*.yaml`."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from research.config import ModelConfig
from research.configfile import read_yaml, resolve_model, validate

DATA = Path(__file__).with_name("data")
How = Literal["closed form", "simulation", "measurement"]
Reading = Literal["value", "cut", "at least", "none", "lower", "equal"]
_FORBID_UNKNOWN: Any = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A sentence or figure of a paper; what the fields mean stands at the top of `data/claims.yaml`."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    id: str
    claim: str
    how: How
    source: str
    published: str | None = None
    text: str | None = None
    says: str = ""
    pair: tuple[float, float] | None = None
    unit: str = ""
    reading: Reading = "value"
    rests_on: str = ""
    short: str = ""
    headline: bool = False

    def __post_init__(self) -> None:
        if (self.published is None) != (self.reading in ("none", "lower", "equal")):
            raise ValueError(f"id={self.id!r}: reading={self.reading!r} and published={self.published!r} do not go together")

    @property
    def value(self) -> float | None:
        return None if self.published is None else float(self.published)

    @property
    def last_digit(self) -> float:
        """Half a unit of the last digit that is printed behind the point; 0 where there is none."""
        decimals = (self.published or "").partition(".")[2]
        return 0.5 * 10.0 ** -len(decimals) if decimals else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Relative errors up to which a row is reproduced, and close."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    reproduced: float
    close: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A published number that rows compute with."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    value: float
    unit: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    title: str
    claims: list[Claim]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedModel:
    """A model's printed sizes; `preset`, or `model` with changes to one, is what ours are computed from."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    name: str
    total: str
    activated: str
    flops: str
    source: str
    preset: str | None = None
    model: dict[str, Any] = field(default_factory=dict)

    def config(self) -> ModelConfig:
        return validate(ModelConfig, resolve_model(self.model or self.preset, self.name), self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    tolerances: dict[str, Tolerance]
    figures: dict[str, Figure]
    sections: list[Section]
    models: list[PublishedModel]

    def claims(self) -> list[Claim]:
        return [claim for section in self.sections for claim in section.claims]

    def model(self, name: str) -> ModelConfig:
        return next(model.config() for model in self.models if model.name == name)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceTable:
    """Published figures that are shown and not recomputed."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    name: str
    title: str
    source: str
    head: list[str]
    rows: list[list[str | int | float]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"rows={row[0]!r} has {len(row)} cells for {len(self.head)} columns of {self.name!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """What is said, and what is right; {names} in `right` stand for computed values."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    said: str
    right: str
    source: str


@cache
def published() -> Published:
    return validate(Published, read_yaml(DATA / "claims.yaml"), "claims.yaml")


@cache
def reference_tables() -> list[ReferenceTable]:
    return [validate(ReferenceTable, entry, "tables.yaml") for entry in read_yaml(DATA / "tables.yaml")["tables"]]


@cache
def corrections() -> list[Correction]:
    return [validate(Correction, entry, "corrections.yaml") for entry in read_yaml(DATA / "corrections.yaml")["corrections"]]


def figure(name: str) -> float:
    """The value of a published figure by its name in `claims.yaml`."""
    return published().figures[name].value
