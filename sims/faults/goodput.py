"""Lost nodes: how much of the time is work, against the time between checkpoints.

All nodes train together, so the first to fail stops all; failures are exponential with the nodes' rates added up.  What was done since
the last checkpoint that is safe on the disk is lost, a spare takes the node's place (or a repair is waited for), and the run restarts,
during which nodes fail as well.  One SimPy event per failure: whole periods of work and checkpoint between two failures are counted.
"""

from collections.abc import Generator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import simpy

from research import accounting
from research.configfile import read_yaml, validate
from research.errors import ConfigError
from sims.cluster import Figure
from sims.quantiles import Quantiles
from sims.serving.spec import model_config
from sims.simulation import simulate

RELIABILITY = Path(__file__).with_name("reliability.yaml")
MOST_FAILURES = 5e5
"""Of all runs of an interval together: what some ten seconds can simulate."""
GRID = tuple(2.0 ** (i / 2) for i in range(-6, 7))
"""Intervals that are tried, as multiples of Daly's."""


Events = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """A long run on `nodes` nodes.  Null: the figure of `reliability.yaml`, or what follows from the others."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    nodes: int = 128
    node_mtbf_hours: float | None = None
    """Mean time between failures of one node."""
    model: str = "deepseek-v2"
    """Whose weights and optimizer state a checkpoint holds."""
    checkpoint_bytes: float | None = None
    storage_bytes_per_second: float | None = None
    """Written per node."""
    checkpoint_seconds: float | None = None
    """Until a checkpoint is safe; null: bytes over the nodes' bandwidth."""
    stall_seconds: float | None = None
    """That training stands still for a checkpoint; null: until it is safe (synchronous)."""
    restart_seconds: float | None = None
    spare_nodes: int | None = None
    """Null: there is always one.  Otherwise lost nodes come back after `repair_hours`, and with no spare left all wait."""
    repair_hours: float | None = None
    intervals: tuple[float, ...] = ()
    """Seconds of work between checkpoints that are tried; empty: an eighth to eight times Daly's optimum."""
    work_hours: float = 720.0
    """Of undisturbed training."""
    runs: int = 64
    """Each with failures of its own, the same for all intervals."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nodes", "runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        positive = ("node_mtbf_hours", "checkpoint_bytes", "storage_bytes_per_second", "checkpoint_seconds", "repair_hours", "work_hours")
        for name in positive:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        for name in ("stall_seconds", "restart_seconds", "spare_nodes", "seed"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        if any(not each > 0 for each in self.intervals):
            raise ValueError(f"intervals={list(self.intervals)} must be > 0 seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The question with every number filled in, in seconds."""

    mtbf: float
    """Of the whole: one node's over the number of nodes."""
    safe: float
    stall: float
    restart: float
    repair: float
    spares: int | None
    work: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One interval.  Shares are of the wall-clock time, means over the runs; goodput is the share of work that counts."""

    interval_seconds: float
    goodput: Quantiles
    """Over the runs."""
    mean: float
    standard_error: float
    closed_form: float | None
    """Expected work over expected time (Daly 2006); null where none is known (checkpoints in the background, finite spares)."""
    checkpointing: float
    lost: float
    restarting: float
    waiting: float
    failures: float
    """Per run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GoodputResult:
    """Goodput against the interval between checkpoints."""

    nodes: int
    mtbf_hours: float
    """Of all nodes together."""
    checkpoint_bytes: float | None
    checkpoint_seconds: float
    stall_seconds: float
    young_seconds: float
    """sqrt(2 C M)."""
    daly_seconds: float
    """Daly's higher-order optimum."""
    points: list[Point]
    best_seconds: float
    """The interval with the best mean."""
    best_range_seconds: tuple[float, float]
    """Least and largest interval that the runs do not tell from it: paired difference within two standard errors."""
    warnings: list[str]
    constants: dict[str, Any]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@simulate.register
def _(spec: Goodput, trace: Any = None) -> GoodputResult:
    del trace
    return simulate_goodput(spec)


