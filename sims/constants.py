"""The calibrated constants as draws: what every prediction's P10, P50 and P90 are made of.

`calibration/fitted.json` (written by `python -m sims calibrate`) holds the constants that measured points identify, drawn
together, so that their correlations are kept; a constant that no point sees has a stated prior under `priors` in `calibration/*.yaml`.
Draw 0 is the best fit throughout.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np

from research.configfile import nearest, read_yaml, validate
from research.errors import ConfigError
from sims.cluster import Cluster

CALIBRATION = Path(__file__).with_name("calibration")


def spread_normal(random: np.random.Generator, number: int) -> np.ndarray:
    """float64 (number,): 0, then evenly spaced quantiles of the standard normal in random order (a Latin hypercube's column):
    tens of draws already have its median and spread."""
    quantiles = [NormalDist().inv_cdf((i + 0.5) / (number - 1)) for i in range(number - 1)]
    return np.concatenate([[0.0], random.permutation(quantiles)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Prior:
    """What is believed of a constant before any point is seen: `low` and `high` are P10 and P90."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    low: float
    best: float
    high: float
    unit: str
    why: str

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.best <= self.high:
            raise ValueError(f"low={self.low}, best={self.best}, high={self.high}: must be > 0 and ascend")

    @property
    def log_spread(self) -> float:
        """Standard deviation of the logarithm: P10 to P90 spans 2.563 of them."""
        return float(np.log(self.high / self.low) / 2.563)

    def draws(self, name: str, number: int) -> np.ndarray:
        """float64 (number,), log-normal on either side of the best value; the name is the seed, so constants are independent."""
        normal = spread_normal(np.random.default_rng(zlib.crc32(name.encode())), number)
        below, above = np.log(self.best / self.low) / 1.2816, np.log(self.high / self.best) / 1.2816
        side = np.where(normal < 0, below, above)
        return self.best * np.exp(normal * side)


@dataclass(frozen=True, slots=True)
class Constants:
    """Draws of each constant by name, float64 (draws,); index 0 is the point estimate."""

    values: Mapping[str, np.ndarray]
    sources: Mapping[str, str]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise KeyError(f"no constant {name!r}{nearest(name, self.values)}")
        return self.values[name]

    @property
    def names(self) -> list[str]:
        return list(self.values)

    @property
    def draws(self) -> int:
        return len(next(iter(self.values.values())))

    def replaced(self, **changes: np.ndarray | float) -> "Constants":
        """The same with some constants changed (scalars hold for every draw): for sensitivities and what-ifs."""
        unknown = [name for name in changes if name not in self.values]
        if unknown:
            raise KeyError(f"no constant {unknown[0]!r}{nearest(unknown[0], self.values)}")
        new = {name: np.broadcast_to(np.asarray(value, float), (self.draws,)) for name, value in changes.items()}
        return Constants({**self.values, **new}, self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Best value, P10, P90 and source of each, for JSON."""
        low, high = np.quantile(np.stack(list(self.values.values())), (0.1, 0.9), axis=1)
        return {
            name: {"best": float(v[0]), "p10": float(low[i]), "p90": float(high[i]), "source": self.sources[name]}
            for i, (name, v) in enumerate(self.values.items())
        }


@cache
def priors() -> dict[str, Prior]:
    """Every constant's prior: what stands under `priors` in any file of `calibration/`."""
    found: dict[str, Prior] = {}
    for path in sorted(CALIBRATION.glob("*.yaml")):
        found |= {name: validate(Prior, value, f"{path.name}: priors.{name}") for name, value in read_yaml(path).get("priors", {}).items()}
    return found


@cache
def fits() -> dict[str, Any]:
    """The committed fits, merged: `constants` (name -> draws), `measured` (cluster -> spread), `range`."""
    merged: dict[str, Any] = {"constants": {}, "range": {}, "clusters": [], "unexplained_log_spread": 0.05}
    for path in sorted(CALIBRATION.glob("*fitted.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        merged["constants"] |= found.get("constants", {})
        merged |= {key: value for key, value in found.items() if key in merged and key != "constants"}
    return merged


UNMEASURED_CLUSTER = 0.08
"""Standard deviation of the logarithm added for a cluster on which no expert-parallel kernel was measured: about the spread
between the shares of NVLink's data-sheet rate that NCCL reaches on A100, H100, H200 and B200 (0.63 to 0.70)."""


def load_constants(cluster: Cluster, draws: int = 64, given: Mapping[str, float] | None = None) -> Constants:
    """Every constant for predictions on `cluster`; deterministic.  `given` has its values in every draw, for what-ifs.

    ConfigError if draws < 1, for a name that no constant has, and for a value that is not positive.
    """
    if draws < 1:
        raise ConfigError(f"draws = {draws}: must be >= 1")
    found = _load(cluster.key in fits()["clusters"], draws)
    if not given:
        return found
    for name, value in given.items():
        if name not in found.values:
            raise ConfigError(f"constants.{name} = {value!r}: no such constant{nearest(name, found.values)}")
        if not 0 < value < np.inf:
            raise ConfigError(f"constants.{name} = {value!r}: must be > 0 and finite")
    changed = found.replaced(**given)
    return Constants(changed.values, {**changed.sources, **dict.fromkeys(given, "given in the question")})


@lru_cache(maxsize=16)
def _load(measured: bool, draws: int) -> Constants:
    values, sources, fitted = {}, {}, fits()["constants"]
    for name, prior in priors().items():
        if name in fitted:
            # More draws than were stored repeat them.
            values[name] = np.resize(np.asarray(fitted[name]["draws"], float), draws)
            sources[name] = fitted[name]["source"]
        else:
            values[name] = prior.draws(name, draws)
            sources[name] = f"prior, no point identifies it: {prior.why}"
    spread = float(np.hypot(fits()["unexplained_log_spread"], 0.0 if measured else UNMEASURED_CLUSTER))
    values["unexplained"] = Prior(
        low=float(np.exp(-1.2816 * spread)), best=1.0, high=float(np.exp(1.2816 * spread)), unit="of the transmit time", why="spread"
    ).draws("unexplained", draws)
    sources["unexplained"] = "what the points' leave-one-out errors leave unexplained" + (
        "" if measured else f", and {UNMEASURED_CLUSTER:.0%} for a cluster without a measured kernel"
    )
    return Constants(values, sources)


def calibrated_range(name: str) -> tuple[float, float] | None:
    """Smallest and largest value of a field of the question (`nodes`, `sms`, ...) among the fitted points."""
    found = fits()["range"].get(name)
    return (float(found[0]), float(found[1])) if found else None


def outside(query: Mapping[str, Any]) -> list[str]:
    """A sentence for every field that lies outside the points that were fitted; `cluster` is its key."""
    sentences = []
    clusters = fits()["clusters"]
    if "cluster" in query and clusters and query["cluster"] not in clusters:
        sentences.append(f"cluster = {query['cluster']}: outside the calibrated range, kernels were measured on {', '.join(clusters)} only")
    for name, value in query.items():
        limits = calibrated_range(name) if name != "cluster" else None
        if limits and not limits[0] <= value <= limits[1]:
            low, high = (f"{limit:g}" for limit in limits)
            measured = low if low == high else f"{low} to {high}"
            sentences.append(f"{name} = {value:g}: outside the calibrated range, measured at {measured}")
    return sentences
