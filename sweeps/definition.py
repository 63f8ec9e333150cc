"""What a study is: the values behind its YAML file, and the run configurations that follow from them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import yaml

from research import configfile
from research.accounting import KV_BITS
from research.config import RunConfig
from research.errors import ConfigError
from sims import AllToAll
from sweeps import schema
from sweeps.budget import Budget, Match, match, with_values
from sweeps.constraints import Constraint, parse
from sweeps.places import MOST_LETTERS, is_name
from sweeps.pruning import Pruner
from sweeps.quantities import QUANTITIES
from sweeps.retune import Retune, with_rate
from sweeps.samplers import DESIGNED, DRAWN
from sweeps.space import Entry, Range, coerced
from sweeps.variants import VARIANT, laid_over

__all__ = ["METRICS", "Objective", "Range", "Resources", "Search", "SimulatedCluster", "Study", "label", "own_problems", "short_name"]

_FORBID_UNKNOWN: Any = {"extra": "forbid", "allow_inf_nan": False}

LARGEST_SEED = 2**32 - 1
METRICS = sorted(value for name, value in vars(schema).items() if name.isupper() and isinstance(value, str) and value.split("/")[0] in
                 ("train", "routing", "validation", "model", "simulation", "reference", "parallel") and "/" in value)  # fmt: skip
METRICS += schema.cache_metrics(KV_BITS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How cells are chosen: `one-factor` and `grid` try each once, the others draw `trials` of them, the baseline first."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    sampler: Literal["one-factor", "grid", "random", "quasi-random", "tpe", "gp", "nsga2"] = "one-factor"
    trials: int | None = None
    seed: int = 0
    population: int | None = None
    """Of `nsga2`; null: a fifth of the trials, 4 to 50."""

    def __post_init__(self) -> None:
        drawn = self.sampler in DRAWN
        if drawn != (self.trials is not None):
            raise ValueError(
                f"trials={self.trials} with sampler={self.sampler}: {', '.join(DRAWN)} need a number, {' and '.join(DESIGNED)} try every cell once"
            )
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials={self.trials} must be >= 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be >= 0")
        if self.population is not None and self.sampler != "nsga2":
            raise ValueError(f"population={self.population} with sampler={self.sampler}: only nsga2 has generations")
        most = (self.trials or 0) - 1
        if self.population is not None and not 2 <= self.population <= most:
            raise ValueError(f"population={self.population} must lie in 2..{most}, below trials: one generation alone is random search")

    @property
    def designed(self) -> bool:
        return self.sampler in DESIGNED

    @property
    def generation(self) -> int:
        return self.population or min(max((self.trials or 0) // 5, 4), 50)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"


@dataclass(frozen=True, kw_only=True, slots=True)
class Expects:
    """The effect that a publication predicts: the report says whether the study could have shown it, and else what it would take."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    effect: float
    """Of the first objective, in its unit; its size alone, whichever way it goes."""
    source: str
    """Where it is published, and how it was converted: it stands in the report."""

    def __post_init__(self) -> None:
        if self.effect <= 0:
            raise ValueError(f"effect={self.effect} must be > 0: the size of a difference, without its sign")
        if not self.source.strip():
            raise ValueError("source='' must say where the effect is published")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """`workers: auto` is one per core, or as many as the fractions of GPUs allow where there are GPUs."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.5
    """Only asked for where the machine or cluster has GPUs."""
    workers: int | Literal["auto"] = "auto"
    gpus: Literal["auto", "required", "none"] = "auto"
    """`auto`: GPUs where there are some.  `required`: a mistake where there are none.  `none`: not even then."""
    workers_per_trial: int = 1
    """Workers that train one run together, on one node if they can; for functions that say that they can be so trained."""
    hang_seconds: float = 1800.0
    """A worker that recorded nothing for so long is replaced: longer than `record_every` steps and a validation take.  What a
    run has shown to need is waited for ten times over."""

    def __post_init__(self) -> None:
        if self.workers_per_trial < 1:
            raise ValueError(f"workers_per_trial={self.workers_per_trial} must be >= 1")
        if self.hang_seconds <= 0:
            raise ValueError(f"hang_seconds={self.hang_seconds} must be > 0")
        if self.cpus_per_worker < 1:
            raise ValueError(f"cpus_per_worker={self.cpus_per_worker} must be >= 1")
        if not 0 <= self.gpus_per_worker <= 64:
            raise ValueError(f"gpus_per_worker={self.gpus_per_worker} must lie in 0..64")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"gpus_per_worker={self.gpus_per_worker} must be a fraction of one GPU or a whole number of them")
        if self.workers != "auto" and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be >= 1 or 'auto'")
        if self.gpus == "required" and self.gpus_per_worker == 0:
            raise ValueError("gpus=required with gpus_per_worker=0: nothing would be asked for")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedCluster:
    """The cluster on which every trained model's routing is simulated."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    file: str = "h800"
    nodes: int = 2
    gpus_per_node: int = 4
    tokens_per_device: int = 4096
    hidden_size: int = 5120
    dispatch_bits: int = 16
    combine_bits: int = 16

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "tokens_per_device", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")


