"""Every mistake in a study file at once, each with its path, its value and a remedy; nothing is started.

A wrong section does not hide what is wrong in another: what can be read is put together without what cannot, and its cells
are looked at, each one of a design, and of a search the ends of every dimension.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import optuna

from research import configfile
from research.config import RunConfig
from research.data import corpora
from research.errors import ConfigError, DataError
from sims import load_cluster
from sweeps import constraints, pruning, schema
from sweeps.budget import KNOBS, TOKENS, Budget, value_at, with_value
from sweeps.definition import METRICS, Objective, Resources, Search, SimulatedCluster, Study, label, own_problems
from sweeps.pruning import Pruner
from sweeps.quantities import BEFORE_TRAINING, QUANTITIES, recorded_metrics
from sweeps.retune import RATE, Retune
from sweeps.samplers import STARTUP_TRIALS
from sweeps.space import (
    Range,
    cell_key,
    cells,
    choices_of,
    condition_problems,
    dimension_problems,
    levels_of,
    may_be,
    needs,
    resolve,
    suggest_cell,
    value_problem,
)

T = TypeVar("T")
MOST_CELLS = 10_000
MOST_SENTENCES = 20
SAMPLE = 48
"""Cells of a search that are looked at before a value, or all of it, is called impossible."""
FINAL = ("simulation/", "model/", "reference/")
"""Metrics that a run has at its end alone."""


def problems(mapping: Mapping[str, Any], source: str, *, here: bool = True) -> list[str]:
    """All that is wrong with a study's mapping.  `here`: it is to run on this machine, whose GPUs count."""
    found = [p.replace(": (whole): ", ": ", 1) for p in _shape_problems(mapping, source)]
    found += [f"{source}: {p}" for p in _section_problems(mapping, here=here)]
    base, base_problems = _base(mapping, source)
    found += base_problems
    found += [f"{source}: {p}" for p in _path_problems(_mapping(mapping, "space"), _mapping(mapping, "baseline"))]
    study = _readable(mapping) if base is not None else None
    if study is not None:
        found += [f"{source}: {p}" for p in _cell_problems(study)]
    return list(dict.fromkeys(found))


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
    texts = mapping.get("constraints", [])
    for index, text in enumerate(texts if isinstance(texts, list) else []):
        if isinstance(text, str) and (problem := _constraint_problem(text)):
            yield f"constraints.{index} = {text!r}: {problem}"
    cluster = mapping.get("cluster")
    if isinstance(cluster, dict) and "file" in cluster:
        try:
            load_cluster(str(cluster["file"]))
        except ConfigError as error:
            yield from error.problems
    space = _mapping(mapping, "space")
    yield from _pruner_problems(mapping, metrics)
    yield from _budget_problems(_section(Budget, mapping, "budget"), space)
    if mapping.get("retune") is not None and RATE in space:
        yield f"space.{RATE}: is searched and re-tuned at once; leave out retune, or take it out of the space"
    resources = _section(Resources, mapping, "resources")
    if here and resources is not None:
        yield from _gpu_problems(resources)


def _is_metric(metric: str) -> bool:
    return metric in METRICS or metric.startswith((f"{schema.BITS_PER_BYTE}/", f"{schema.EXPERT_VIOLATION}/layer_"))


def _constraint_problem(text: str) -> str | None:
    try:
        constraints.parse(text, METRICS)
    except ValueError as error:
        return str(error)
    return None


def _pruner_problems(mapping: Mapping[str, Any], metrics: list[str]) -> Iterator[str]:
    pruner, search, seeds = _section(Pruner, mapping, "pruner"), _section(Search, mapping, "search"), mapping.get("seeds", [0])
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


def _gpu_problems(resources: Resources) -> Iterator[str]:
    """Where a Ray cluster is told of, its own GPUs count, which the workers' start checks."""
    if resources.gpus != "required" or os.environ.get("RAY_ADDRESS"):
        return
    import torch  # noqa: PLC0415  (seconds, and only this question needs it)

    if not torch.cuda.is_available():
        yield "resources.gpus = 'required': torch sees no GPU on this machine; use gpus: auto, or run it on a cluster that has some"


def _base(mapping: Mapping[str, Any], source: str) -> tuple[RunConfig | None, list[str]]:
    """The configuration of `base`, and what is wrong with it or with the text that it names."""
    base = mapping.get("base")
    if not isinstance(base, dict):
        return None, []
    try:
        config = configfile.load_run_config(base, f"{source}: base")
    except ConfigError as error:
        return None, list(error.problems)
    return config, list(_data_problems(config, _metrics(mapping), source))


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


