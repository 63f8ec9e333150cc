"""Fit the constants of the communication kernels on the measured points of `calibration/all_to_all.yaml`.

The best fit is the mode of the posterior in logarithms: measured against predicted seconds with each point's spread, and each
constant against its prior.  Draws are refits after every point and every prior has been moved by a draw of its own spread (for
a linear model these are exact draws of the posterior): a constant that no point sees keeps the spread of its prior.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from research.atomic import write_text
from research.configfile import apply_overrides, nearest, read_yaml, validate
from research.errors import ConfigError
from sims.all_to_all import AllToAll, Plan, plan
from sims.cluster import Cluster
from sims.collective import Moved, collective_seconds, moved_bytes
from sims.constants import CALIBRATION, Constants, Prior, priors, spread_normal
from sims.traffic import Traffic

FITTED = CALIBRATION / "fitted.json"
POINTS = CALIBRATION / "all_to_all.yaml"
FREE = ("nvlink_efficiency", "relay_efficiency", "nic_efficiency", "sm_efficiency", "combine_efficiency", "interference_exponent",
        "latency_factor", "network_latency_factor", "header_bytes")  # fmt: skip
"""Constants that a point might see: all that stand in the time of a dispatch or a combine."""
DRAWS = 128
IDENTIFIED = 0.7
"""A constant counts as identified if the points narrow its spread to this share of the prior's or less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One measurement; `value` in seconds, or in logical bytes per second and GPU."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str
    cluster: str
    nodes: int
    sms: int
    direction: Literal["dispatch", "combine"]
    value: float
    unit: Literal["s", "bytes/s"]
    basis: Literal["measured", "logical nvlink", "logical infiniband"]
    spread: float
    used_for: Literal["fit"]
    source: str
    date: str

    def __post_init__(self) -> None:
        if not self.value > 0 or not self.spread > 0:
            raise ValueError(f"value={self.value} and spread={self.spread} must be > 0")
        if (self.unit == "s") != (self.basis == "measured"):
            raise ValueError(f"basis={self.basis!r} does not go with unit={self.unit!r}")


@dataclass(frozen=True, slots=True)
class Case:
    """A point with the bytes of its question and what was measured in seconds."""

    point: Point
    spec: AllToAll
    cluster: Cluster
    traffic: Traffic
    moved: Moved
    seconds: float


@cache
def cases(path: Path = POINTS) -> list[Case]:
    """All points of the file; ConfigError names path and value."""
    return _cases(read_yaml(path), path)


def _cases(mapping: Mapping[str, Any], path: Path) -> list[Case]:
    found = []
    for index, value in enumerate(mapping.get("points", [])):
        point = validate(Point, value, f"{path.name}: points.{index}")
        question = {**mapping.get("workload", {}), "cluster": point.cluster, "nodes": point.nodes, "sms": point.sms}
        spec = validate(AllToAll, question, f"{path.name}: points.{index} ({point.name})")
        planned = _planned(json.dumps(asdict(spec)))
        traffic = planned.dispatch if point.direction == "dispatch" else planned.combine
        logical = traffic.logical.sum() if point.basis == "logical nvlink" else traffic.node_logical.sum()
        seconds = point.value if point.unit == "s" else float(logical) / planned.placement.devices / point.value
        found.append(Case(point, spec, planned.cluster, traffic, moved_bytes(traffic), seconds))
    return found


