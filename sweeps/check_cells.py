"""What is wrong with a study's cells: each one of a design, and of a search the ends of every dimension."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import optuna

from research.config import RunConfig
from research.errors import ConfigError
from research.parallel.sharing import common_experts, sharing_problems
from sweeps import constraints, pruning, schema
from sweeps.budget import KNOBS, Budget, value_at, with_value
from sweeps.definition import Search, Study, label
from sweeps.pruning import FINAL
from sweeps.quantities import BEFORE_TRAINING, QUANTITIES, recorded_metrics
from sweeps.samplers import STARTUP_TRIALS
from sweeps.space import Range, cell_key, cells, choices_of, count_of, needs, resolve, suggest_cell

MOST_CELLS = 10_000
MOST_SENTENCES = 20
SAMPLE = 48
"""Cells of a search that are looked at before a value is called impossible."""
MANY = 500
"""Before constraints are said to leave nothing."""


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
    workers = study.resources.workers_per_trial
    found = sharing_problems(config, workers, common_experts(workers, config))
    return (None, [f"{problem} (resources.workers_per_trial = {workers})" for problem in found]) if found else (config, [])


def cell_problems(study: Study) -> Iterator[str]:
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
        if broken := _broken(study, config):
            yield from (f"constraints: the baseline breaks {p}; it is what all others are compared with" for p in broken)
            study = dataclasses.replace(study, constraints=[])
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
    if quantity(study, config) == 0:
        return f"budget.matched = {budget.matched!r}: is 0 in the baseline, a model without routed experts; match something else, or none"
    for value in (start + 1, start - 1, 2 * start, start // 2, start + 8, start - 8, 1, start + 64):
        try:
            if quantity(study, with_value(config, knob, value)) != quantity(study, config):
                return None
        except (ValueError, ConfigError):
            continue
    others = ", ".join(other for other in KNOBS[budget.matched] if other != knob)
    return f"budget.adjust = {knob!r}: does not change {budget.matched}; adjust one that does, such as {others}"


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
    counts = [count_of(entry) for entry in study.space.values()]
    if (count := math.prod(counts) if study.search.sampler == "grid" else sum(counts)) > MOST_CELLS:
        remedy = "leave out values, or draw cells (search.sampler: quasi-random)"
        yield f"space: a {study.search.sampler} design of {count:,} cells; at most {MOST_CELLS:,} can be tried: {remedy}"
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
    drawn = list(sample(study, SAMPLE))
    for path, entry in study.space.items():
        for value in (choices.low, choices.last) if isinstance(choices := choices_of(entry), Range) else choices:
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
    if any(bound.before_training for bound in study.bounds) and not any(_keeps(study, cell) for cell in sample(study, MANY)):
        yield f"constraints: none of {MANY} cells drawn at random keeps to {study.constraints}; loosen them, or narrow the space"


def _keeps(study: Study, cell: Mapping[str, Any]) -> bool:
    config, _ = trouble(study, cell)
    return config is not None and not _broken(study, config)


def sample(study: Study, count: int) -> Iterator[dict[str, Any]]:
    """Cells drawn at random, always the same ones."""
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return (suggest_cell(drawing.ask(), study.space, study.baseline) for _ in range(count))


def _unrecorded(study: Study, configs: list[RunConfig]) -> Iterator[str]:
    """Objectives and constraints over what some possible cell does not record."""
    wanted = {f"objectives.metric = {o.metric!r}": o.metric for o in study.objectives}
    wanted |= {f"constraints: {c.text!r}": c.metric for c in study.bounds if c.metric != constraints.DIVERGED and c.metric not in BEFORE_TRAINING}
    for where, metric in wanted.items():
        if any(not recorded_metrics(config, [metric]) for config in configs):
            why = (
                "a width that is not in training.cache_bits"
                if metric.startswith("cache/")
                else "a layer without routed experts routes nothing"
                if "/layer_" in metric
                else "a model without routed experts routes nothing"
            )
            yield f"{where}: not every run records it: {why}"


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
    return math.prod(count_of(e) for e in study.space.values()) <= MOST_CELLS
