"""A study: one YAML file that says what is asked, of what, over what, and with which means."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import TypeAdapter

from research import configfile
from research.config import RunConfig
from research.data import corpora
from research.errors import ConfigError, DataError
from sims import AllToAll, load_cluster
from sweeps import schema
from sweeps.space import Range, cells, contains, dimension_problems, value_problem

_FORBID_UNKNOWN: Any = {"extra": "forbid"}

_NAME = "name = {!r}: must be letters, digits, - and _: it names a directory"
_QUESTION = "question = '': must say what is asked: it stands at the head of the report"
_SEEDS = "seeds = {}: must be distinct numbers >= 0, at least one: two runs of one seed are one run"

METRICS = sorted(value for name, value in vars(schema).items() if name.isupper() and isinstance(value, str) and value.split("/")[0] in
                 ("train", "routing", "validation", "model", "simulation", "reference"))  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How cells are chosen: `one-factor` and `grid` try each once, `random` and `tpe` draw `trials` of them."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    sampler: Literal["one-factor", "grid", "random", "tpe"] = "one-factor"
    trials: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        drawn = self.sampler in ("random", "tpe")
        if drawn != (self.trials is not None):
            raise ValueError(
                f"trials={self.trials} with sampler={self.sampler}: random and tpe need a number, one-factor and grid try every cell once"
            )
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials={self.trials} must be >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What is held equal between the variants."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    matched: Literal["tokens"] = "tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """`workers: auto` is one per core, or as many as the fractions of GPUs allow where there are GPUs."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    cpus_per_worker: int = 1
    gpus_per_worker: float = 0.5
    """Only asked for where the machine or cluster has GPUs."""
    workers: int | Literal["auto"] = "auto"
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
        if self.workers != "auto" and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be >= 1 or 'auto'")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """See sweeps/studies/quickstart.yaml for every key with a comment."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    name: str
    question: str
    base: dict[str, Any]
    baseline: dict[str, Any]
    space: dict[str, list[Any] | Range]
    search: Search = field(default_factory=Search)
    objectives: list[Objective] = field(default_factory=lambda: [Objective(metric=schema.BITS_PER_BYTE)])
    seeds: list[int] = field(default_factory=lambda: [0])
    budget: Budget = field(default_factory=Budget)
    resources: Resources = field(default_factory=Resources)
    cluster: SimulatedCluster = field(default_factory=SimulatedCluster)

    def __post_init__(self) -> None:
        if not _names_a_directory(self.name):
            raise ValueError(_NAME.format(self.name))
        if not _distinct(self.seeds):
            raise ValueError(_SEEDS.format(self.seeds))
        if not self.objectives:
            raise ValueError("objectives must name at least one metric")
        if len({o.metric for o in self.objectives}) < len(self.objectives):
            raise ValueError(f"objectives = {[o.metric for o in self.objectives]}: the same metric stands there twice")
        if not self.question.strip():
            raise ValueError(_QUESTION)

    def run_config(self, cell: Mapping[str, Any], seed: int) -> RunConfig:
        """The resolved configuration of one run; ConfigError if the cell is impossible."""
        overrides = [f"{path}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for path, value in cell.items()]
        return configfile.load_run_config({**self.base, "seed": seed}, f"study {self.name}, cell {label(cell, {})}", overrides)

    def all_to_all(self, config: RunConfig) -> AllToAll:
        """The simulation of one run's routing.  ValueError if its experts do not fit on the cluster's GPUs."""
        moe = config.model.moe
        assert moe is not None
        c = self.cluster
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


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """Read and check a study; ConfigError lists every mistake that was found, each with path, value and remedy."""
    mapping = _overridden(configfile.read_yaml(path), overrides)
    study = configfile.validate(Study, mapping, str(path)) if _shape_is_right(mapping) else None
    problems = list(_problems(mapping, study, str(path)))
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    assert study is not None
    return study


def _overridden(mapping: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """--set on a study; what follows `space.` or `baseline.` is one key, itself a dotted path."""
    for override in overrides:
        section, _, rest = override.partition(".")
        path, equals, text = rest.partition("=")
        if section in ("space", "baseline") and equals and isinstance(mapping.get(section), dict):
            value = configfile.apply_overrides({}, [f"value={text}"])["value"]
            mapping = {**mapping, section: {**mapping[section], path.strip(): value}}
        else:
            mapping = configfile.apply_overrides(mapping, [override])
    return mapping


def _shape_is_right(mapping: Mapping[str, Any]) -> bool:
    try:
        TypeAdapter(Study).validate_python(dict(mapping))
    except ValueError:
        return False
    return True


def _problems(mapping: Mapping[str, Any], study: Study | None, source: str) -> Iterable[str]:
    if study is None:
        try:
            configfile.validate(Study, mapping, source)
        except ConfigError as error:
            # Entries of the space are told of below, in words of their own.
            yield from (p.replace(": (whole): ", ": ", 1) for p in error.problems if not p.startswith(f"{source}: space."))
        yield from _own_problems(mapping, source)
    base = list(_base_problems(mapping, source))
    yield from base
    yield from _path_problems(_mapping(mapping, "space"), _mapping(mapping, "baseline"), source)
    for objective in mapping.get("objectives") or []:
        metric = objective.get("metric") if isinstance(objective, dict) else None
        if isinstance(metric, str) and metric not in METRICS and not metric.startswith(f"{schema.BITS_PER_BYTE}/"):
            yield f"{source}: objectives.metric = {metric!r}: no run records it{configfile.nearest(metric, METRICS)}"
    cluster = mapping.get("cluster")
    if isinstance(cluster, dict) and "file" in cluster:
        try:
            load_cluster(str(cluster["file"]))
        except ConfigError as error:
            yield from (f"{source}: {problem}" for problem in error.problems)
    if study is not None and not base:
        yield from _cell_problems(study, source)


def _mapping(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section, or nothing if it is no mapping (which is told of elsewhere)."""
    value = mapping.get(key)
    return {str(path): item for path, item in value.items()} if isinstance(value, dict) else {}


def _path_problems(space: Mapping[str, Any], baseline: Mapping[str, Any], source: str) -> Iterable[str]:
    """Paths that no run configuration has, values of the wrong type, and what space and baseline do not share."""
    known = configfile.known_paths(RunConfig)
    for section, entries in (("space", space), ("baseline", baseline)):
        unknown = [path for path in entries if path not in known]
        yield from (f"{source}: {section}.{path} = {entries[path]!r}: no such setting{configfile.nearest(path, known)}" for path in unknown)
    for path in (path for path in space if path in known):
        yield from (f"{source}: {where}: {problem}" for where, problem in dimension_problems(path, space[path]))
    for path in (path for path in baseline if path in known):
        if problem := value_problem(path, baseline[path]):
            yield f"{source}: baseline.{path} = {baseline[path]!r}: {problem}"
        elif isinstance(space.get(path), list) and not contains(space[path], baseline[path]):
            yield f"{source}: baseline.{path} = {baseline[path]!r}: is outside space.{path} = {_show(space[path])}"
    yield from (f"{source}: baseline: has no value for {path}, which the space varies" for path in sorted(set(space) - set(baseline)))
    yield from (f"{source}: baseline.{path}: is not in the space; put a fixed value into base" for path in sorted(set(baseline) - set(space)))


def _own_problems(mapping: Mapping[str, Any], source: str) -> Iterable[str]:
    """What `Study.__post_init__` would say, which is not asked while a field is wrong."""
    name, seeds = mapping.get("name"), mapping.get("seeds")
    if mapping.get("question") == "":
        yield f"{source}: {_QUESTION}"
    if isinstance(name, str) and not _names_a_directory(name):
        yield f"{source}: {_NAME.format(name)}"
    if isinstance(seeds, list) and all(isinstance(s, int) for s in seeds) and not _distinct(seeds):
        yield f"{source}: {_SEEDS.format(seeds)}"


def _names_a_directory(name: str) -> bool:
    return bool(name) and all(c.isalnum() or c in "-_" for c in name)


def _distinct(seeds: list[int]) -> bool:
    return bool(seeds) and len(set(seeds)) == len(seeds) and min(seeds) >= 0


def _base_problems(mapping: Mapping[str, Any], source: str) -> Iterable[str]:
    base = mapping.get("base")
    if isinstance(base, dict):
        try:
            config = configfile.load_run_config(base, f"{source}: base")
        except ConfigError as error:
            yield from error.problems
        else:
            yield from _data_problems(config, [o.get("metric") for o in mapping.get("objectives") or [] if isinstance(o, dict)], source)


def _data_problems(config: RunConfig, metrics: list[Any], source: str) -> Iterable[str]:
    """A corpus, file or domain that is not there."""
    corpus = config.data.corpus
    try:
        corpora.identity(config.data)
    except DataError as error:
        yield from (f"{source}: base: {problem}" for problem in error.problems)
        return
    domains = corpora.domains(corpus)
    for name, weight in config.data.mixture.items():
        if name not in domains:
            yield f"{source}: base: data.mixture.{name} = {weight}: no domain of corpus {corpus!r}{configfile.nearest(name, domains)}"
    for metric in map(str, metrics):
        domain = metric.removeprefix(f"{schema.BITS_PER_BYTE}/")
        if domain != metric and domain not in domains:
            yield f"{source}: objectives.metric = {metric!r}: no domain of corpus {corpus!r}{configfile.nearest(domain, domains)}"


def _cell_problems(study: Study, source: str) -> Iterable[str]:
    """Mistakes that only show when the pieces are put together: an impossible cell, a baseline outside the space."""
    known = configfile.known_paths(RunConfig)
    if any(path not in known for path in study.space) or set(study.baseline) != set(study.space):
        return
    if any(any(dimension_problems(path, study.space[path])) for path in study.space if not isinstance(study.space[path], Range)):
        return
    for path, value in study.baseline.items():
        if not contains(study.space[path], value):
            yield f"{source}: baseline.{path} = {value!r}: is outside space.{path} = {_show(study.space[path])}"
    seen: set[str] = set()
    for cell in cells(study) if study.search.sampler in ("one-factor", "grid") else [study.baseline]:
        try:
            config = study.run_config(cell, study.seeds[0])
            if config.model.moe is not None:
                study.all_to_all(config)
        except ConfigError as error:
            found = [problem.split(": ", 1)[1] for problem in error.problems]
        except ValueError as error:
            found = [f"cluster: {error}"]
        else:
            continue
        for problem in found:
            if problem not in seen:
                seen.add(problem)
                yield f"{source}: space: cell ({label(cell, study.baseline)}): {problem}"


def _show(choices: Any) -> str:
    return str(dataclasses.asdict(choices)) if isinstance(choices, Range) else str(choices)


def label(cell: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """A short readable name of a cell: what differs from the baseline, `baseline` if nothing does."""
    parts = [
        f"{short_name(path)}={'none' if value is None else value}" for path, value in cell.items() if path not in baseline or baseline[path] != value
    ]
    return ", ".join(parts) or "baseline"


def short_name(path: str) -> str:
    """`device_limit` for model.moe.device_limit, `balance.expert` for a balance weight."""
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-2:-1] == ["balance"] else parts[-1]