def _path_problems(space: Mapping[str, Any], baseline: Mapping[str, Any]) -> Iterator[str]:
    """Paths that no run configuration has, values of the wrong type, conditions, and what space and baseline do not share."""
    known = configfile.known_paths(RunConfig)
    for section, entries in (("space", space), ("baseline", baseline)):
        unknown = [path for path in entries if path not in known]
        yield from (f"{section}.{path} = {entries[path]!r}: no such setting{configfile.nearest(path, known)}" for path in unknown)
    for path in (path for path in space if path in known):
        yield from (f"{where}: {problem}" for where, problem in dimension_problems(path, space[path]))
    yield from (f"{where}: {problem}" for where, problem in condition_problems(space))
    for path in (path for path in baseline if path in known):
        if problem := value_problem(path, baseline[path]):
            yield f"baseline.{path} = {baseline[path]!r}: {problem}"
        elif path in space and not may_be(space[path], baseline[path]) and _exists_in_baseline(space[path], baseline):
            yield f"baseline.{path} = {baseline[path]!r}: is outside space.{path} = {space[path]}"
    yield from (f"baseline: has no value for {path}, which the space varies" for path in sorted(set(space) - set(baseline)))
    yield from (f"baseline.{path}: is not in the space; put a fixed value into base" for path in sorted(set(baseline) - set(space)))


def _exists_in_baseline(entry: Any, baseline: Mapping[str, Any]) -> bool:
    when = entry.get("when") if isinstance(entry, Mapping) else None
    return not isinstance(when, Mapping) or all(baseline.get(p) in (v if isinstance(v, list) else [v]) for p, v in when.items())


def _readable(mapping: Mapping[str, Any]) -> Study | None:
    """The study of what is right by itself: wrong dimensions and sections are left out.  None if no baseline is left."""
    space, baseline = _mapping(mapping, "space"), _mapping(mapping, "baseline")
    known = configfile.known_paths(RunConfig)
    shared = {path: entry for path, entry in space.items() if path in known and path in baseline}
    right = {p: entry for p, entry in shared.items() if not any(dimension_problems(p, entry)) and not value_problem(p, baseline[p])}
    while bad := [p for p in right if any(where.startswith(f"space.{p}.when") for where, _ in condition_problems(right))]:
        right = {p: e for p, e in right.items() if p not in bad}
    budget = _section(Budget, mapping, "budget")
    sections = {"search": Search, "budget": Budget, "cluster": SimulatedCluster, "pruner": Pruner, "retune": Retune}
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
    try:
        return configfile.validate(Study, whole, "study")
    except ConfigError:
        return None


def trouble(study: Study, cell: Mapping[str, Any]) -> tuple[RunConfig | None, list[str]]:
    """The configuration of a cell, or why it is impossible: no such model, no such budget, no room on the cluster."""
    try:
        config = study.run_config(cell, study.seeds[0])
        if config.model.moe is not None:
            study.all_to_all(config)
    except ConfigError as error:
        return None, [problem.split(": ", 1)[1] for problem in error.problems]
    except ValueError as error:
        return None, [f"cluster: {error}"]
    return config, []


def _cell_problems(study: Study) -> Iterator[str]:
    """Mistakes that only show when the pieces are put together."""
    baseline = resolve(study.space, study.baseline, study.baseline)
    config, found = trouble(study, baseline)
    yield from (f"space: cell (baseline): {problem}" for problem in found)
    if config is None:
        # Nothing can be compared, and a budget has no measure; other cells are impossible for reasons of their own.
        if any("budget.matched" in problem for problem in found):
            return
        study = dataclasses.replace(study, budget=Budget(matched="none"))
    else:
        if adjust := _idle_knob(study, config):
            yield adjust
            study = dataclasses.replace(study, budget=Budget(matched="none"))
        yield from (f"constraints: the baseline breaks {p}; it is what all others are compared with" for p in _broken(study, config))
        yield from _curve_problems(study, config)
    possible = {cell_key(baseline): config} if config is not None else {}
    if study.search.designed:
        yield from _design_problems(study, found, possible)
    else:
        yield from _search_problems(study, found, possible)
    yield from _unrecorded(study, list(possible.values()))