@lru_cache(maxsize=16)
def _planned(question: str) -> Plan:
    """Of an `AllToAll` in JSON: dispatch and combine of one question are planned once, and other values of the points need no other plan."""
    return plan(AllToAll(**json.loads(question)))


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is fitted: the points with their workload, what is believed before them, and how many draws are made."""

    cases: list[Case]
    priors: Mapping[str, Prior]
    draws: int


def inputs(overrides: Iterable[str] = ()) -> Inputs:
    """The committed files with `--set` laid over them: `priors.NAME.best` (low, high) of a free constant, `points.NAME.value` (spread, sms,
    ...) of a point, `workload.FIELD` of all points' question, and `draws`.

    ConfigError names a path that is none, and a value that cannot be.
    """
    given = list(overrides)
    mapping, known = read_yaml(POINTS), priors()
    points = {point["name"]: point for point in mapping["points"]}
    nested = {"draws": DRAWS, "priors": {name: asdict(known[name]) for name in FREE}, "points": points, "workload": mapping["workload"]}
    for override in given:
        _check_path(override, nested)
    changed = apply_overrides(nested, given)
    draws = changed["draws"]
    if type(draws) is not int or not 2 <= draws <= MOST_DRAWS:
        raise ConfigError(f"calibrate: draws = {draws!r}: must be a whole number in 2..{MOST_DRAWS}")
    believed = {name: validate(Prior, value, f"calibrate: priors.{name}") for name, value in changed["priors"].items()}
    content = {"points": list(changed["points"].values()), "workload": changed["workload"]}
    return Inputs(_cases(content, POINTS) if given else cases(), {**known, **believed}, draws)


MOST_DRAWS = 10_000


def _check_path(override: str, nested: Mapping[str, Any]) -> None:
    """ConfigError for what is no path of one value in `nested`; fields of a workload are looked at when it is read."""
    path, equals, _ = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected path=value, such as points.{next(iter(nested['points']))}.spread=0.02")
    node: Any = nested
    for depth, key in enumerate(keys := path.strip().split(".")):
        if keys[0] == "workload" and depth == 1:
            return
        if not isinstance(node, Mapping) or key not in node:
            choices = node if isinstance(node, Mapping) else []
            raise ConfigError(f"--set {path}: {'.'.join(keys[: depth + 1])} is no input of the calibration{nearest(key, choices)}")
        node = node[key]
    if isinstance(node, Mapping):
        raise ConfigError(f"--set {path}: names several values; add one of {', '.join(map(str, node))}, as in {path.strip()}.{next(iter(node))}=...")


def constants_at(logs: np.ndarray) -> Constants:
    """Draws of the free constants at exp(logs), logs (draws, constants); the rest at their priors' best."""
    values = {name: np.full(len(logs), prior.best) for name, prior in priors().items()} | {"unexplained": np.ones(len(logs))}
    values |= {name: np.exp(logs[:, i]) for i, name in enumerate(FREE)}
    return Constants(values, dict.fromkeys(values, ""))


def predicted(found: Sequence[Case], logs: np.ndarray) -> np.ndarray:
    """Seconds of each case, float64 (draws, cases)."""
    constants = constants_at(logs)
    return np.stack([collective_seconds(c.traffic, c.cluster, constants, sms=c.spec.sms, moved=c.moved) for c in found], axis=1)


def fit(
    found: Sequence[Case],
    point_shift: np.ndarray,
    prior_shift: np.ndarray,
    weight: np.ndarray | None = None,
    known: Mapping[str, Prior] | None = None,
) -> np.ndarray:
    """Logarithms of the free constants at the mode of each of n problems, float64 (n, constants).

    Shifts (n, cases) and (n, constants) move measurements and priors by so many of their spreads; `weight` (n, cases) of 0 leaves a
    case out; `known` are other priors.  Gauss-Newton, all problems at once; the residuals are nearly linear in the logarithms.
    """
    spread, (centre, width) = np.array([c.point.spread for c in found]), _prior(known)
    measured = np.log([c.seconds for c in found]) + point_shift * spread
    goal = centre + prior_shift * width
    logs, weight = goal.copy(), np.ones_like(measured) if weight is None else weight
    for _ in range(ITERATIONS):
        residual, slope = (measured - np.log(predicted(found, logs))) / spread * weight, _slopes(found, logs) * (weight / spread)[..., None]
        curvature = np.einsum("ncp,ncq->npq", slope, slope) + np.diag(width**-2.0)
        gradient = np.einsum("ncp,nc->np", slope, residual) + (goal - logs) / width**2
        move = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        logs = logs + np.clip(move, -LONGEST_STEP, LONGEST_STEP)
        if np.abs(move).max() < 1e-9:
            break
    return logs