def simulate_goodput(spec: Goodput) -> GoodputResult:
    """ConfigError where an interval is shorter than its checkpoint takes to be safe in the background."""
    setting, size = settle(spec)
    optimum = daly(setting.stall, setting.mtbf)
    intervals = sorted(spec.intervals) or [factor * optimum for factor in GRID if factor * optimum + setting.stall >= setting.safe]
    for interval in intervals:
        if interval + setting.stall < setting.safe:
            raise ConfigError(
                f"intervals: {interval:g} s of work and a stall of {setting.stall:g} s are shorter than the {setting.safe:g} s of a checkpoint"
            )
    expected = {interval: _log_failures(setting, interval) for interval in intervals}
    possible = [interval for interval in intervals if expected[interval] <= np.log(MOST_FAILURES / spec.runs)]
    if not possible or (spec.intervals and possible != intervals):
        raise ConfigError(_endless(setting, spec, min(set(intervals) - set(possible), key=lambda interval: expected[interval])))
    outcomes = {interval: [_run(setting, interval, (spec.seed, run)) for run in range(spec.runs)] for interval in possible}
    points = [_point(setting, interval, found) for interval, found in outcomes.items()]
    best = max(points, key=lambda point: point.mean)
    alike = [p.interval_seconds for p in points if not _worse(setting, outcomes[p.interval_seconds], outcomes[best.interval_seconds])]
    warnings = []
    if possible != intervals:
        warnings.append(f"intervals above {max(possible):,.0f} s are left out: runs with them hardly ever end, so many periods are interrupted")
    if setting.stall >= setting.mtbf:
        warnings.append(f"a checkpoint stalls training for {setting.stall:,.0f} s, longer than the {setting.mtbf:,.0f} s between failures")
    return GoodputResult(
        nodes=spec.nodes,
        mtbf_hours=setting.mtbf / 3600,
        checkpoint_bytes=size,
        checkpoint_seconds=setting.safe,
        stall_seconds=setting.stall,
        young_seconds=young(setting.stall, setting.mtbf),
        daly_seconds=optimum,
        points=points,
        best_seconds=best.interval_seconds,
        best_range_seconds=(min(alike), max(alike)),
        warnings=warnings,
        constants={name: asdict(figure) for name, figure in reliability().items()},
        seed=spec.seed,
    )


@cache
def reliability() -> dict[str, Figure]:
    """Figures by name."""
    return {name: validate(Figure, value, f"{RELIABILITY.name}: {name}") for name, value in read_yaml(RELIABILITY).items()}


def settle(spec: Goodput) -> tuple[Setting, float | None]:
    """Defaults filled in, and the bytes of a checkpoint where they matter."""

    def given(name: str) -> float:
        value = getattr(spec, name)
        return float(reliability()[name].value if value is None else value)

    size = None
    if spec.checkpoint_seconds is None:
        parameters = accounting.total_parameters(model_config(spec.model, "faults goodput"))
        size = spec.checkpoint_bytes or parameters * reliability()["bytes_per_parameter"].value
    safe = spec.checkpoint_seconds if size is None else size / (spec.nodes * given("storage_bytes_per_second"))
    assert safe is not None
    stall = safe if spec.stall_seconds is None else spec.stall_seconds
    if stall > safe:
        raise ConfigError(f"stall_seconds = {stall:g}: must be <= the {safe:g} s until the checkpoint is safe")
    setting = Setting(
        mtbf=given("node_mtbf_hours") * 3600 / spec.nodes,
        safe=safe,
        stall=stall,
        restart=given("restart_seconds"),
        repair=given("repair_hours") * 3600,
        spares=spec.spare_nodes,
        work=spec.work_hours * 3600,
    )
    return setting, size


def _log_failures(setting: Setting, interval: float) -> float:
    """Logarithm of the failures that a run expects, those of restarts included: periods times e^(R/M) (e^((T + C)/M) - 1)."""
    period = (interval + setting.safe) / setting.mtbf
    # log(e^x - 1), without e^x.
    each = period + float(np.log(-np.expm1(-period)))
    return float(np.log(max(setting.work / interval, 1.0))) + setting.restart / setting.mtbf + each


def _endless(setting: Setting, spec: Goodput, interval: float) -> str:
    return (
        f"intervals = {interval:g} s: with a failure every {setting.mtbf:g} s (node_mtbf_hours = {setting.mtbf * spec.nodes / 3600:g} over "
        f"nodes = {spec.nodes}), restart_seconds = {setting.restart:g} and checkpoint_seconds = {setting.safe:g} a run of work_hours = "
        f"{spec.work_hours:g} expects e^{_log_failures(setting, interval):.0f} failures, more than can be simulated; take fewer nodes or runs, "
        "shorter restarts or intervals, less work, or a larger node_mtbf_hours"
    )


def young(stall: float, mtbf: float) -> float:
    """Seconds of work between checkpoints of `stall` seconds (Young 1974): first order in stall / mtbf."""
    return float(np.sqrt(2 * stall * mtbf))


