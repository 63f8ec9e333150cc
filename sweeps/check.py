"""Every mistake in a study file at once, each with its path, its value and a remedy; nothing is started.

A wrong section does not hide what is wrong in another: what can be read is put together without what cannot, and its cells
are looked at, each one of a design, and of a search the ends of every dimension.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from research import configfile
from research.config import RunConfig
from research.data import corpora
from research.errors import ConfigError, DataError
from sims import load_cluster
from sweeps import constraints, pruning, schema, variants
from sweeps.budget import KNOBS, TOKENS, Budget, value_at
from sweeps.check_cells import cell_problems
from sweeps.definition import METRICS, Objective, Resources, Search, SimulatedCluster, Study, own_problems
from sweeps.pruning import FINAL, Pruner
from sweeps.retune import RATE, Retune
from sweeps.space import as_list, condition_problems, dimension_problems, may_be, value_problem

T = TypeVar("T")
ANY_TOKENS = 1_000_000
"""For looking at cells beside a number of tokens that is none."""
SEEDS = "seeds say with which seeds each variant is trained; write seeds: [...] instead"


def problems(mapping: Mapping[str, Any], source: str, *, here: bool = True) -> list[str]:
    """All that is wrong with a study's mapping.  `here`: it is to run on this machine, whose GPUs count."""
    found = _shape_problems(mapping, source)
    found += [f"{source}: {p}" for p in _section_problems(mapping, here=here)]
    base, base_problems = _base(mapping, source)
    found += base_problems
    absent = [f"{source}: {p}" for p in _dense_problems(mapping, base)] if base is not None and not mapping.get("variants") else []
    found += absent
    found += [f"{source}: {p}" for p in variants.problems(mapping)]
    found += [f"{source}: {p}" for p in _path_problems(_mapping(mapping, "space"), _mapping(mapping, "baseline"), _variants(mapping))]
    found += [f"{source}: {p}" for p in _unshared(mapping)]
    study = _readable(mapping) if base is not None and not absent else None
    if study is not None:
        found += [f"{source}: {p}" for p in cell_problems(study)]
    elif base is None and (repaired := _without_wrong_leaves(mapping, source)) is not None:
        # Some leaf of base is wrong; what other cells than the baseline say is no consequence of that.
        found += [f"{source}: {p}" for p in cell_problems(repaired) if p.startswith("space") and not re.search(r"cell \(baseline\)|budget\.", p)]
    return list(dict.fromkeys(p.replace(": (whole): ", ": ", 1) for p in found))


def _shape_problems(mapping: Mapping[str, Any], source: str) -> list[str]:
    """Unknown keys, types, and what each section says of itself; entries of the space are told of in words of their own."""
    try:
        configfile.validate(Study, mapping, source)
    except ConfigError as error:
        return [p for p in error.problems if not p.startswith((f"{source}: space.", f"{source}: space = {{"))]
    return []


def _section(cls: type[T], mapping: Mapping[str, Any], key: str) -> T | None:
    """A section as it is read, its defaults if it is not there, None if it is wrong."""
    value = mapping.get(key, {})
    if not isinstance(value, dict):
        return None
    try:
        return configfile.validate(cls, value, key)
    except ConfigError:
        return None