def _idle_knob(study: Study, config: RunConfig) -> str | None:
    """A sentence if turning the budget's knob changes nothing in the baseline."""
    budget, knob = study.budget, study.budget.adjust
    if knob is None:
        return None
    start = value_at(config, knob) or 1
    quantity = QUANTITIES[budget.matched]
    for value in (start + 1, start - 1, 2 * start, start // 2, start + 8, start - 8, 1, start + 64):
        try:
            if quantity(study, with_value(config, knob, value)) != quantity(study, config):
                return None
        except (ValueError, ConfigError):
            continue
    return f"budget.adjust = {knob!r}: does not change {budget.matched}; adjust one that does, such as {', '.join(KNOBS[budget.matched])}"


def _broken(study: Study, config: RunConfig) -> list[str]:
    try:
        return constraints.broken(study.bounds, study, config)
    except (ValueError, ConfigError):
        return []  # its experts do not fit on the cluster, which is told of


def _curve_problems(study: Study, config: RunConfig) -> Iterator[str]:
    """A pruner that would have nothing to look at in time."""
    pruner, metric = study.pruner, study.objectives[0].metric
    if pruner.kind in ("none", "wilcoxon") or metric.startswith(FINAL):
        return
    training = config.training
    first, last = pruning.record_steps(metric, training.record_every, training.validate_every, config.steps)
    warmup = pruner.options.get("warmup_steps", 0)
    least = pruner.options.get("min_resource") or first
    if first >= last:
        key = "validate_every" if metric.startswith(schema.BITS_PER_BYTE) else "record_every"
        every = min(training.record_every, training.validate_every) if key == "record_every" else training.validate_every
        yield f"pruner.kind = {pruner.kind!r}: {metric} is recorded at the last step ({last}) alone; lower base.training.{key} = {every}"
    elif warmup >= last:
        yield f"pruner.warmup_steps = {warmup}: a run has {last} steps; it must be lower"
    elif least >= last:
        yield f"pruner.min_resource = {least}: a run has {last} steps; it must be lower"


def _design_problems(study: Study, told: list[str], possible: dict[str, RunConfig]) -> Iterator[str]:
    """Cells of a grid or one-factor design that cannot be; what they have in common with one told of is not repeated."""
    if study.search.sampler == "grid" and (count := math.prod(len(levels_of(e)) for e in study.space.values())) > MOST_CELLS:
        yield f"space: a grid of {count:,} cells; at most {MOST_CELLS:,} can be tried: leave out values, or draw cells (search.sampler: quasi-random)"
        return
    seen, sentences = set(told), list[str]()
    kept = 0
    for cell in cells(study):
        config, found = trouble(study, cell)
        for problem in found:
            if problem not in seen:
                seen.add(problem)
                sentences.append(f"space: cell ({label(cell, study.baseline)}): {problem}")
        if config is not None:
            possible.setdefault(cell_key(cell), config)
            kept += not _broken(study, config)
    yield from sentences[:MOST_SENTENCES]
    if len(sentences) > MOST_SENTENCES:
        yield f"space: {len(sentences) - MOST_SENTENCES} more cells are impossible for reasons like these"
    if study.constraints and len(possible) > 1 and kept <= 1:
        yield f"constraints: no cell but the baseline keeps to {study.constraints}; loosen them, or change the space"


def _search_problems(study: Study, told: list[str], possible: dict[str, RunConfig]) -> Iterator[str]:
    """Values that no cell can have, and constraints that none keeps to: looked for in cells drawn at random."""
    drawn = sample(study, SAMPLE)
    for path, entry in study.space.items():
        for value in choices.levels[:: max(len(choices.levels) - 1, 1)] if isinstance(choices := choices_of(entry), Range) else choices:
            first: list[str] = []
            for around in [study.baseline, *drawn]:
                cell = resolve(study.space, study.baseline, {**around, **needs(study, path), path: value})
                config, found = trouble(study, cell)
                first = first or found
                if config is not None:
                    possible.setdefault(cell_key(cell), config)
                    break
            else:
                if not set(first) <= set(told):
                    yield f"space.{path} = {value!r}: is possible in no cell: {first[0]}"
    if any(bound.before_training for bound in study.bounds) and not any(_keeps(study, cell) for cell in drawn):
        yield f"constraints: none of {SAMPLE} cells drawn at random keeps to {study.constraints}; loosen them, or narrow the space"


def _keeps(study: Study, cell: Mapping[str, Any]) -> bool:
    config, _ = trouble(study, cell)
    return config is not None and not _broken(study, config)


def sample(study: Study, count: int) -> list[dict[str, Any]]:
    """Cells drawn at random, always the same ones."""
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [suggest_cell(drawing.ask(), study.space, study.baseline) for _ in range(count)]


def _unrecorded(study: Study, configs: list[RunConfig]) -> Iterator[str]:
    """Objectives and constraints over what some possible cell does not record."""
    wanted = {f"objectives.metric = {o.metric!r}": o.metric for o in study.objectives}
    wanted |= {f"constraints: {c.text!r}": c.metric for c in study.bounds if c.metric != constraints.DIVERGED and c.metric not in BEFORE_TRAINING}
    for where, metric in wanted.items():
        if any(not recorded_metrics(config, [metric]) for config in configs):
            why = "a layer without routed experts" if "/layer_" in metric else "a model without routed experts"
            yield f"{where}: not every run records it: {why} routes nothing"


def notes(study: Study) -> list[str]:
    """What is no mistake but should be known before it runs: cells that will not be trained, trials that cannot be."""
    found = []
    if study.search.designed:
        for cell in cells(study):
            config = study.run_config(cell, study.seeds[0])
            found += [f"cell ({label(cell, study.baseline)}) is not trained: it breaks {p}" for p in constraints.broken(study.bounds, study, config)]
        return found
    if all(not isinstance(choices_of(e), Range) for e in study.space.values()):
        count = len({cell_key(c) for c in cells(dataclasses.replace(study, search=Search(sampler="grid")))}) if _few(study) else MOST_CELLS
        if count < (study.search.trials or 0):
            found.append(f"search.trials = {study.search.trials}: the space has {count} cells; each is trained once")
    if study.search.sampler in ("tpe", "gp") and (study.search.trials or 0) <= STARTUP_TRIALS:
        found.append(f"search.trials = {study.search.trials}: the first {STARTUP_TRIALS} of {study.search.sampler} are drawn at random")
    return found


def _few(study: Study) -> bool:
    return math.prod(len(levels_of(e)) for e in study.space.values()) <= MOST_CELLS