ITERATIONS, LONGEST_STEP = 60, 0.2


def _slopes(found: Sequence[Case], logs: np.ndarray) -> np.ndarray:
    """float64 (n, cases, constants): d log seconds / d log constant, the Jacobian that says which point sees which constant."""
    step, (n, size) = 1e-4, logs.shape
    shift = np.eye(size) * step
    both = np.log(predicted(found, np.concatenate([logs[:, None] + shift, logs[:, None] - shift], axis=1).reshape(-1, size)))
    up, down = both.reshape(n, 2, size, -1).swapaxes(0, 1)
    return np.asarray(((up - down) / (2 * step)).swapaxes(1, 2))


def _prior(known: Mapping[str, Prior] | None = None) -> tuple[np.ndarray, np.ndarray]:
    known = priors() if known is None else known
    return np.log([known[name].best for name in FREE]), np.array([known[name].log_spread for name in FREE])


def calibrate(overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Fit, residuals, leave-one-out errors, identifiability and draws: what is written to `fitted.json`.  `overrides` as in `inputs`."""
    return _calibrated(overrides)


@cache
def _calibrated(overrides: tuple[str, ...]) -> dict[str, Any]:
    given = inputs(overrides)
    found, draws, known = given.cases, given.draws, given.priors
    random = np.random.default_rng(0)
    shifts = np.stack([spread_normal(random, draws) for _ in range(len(found) + len(FREE))], axis=1)
    drawn = fit(found, shifts[:, : len(found)], shifts[:, len(found) :], known=known)
    best, measured = drawn[0], np.array([c.seconds for c in found])
    residual = predicted(found, best[None])[0] / measured - 1
    others = fit(found, np.zeros((len(found),) * 2), np.zeros((len(found), len(FREE))), 1.0 - np.eye(len(found)), known)
    left_out = predicted(found, others).diagonal() / measured - 1
    spread, (centre, width) = drawn[1:].std(0, ddof=1), _prior(known)
    seen = _slopes(found, best[None])[0]
    return {
        "constants": {
            name: {
                "source": f"fitted on {len(found)} points of {POINTS.name}"
                if spread[i] / width[i] <= IDENTIFIED
                else "prior and points together; the points hardly narrow the prior",
                "best": _round(np.exp(best[i])),
                "prior_best": _round(np.exp(centre[i])),
                "log_spread": _round(spread[i]),
                "prior_log_spread": _round(width[i]),
                "identified": bool(spread[i] / width[i] <= IDENTIFIED),
                "seen_by": {c.point.name: _round(e) for c, e in zip(found, seen[:, i], strict=True) if abs(e) >= 0.02},
                "draws": [_round(x) for x in np.exp(drawn[:, i])],
            }
            for i, name in enumerate(FREE)
        },
        "points": [
            {
                **asdict(case.point),
                "seconds": _round(case.seconds),
                "residual": _round(residual[i]),
                "leave_one_out": _round(left_out[i]),
            }
            for i, case in enumerate(found)
        ],
        "mean_absolute_residual": _round(np.abs(residual).mean()),
        "mean_absolute_leave_one_out": _round(np.abs(left_out).mean()),
        "unexplained_log_spread": _round(float(np.sqrt((np.log1p(left_out) ** 2).mean()))),
        "clusters": sorted({c.point.cluster for c in found}),
        "range": {
            name: [min(values), max(values)]
            for name, values in {
                "nodes": [c.spec.nodes for c in found],
                "sms": [c.point.sms for c in found],
                "tokens_per_device": [c.spec.tokens_per_device for c in found],
                "hidden_size": [c.spec.hidden_size for c in found],
                "num_experts_per_tok": [c.spec.num_experts_per_tok for c in found],
            }.items()
        },
    }


def _round(value: float) -> float:
    """Seven digits: more would differ between machines."""
    return float(f"{value:.7g}")


def write(fitted: dict[str, Any], path: Path = FITTED) -> None:
    """As JSON, atomically, the same bytes each time."""
    write_text(path, json.dumps(fitted, indent=1) + "\n")
