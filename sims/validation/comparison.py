"""One published figure, ours beside it, and the baselines beside both."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import TypeAdapter

from research.configfile import read_yaml
from sims.quantiles import Quantiles
from sims.validation.document import band, inside, signed, table

PUBLISHED = Path(__file__).with_name("published.yaml")
Held = tuple[tuple[str, float], ...]
"""Name and value of the calibrated constants that a page holds at a value; none on the committed one."""
Kind = Literal["fitted", "left out", "predicted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A figure of the literature, in its unit."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    value: float
    unit: str
    source: str


def published() -> dict[str, Published]:
    """What `published.yaml` holds, by key."""
    return TypeAdapter(dict[str, Published]).validate_python(read_yaml(PUBLISHED))


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """`kind` says whether a constant was fitted to this figure, fitted with it left out, or never saw it."""

    group: str
    name: str
    unit: str
    value: float
    """As published, in `unit`."""
    ours: Quantiles
    kind: Kind
    baselines: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    @property
    def error(self) -> float:
        """Signed, relative to what was published, of P50."""
        return self.ours.p50 / self.value - 1

    def to_dict(self) -> dict[str, Any]:
        value = asdict(self)
        value |= {"baselines": dict(self.baselines), "error": self.error, "inside_p10_p90": self.ours.p10 <= self.value <= self.ours.p90}
        value["baseline_errors"] = {name: seconds / self.value - 1 for name, seconds in self.baselines.items()}
        return value


def comparison_table(rows: Sequence[Comparison], digits: int = 0) -> str:
    """A row per figure: published, ours with its band, the signed error, and the error of each baseline."""
    names = list(dict.fromkeys(name for row in rows for name in row.baselines))
    head = ["what", "published", "ours, P50 (P10 to P90)", "error", "P10 to P90", "kind", *(f"`{name}`" for name in names)]
    lines = []
    for row in rows:
        errors = [signed(row.baselines[name], row.value) if name in row.baselines else "" for name in names]
        lines.append(
            [row.name, f"{row.value:,.{digits}f} {row.unit}", band(row.ours, digits=digits), signed(row.ours.p50, row.value),
             inside(row.ours, row.value), "**FITTED**" if row.kind == "fitted" else row.kind, *errors]
        )  # fmt: skip
    return table(head, lines)


def mean_absolute_errors(rows: Sequence[Comparison]) -> dict[str, float]:
    """Ours and each baseline's, over the rows that have it."""
    found = {"ours": float(np.mean([abs(row.error) for row in rows]))}
    for name in dict.fromkeys(name for row in rows for name in row.baselines):
        found[name] = float(np.mean([abs(row.baselines[name] / row.value - 1) for row in rows if name in row.baselines]))
    return found