@dataclass(frozen=True, kw_only=True)
class Study:
    """See sweeps/studies/quickstart.yaml for every key with a comment."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    name: str
    question: str
    base: dict[str, Any]
    baseline: dict[str, Any]
    space: dict[str, Entry]
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Whole alternatives by name, each laid over `base`: the dimension `variant` of the space; see `sweeps.variants`."""
    search: Search = field(default_factory=Search)
    objectives: list[Objective] = field(default_factory=lambda: [Objective(metric=schema.BITS_PER_BYTE)])
    expects: Expects | None = None
    constraints: list[str] = field(default_factory=list)
    """What a cell must keep to; see `sweeps.constraints`."""
    pruner: Pruner = field(default_factory=Pruner)
    seeds: list[int] = field(default_factory=lambda: [0])
    budget: Budget = field(default_factory=Budget)
    retune: Retune | None = None
    resources: Resources = field(default_factory=Resources)
    cluster: SimulatedCluster = field(default_factory=SimulatedCluster)

    def __post_init__(self) -> None:
        for problem in own_problems(self.name, self.question, self.seeds, [o.metric for o in self.objectives]):
            raise ValueError(problem)

    @property
    def runs_per_trial(self) -> int:
        return len(self.seeds) + (self.retune.points if self.retune else 0)

    @cached_property
    def bounds(self) -> list[Constraint]:
        """The constraints, read; ValueError if one cannot be (which `check` tells)."""
        return [parse(text, METRICS) for text in self.constraints]

    @cached_property
    def _bases(self) -> dict[str | None, tuple[dict[str, Any], RunConfig | None]]:
        """By variant (None: `base` itself): the mapping, and its configuration, None where only a cell makes it possible."""
        found: dict[str | None, tuple[dict[str, Any], RunConfig | None]] = {}
        mappings: list[tuple[str | None, dict[str, Any]]] = [(None, self.base)]
        mappings += [(name, laid_over(self.base, over)) for name, over in self.variants.items()]
        for name, mapping in mappings:
            found[name] = (mapping, None)
            with suppress(ConfigError):
                found[name] = (mapping, configfile.load_run_config(mapping))
        return found

    def unmatched_config(self, cell: Mapping[str, Any], seed: int) -> RunConfig:
        """The configuration that the file says; ConfigError if the cell is impossible."""
        mapping, base = self._bases[cell.get(VARIANT)]
        settings = {path: value for path, value in cell.items() if path != VARIANT}
        if base is not None:
            # A tenth of the time that reading the whole mapping anew takes; that is left to what is wrong, for its sentences.
            with suppress(ValueError):
                config: RunConfig = with_values(base, {path: coerced(path, value) for path, value in settings.items()} | {"seed": seed})
                return config
        overrides = [f"{path}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for path, value in settings.items()]
        return configfile.load_run_config({**mapping, "seed": seed}, f"study {self.name}, cell {label(cell, {})}", overrides)

    def matched_config(self, cell: Mapping[str, Any], seed: int) -> tuple[RunConfig, Match | None]:
        """The configuration with its budget matched, and how well it is; ConfigError if the cell is impossible or cannot be."""
        config = self.unmatched_config(cell, seed)
        if self.budget.matched == "none":
            return config, None
        if self.budget.matched == "tokens":
            tokens = float(config.tokens)
            if abs(tokens / self.requested - 1) > self.budget.within:
                raise ConfigError(
                    f"study {self.name}, cell {label(cell, {})}: budget.matched = tokens: whole batches make {tokens:,.0f} tokens, the baseline's "
                    f"{self.requested:,.0f} ({tokens / self.requested - 1:+.1%}, more than budget.within); train longer, or match none"
                )
            return config, Match(quantity="tokens", requested=float(config.training.train_tokens), achieved=tokens, adjusted=None, value=None)
        try:
            return match(self, config, self.requested)
        except ConfigError as error:
            raise ConfigError(*(f"study {self.name}, cell {label(cell, {})}: {problem}" for problem in error.problems)) from error

    @cached_property
    def requested(self) -> float:
        """How much of the matched quantity every variant is to have: the target, or what the baseline has (tokens in whole batches)."""
        if self.budget.target is not None:
            return self.budget.target
        return QUANTITIES[self.budget.matched](self, self.unmatched_config(self.baseline, self.seeds[0]))

    def run_config(self, cell: Mapping[str, Any], seed: int, learning_rate: float | None = None) -> RunConfig:
        """The resolved configuration of one run, its budget matched; ConfigError if the cell is impossible.

        `learning_rate` is that of a variant whose rate was re-tuned.
        """
        config = self.matched_config(cell, seed)[0]
        return config if learning_rate is None else with_rate(config, learning_rate)

    def all_to_all(self, config: RunConfig) -> AllToAll:
        """The simulation of one run's routing.  ValueError if its experts do not fit on the cluster's GPUs."""
        moe = config.model.moe
        assert moe is not None
        c = self.cluster
        if moe.n_routed_experts % (c.nodes * c.gpus_per_node):
            raise ValueError(
                f"nodes={c.nodes} x gpus_per_node={c.gpus_per_node} = {c.nodes * c.gpus_per_node} GPUs must divide "
                f"n_routed_experts={moe.n_routed_experts}"
            )
        return AllToAll(
            cluster=c.file,
            nodes=c.nodes,
            gpus_per_node=c.gpus_per_node,
            tokens_per_device=c.tokens_per_device,
            hidden_size=c.hidden_size,
            n_routed_experts=moe.n_routed_experts,
            num_experts_per_tok=moe.num_experts_per_tok,
            expert_devices=moe.expert_devices,
            device_limit=moe.device_limit,
            dispatch_bits=c.dispatch_bits,
            combine_bits=c.combine_bits,
        )


def own_problems(name: Any, question: Any, seeds: Any, metrics: list[Any]) -> list[str]:
    """What is wrong with values that are right in type; others are passed over."""
    found = []
    if isinstance(name, str) and not is_name(name):
        found.append(f"name = {name!r}: must be 1 to {MOST_LETTERS} letters, digits, - and _, no - in front: it names a directory")
    if isinstance(question, str) and not question.strip():
        found.append("question = '': must say what is asked: it stands at the head of the report")
    if isinstance(seeds, list) and all(isinstance(s, int) for s in seeds):
        if not (seeds and len(set(seeds)) == len(seeds) and min(seeds) >= 0):
            found.append(f"seeds = {seeds}: must be distinct numbers >= 0, at least one: two runs of one seed are one run")
        elif max(seeds) > LARGEST_SEED:
            found.append(f"seeds = {seeds}: must be at most {LARGEST_SEED}")
    if not metrics:
        found.append("objectives = []: must name at least one metric")
    if len(set(map(str, metrics))) < len(metrics):
        found.append(f"objectives = {metrics}: the same metric stands there twice")
    return found


def label(cell: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """A short readable name of a cell: what differs from the baseline, `baseline` if nothing does; a named variant by its name."""
    parts = [
        str(value) if path == VARIANT else f"{short_name(path)}={'none' if value is None else value}"
        for path, value in cell.items()
        if path not in baseline or baseline[path] != value
    ]
    return ", ".join(parts) or "baseline"


def short_name(path: str) -> str:
    """`device_limit` for model.moe.device_limit, `balance.expert` for a balance weight."""
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-2:-1] == ["balance"] else parts[-1]