def daly(stall: float, mtbf: float) -> float:
    """Daly's optimum (2006, equation 37): sqrt(2 C M) (1 + sqrt(C / 2 M) / 3 + (C / 2 M) / 9) - C for C < 2 M, else M."""
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    # Without a stall the more checkpoints the better; a second is then short enough.
    return max(float(np.sqrt(2 * stall * mtbf) * (1 + np.sqrt(ratio) / 3 + ratio / 9) - stall), 1.0)


def expected_goodput(setting: Setting, interval: float) -> float | None:
    """Interval over the expected time of one period: M e^(R/M) (e^((T + C)/M) - 1), failures during checkpoints and restarts included."""
    if setting.stall != setting.safe or setting.spares is not None:
        return None
    m = setting.mtbf
    return float(interval / (m * np.exp(setting.restart / m) * np.expm1((interval + setting.stall) / m)))


@dataclass(kw_only=True, slots=True)
class Outcome:
    """Seconds of one run by what they were spent on."""

    work: float = 0.0
    checkpointing: float = 0.0
    lost: float = 0.0
    restarting: float = 0.0
    waiting: float = 0.0
    failures: int = 0

    @property
    def total(self) -> float:
        return self.work + self.checkpointing + self.lost + self.restarting + self.waiting


def _run(setting: Setting, interval: float, seed: tuple[int, int]) -> Outcome:
    """One run to its end.  Every interval sees the same gaps between failures (common random numbers)."""
    environment, random, outcome = simpy.Environment(), np.random.default_rng(seed), Outcome()
    spares = None if setting.spares is None else simpy.Container(environment, init=setting.spares)

    def repair() -> Events:
        yield environment.timeout(setting.repair)
        assert spares is not None
        yield spares.put(1)

    def replace_node() -> Events:
        """After a failure: a spare, then the restart, until one is not interrupted."""
        while True:
            outcome.failures += 1
            if spares is not None:
                environment.process(repair())
                since = environment.now
                yield spares.get(1)
                outcome.waiting += environment.now - since
            until = float(random.exponential(setting.mtbf))
            yield environment.timeout(min(until, setting.restart))
            outcome.restarting += min(until, setting.restart)
            if until >= setting.restart:
                return

    def train() -> Events:
        period = interval + setting.stall
        while (left := setting.work - outcome.work) > 1e-6:
            until = float(random.exponential(setting.mtbf))
            checkpoints = max(int(np.ceil(left / interval - 1e-9)) - 1, 0)
            if until >= left + checkpoints * setting.stall:
                yield environment.timeout(left + checkpoints * setting.stall)
                outcome.work += left
                outcome.checkpointing += checkpoints * setting.stall
                return
            # A checkpoint is safe `safe` seconds after the work before it.
            saved = max(int(np.floor((until - interval - setting.safe) / period)) + 1, 0)
            yield environment.timeout(until)
            outcome.work += saved * interval
            outcome.checkpointing += saved * setting.stall
            outcome.lost += until - saved * period
            yield from replace_node()

    environment.run(environment.process(train()))
    assert abs(outcome.total - environment.now) <= 1e-6 * environment.now, "every second has one use"
    return outcome


def _goodputs(setting: Setting, found: list[Outcome]) -> np.ndarray:
    return np.array([setting.work / outcome.total for outcome in found])


def _point(setting: Setting, interval: float, found: list[Outcome]) -> Point:
    goodput = _goodputs(setting, found)

    def share(name: str) -> float:
        return float(np.mean([getattr(outcome, name) / outcome.total for outcome in found]))

    return Point(
        interval_seconds=float(interval),
        goodput=Quantiles.of(goodput),
        mean=float(goodput.mean()),
        standard_error=float(goodput.std(ddof=1) / np.sqrt(len(goodput))) if len(goodput) > 1 else 0.0,
        closed_form=expected_goodput(setting, interval),
        checkpointing=share("checkpointing"),
        lost=share("lost"),
        restarting=share("restarting"),
        waiting=share("waiting"),
        failures=float(np.mean([outcome.failures for outcome in found])),
    )


def _worse(setting: Setting, found: list[Outcome], best: list[Outcome]) -> bool:
    """Whether the paired differences of the runs are below zero by more than two standard errors."""
    difference = _goodputs(setting, best) - _goodputs(setting, found)
    if len(difference) < 2:
        return bool(difference[0] > 0)
    return bool(difference.mean() > 2 * difference.std(ddof=1) / np.sqrt(len(difference)))