def _mapping(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section, or nothing if it is no mapping (which is told of elsewhere)."""
    value = mapping.get(key)
    return {str(path): item for path, item in value.items()} if isinstance(value, dict) else {}


def _metrics(mapping: Mapping[str, Any]) -> list[str]:
    """The objectives' metrics, as far as they can be read."""
    given = mapping.get("objectives", [{"metric": schema.BITS_PER_BYTE}])
    entries = given if isinstance(given, list) else []
    return [o["metric"] for o in entries if isinstance(o, dict) and isinstance(o.get("metric"), str)]


def _section_problems(mapping: Mapping[str, Any], *, here: bool) -> Iterator[str]:
    """What does not fit together within and between the sections, without looking at a single cell."""
    given = mapping.get("objectives", [{}])
    metrics = _metrics(mapping)
    yield from own_problems(mapping.get("name"), mapping.get("question"), mapping.get("seeds", [0]), metrics if metrics or given == [] else [""])
    for metric in metrics:
        if not _is_metric(metric):
            yield f"objectives.metric = {metric!r}: no run records it{configfile.nearest(metric, METRICS)}"
        elif metric.startswith("parallel/") and _mapping(mapping, "resources").get("workers_per_trial", 1) == 1:
            yield f"objectives.metric = {metric!r}: only runs on several workers record it; resources.workers_per_trial = 1"
    texts = mapping.get("constraints", [])
    for index, text in enumerate(texts if isinstance(texts, list) else []):
        if isinstance(text, str) and (problem := _constraint_problem(text)):
            yield f"constraints.{index} = {text!r}: {problem}"
    cluster = mapping.get("cluster")
    if isinstance(cluster, dict) and isinstance(cluster.get("file"), str):
        try:
            load_cluster(cluster["file"])
        except ConfigError as error:
            yield from (p.replace("cluster = ", "cluster.file = ", 1) for p in error.problems)
    space = _mapping(mapping, "space")
    yield from _pruner_problems(mapping, metrics)
    yield from _budget_problems(_section(Budget, mapping, "budget"), space)
    if mapping.get("retune") is not None and RATE in space:
        yield f"space.{RATE}: is searched and re-tuned at once; leave out retune, or take it out of the space"
    if here and not os.environ.get("RAY_ADDRESS"):
        yield from _machine_problems(_section(Resources, mapping, "resources"), _mapping(mapping, "resources").get("gpus"))


def _is_metric(metric: str) -> bool:
    return metric in METRICS or metric.startswith((f"{schema.BITS_PER_BYTE}/", f"{schema.EXPERT_VIOLATION}/layer_"))


def _constraint_problem(text: str) -> str | None:
    try:
        constraints.parse(text, METRICS)
    except ValueError as error:
        return str(error)
    return None


def _pruner_problems(mapping: Mapping[str, Any], metrics: list[str]) -> Iterator[str]:
    search, seeds = _section(Search, mapping, "search"), mapping.get("seeds", [0])
    pruner = _section(Pruner, mapping, "pruner")
    if pruner is None and (chosen := _mapping(mapping, "pruner").get("kind")) in list(pruning.OPTIONS):
        pruner = Pruner(kind=chosen)  # its options are wrong, which is told of
    if pruner is None or pruner.kind == "none":
        return
    kind = f"pruner.kind = {pruner.kind!r}"
    if len(metrics) > 1:
        yield f"{kind}: with {len(metrics)} objectives no trial is worse than another half-way; leave the pruner out, or keep one objective"
    elif metrics and metrics[0].startswith(FINAL) and pruner.kind != "wilcoxon":
        yield f"{kind}: objective {metrics[0]} is known at a run's end alone; prune by a validation/, train/ or routing/ metric"
    if search is not None and search.designed:
        yield f"{kind}: with search.sampler = {search.sampler} every cell is confirmatory and none is pruned; leave the pruner out, or draw cells"
    startup = pruner.options.get("startup_trials")
    if search is not None and search.trials is not None and startup is not None and startup >= search.trials:
        yield f"pruner.startup_trials = {startup}: search.trials = {search.trials} end before any could be pruned; it must be lower"
    if pruner.kind == "wilcoxon" and isinstance(seeds, list) and len(seeds) < (least := pruning.least_seeds(pruner)):
        p = pruner.options["p_threshold"]
        yield f"{kind}: {len(seeds)} seeds cannot show p < {p} before the last has run; it takes {least} seeds or more, or a higher p_threshold"


def _budget_problems(budget: Budget | None, space: Mapping[str, Any]) -> Iterator[str]:
    if budget is None:
        return
    if budget.matched == "tokens" and TOKENS in space:
        yield f"space.{TOKENS}: is what budget.matched = tokens holds equal; take it out of the space, or match something else, or none"
    knob = budget.adjust
    if knob is None:
        return
    remedy = f"; such as {', '.join(KNOBS[budget.matched])}"
    known = configfile.known_paths(RunConfig)
    if knob not in known:
        yield f"budget.adjust = {knob!r}: no such setting{configfile.nearest(knob, known)}"
    elif value_problem(knob, 1) is not None or value_problem(knob, 1.5) is None:
        yield f"budget.adjust = {knob!r}: is no whole number{remedy}"
    elif knob in space:
        yield f"budget.adjust = {knob!r}: is searched over itself; adjust another setting{remedy}"


def _machine_problems(resources: Resources | None, gpus: Any) -> Iterator[str]:
    """What this machine has not.  Where a Ray cluster is told of, its own counts, which the workers' start checks."""
    if resources is not None:
        yield from _core_problems(resources, os.cpu_count() or 1)
    if gpus == "required":
        import torch  # noqa: PLC0415  (seconds, and only this question needs it)

        if not torch.cuda.is_available():
            yield "resources.gpus = 'required': torch sees no GPU on this machine; use gpus: auto, or run it on a cluster that has some"


def _core_problems(resources: Resources, cores: int) -> Iterator[str]:
    cpus, each = resources.cpus_per_worker, resources.workers_per_trial
    # Workers of one run may share cores: slower, and the same run.
    room = max(cores // cpus // each, each > 1)
    elsewhere = f"this machine has {cores} cores; ask for less, or export RAY_ADDRESS of a cluster that has more (submit runs it on one)"
    if room < 1:
        yield f"resources.cpus_per_worker = {cpus}: {elsewhere}"
    elif resources.workers != "auto" and resources.workers > room:
        yield f"resources.workers = {resources.workers}: there is room for {room}: {elsewhere}"


def _base(mapping: Mapping[str, Any], source: str) -> tuple[RunConfig | None, list[str]]:
    """The configuration of `base`, and what is wrong with it or with the text that it names."""
    base = mapping.get("base")
    if not isinstance(base, dict):
        return None, []
    if "seed" in base:
        return None, [f"{source}: base.seed = {base['seed']!r}: {SEEDS}"]
    try:
        config = configfile.load_run_config(base, f"{source}: base")
    except ConfigError as error:
        return None, list(error.problems)
    return config, list(_data_problems(config, _metrics(mapping), source))


def _without_wrong_leaves(mapping: Mapping[str, Any], source: str) -> Study | None:
    """The study without the leaves of `base` that are unknown or of a wrong type; None if that does not mend it."""
    _, told = _base(mapping, source)
    base: Any = mapping.get("base")
    for problem in told:
        named = re.match(r"([\w.]+)(?: = |: (\w+)=)", problem.removeprefix(f"{source}: base: "))
        if named is not None:
            path = ".".join(filter(None, named.groups()))
            base = _changed(base, path.split("."), ANY_TOKENS if path == TOKENS else None)
    changed = {**mapping, "base": base}
    return _readable(changed) if base != mapping.get("base") and _base(changed, source)[0] is not None else None


def _changed(node: Any, path: list[str], value: int | None) -> Any:
    """A copy of nested dicts with one leaf that is there at `value`, or without it; `node` itself if there is no such leaf."""
    if not isinstance(node, dict) or path[0] not in node:
        return node
    if len(path) > 1:
        return {**node, path[0]: _changed(node[path[0]], path[1:], value)}
    return {key: item for key, item in node.items() if key != path[0]} | ({} if value is None else {path[0]: value})


def _dense_problems(mapping: Mapping[str, Any], base: RunConfig) -> Iterator[str]:
    """Settings of a section that base has not got: of the experts of a dense model, above all."""
    space, baseline = _mapping(mapping, "space"), _mapping(mapping, "baseline")
    missing = [
        path for path in space if path in configfile.known_paths(RunConfig) and "." in path and value_at(base, path.rpartition(".")[0]) is None
    ]
    if missing:
        try:
            configfile.load_run_config(mapping["base"], "base", [f"{p}={json.dumps(baseline.get(p))}" for p in missing])
        except ConfigError:
            for path in missing:
                yield f"space.{path}: base has no {path.rpartition('.')[0]}; take it out, or take a preset that has one"


def _data_problems(config: RunConfig, metrics: list[str], source: str) -> Iterable[str]:
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
    for metric in metrics:
        domain = metric.removeprefix(f"{schema.BITS_PER_BYTE}/")
        if domain != metric and domain not in domains:
            yield f"{source}: objectives.metric = {metric!r}: no domain of corpus {corpus!r}{configfile.nearest(domain, domains)}"


def _variants(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Those that can be laid over the base."""
    wrong = [problem.partition(" = ")[0].partition(":")[0] for problem in variants.problems(mapping)]
    given = _mapping(mapping, "variants")
    return {name: value for name, value in given.items() if isinstance(value, dict) and f"variants.{name}" not in wrong}


def _path_problems(space: Mapping[str, Any], baseline: Mapping[str, Any], named: Mapping[str, Any]) -> Iterator[str]:
    """Paths that no run configuration has, values of the wrong type, conditions."""
    known = configfile.known_paths(RunConfig) + ([variants.VARIANT] if named else [])
    choices = space.get(variants.VARIANT)
    for name in choices if named and isinstance(choices, list) else ():
        if isinstance(name, str) and name not in named:
            yield f"space.{variants.VARIANT} = {name!r}: no such variant{configfile.nearest(name, named)}"
    for section, entries in (("space", space), ("baseline", baseline)):
        unknown = [path for path in entries if path not in known]
        yield from (f"{section}.{path} = {entries[path]!r}: {_no_setting(path, known)}" for path in unknown)
    wrong = {path: list(dimension_problems(path, space[path])) for path in space if path in known}
    yield from (f"{where}: {problem}" for found in wrong.values() for where, problem in found)
    yield from (f"{where}: {problem}" for where, problem in condition_problems(space))
    if "seed" in space:
        yield f"space.seed = {space['seed']!r}: {SEEDS}"
    # A list with a wrong entry is a list still; of a wrong range nothing is inside or outside.
    readable = {path: entry for path, entry in space.items() if not (wrong.get(path) and isinstance(entry, dict))}
    for path in (path for path in baseline if path in known):
        if problem := value_problem(path, baseline[path]):
            yield f"baseline.{path} = {baseline[path]!r}: {problem}"
        elif path in readable and not may_be(space[path], baseline[path]) and _exists_in_baseline(space[path], baseline):
            yield f"baseline.{path} = {baseline[path]!r}: is outside space.{path} = {space[path]}"


def _unshared(mapping: Mapping[str, Any]) -> Iterator[str]:
    """What the space has and the baseline has not, and the other way about; nothing where one of them is no mapping."""
    if isinstance(mapping.get("space"), dict) and isinstance(mapping.get("baseline"), dict):
        space, baseline = _mapping(mapping, "space"), _mapping(mapping, "baseline")
        yield from (f"baseline: has no value for {path}, which the space varies" for path in sorted(set(space) - set(baseline)))
        yield from (f"baseline.{path}: is not in the space; put a fixed value into base" for path in sorted(set(baseline) - set(space)))


def _no_setting(path: str, known: list[str]) -> str:
    """Why a path is none of `known`; the nearest, or those of the section that it names."""
    inside = [name for name in known if name.startswith(f"{path}.")]
    if inside:
        return f"is a section, no setting; name whole paths in it, such as {', '.join(inside[:3])}"
    near = configfile.nearest(path, known)
    return f"no such setting{near if 'did you mean' in near else '; all of them stand in research/config.py, such as model.moe.device_limit'}"


def _exists_in_baseline(entry: Any, baseline: Mapping[str, Any]) -> bool:
    when = entry.get("when") if isinstance(entry, Mapping) else None
    return not isinstance(when, Mapping) or all(baseline.get(p) in as_list(v) for p, v in when.items())


def _readable(mapping: Mapping[str, Any]) -> Study | None:
    """The study of what is right by itself: wrong dimensions and sections are left out.  None if no baseline is left."""
    space, baseline = _mapping(mapping, "space"), _mapping(mapping, "baseline")
    named = _variants(mapping)
    known = configfile.known_paths(RunConfig) + ([variants.VARIANT] if named else [])
    shared = {path: entry for path, entry in space.items() if path in known and path in baseline}
    if isinstance(names := shared.get(variants.VARIANT), list):
        shared[variants.VARIANT] = [name for name in names if name in named]
        if baseline[variants.VARIANT] not in shared[variants.VARIANT]:
            return None
    right = {p: entry for p, entry in shared.items() if not any(dimension_problems(p, entry)) and not value_problem(p, baseline[p])}
    while bad := [p for p in right if any(where.startswith(f"space.{p}.when") for where, _ in condition_problems(right))]:
        right = {p: e for p, e in right.items() if p not in bad}
    budget = _section(Budget, mapping, "budget")
    sections = {"search": Search, "budget": Budget, "cluster": SimulatedCluster, "pruner": Pruner, "retune": Retune, "resources": Resources}
    kept: dict[str, Any] = {key: mapping[key] for key, cls in sections.items() if key in mapping and _section(cls, mapping, key) is not None}
    if budget is not None and any(_budget_problems(budget, space)):
        kept["budget"] = {"matched": "none"}
    texts = mapping.get("constraints")
    kept["constraints"] = [t for t in texts if isinstance(t, str) and not _constraint_problem(t)] if isinstance(texts, list) else []
    metrics = [m for m in dict.fromkeys(_metrics(mapping)) if _is_metric(m)]
    kept["objectives"] = [dataclasses.asdict(Objective(metric=m)) for m in metrics or [schema.BITS_PER_BYTE]]
    seeds = mapping.get("seeds", [0])
    kept["seeds"] = seeds if isinstance(seeds, list) and not own_problems("x", "x", seeds, ["x"]) and all(isinstance(s, int) for s in seeds) else [0]
    whole = {"name": "study", "question": "?", "base": mapping["base"], "space": right, "baseline": {p: baseline[p] for p in right}, **kept}
    whole["variants"] = named
    try:
        return configfile.validate(Study, whole, "study")
    except ConfigError:
        return None
