"""What a study would cost, before anything runs."""

import time
from pathlib import Path
from typing import Any, get_args

import numpy as np

from research import accounting
from research.config import Domain, RunConfig
from sweeps import schema
from sweeps.check_cells import notes
from sweeps.constraints import broken
from sweeps.definition import Study, label
from sweeps.quantities import describe
from sweeps.search import preview
from sweeps.space import cells

PREVIEW = 12
"""Cells of a search that are shown."""
PROBE_STEPS = 5
PROBE_PARAMETERS = 50_000_000
START_SECONDS = 3.0
"""Of a run: reading the data, the order-2 yardstick, the trace and its simulation."""
PROBE_SIZE = 512
PROBE_SECONDS = 0.4
SHARE_OF_PEAK = 0.25
"""Share of a core's matrix-product rate that a training step of the scaled models reaches; `plan` says it is an estimate."""


def plan(study: Study, root: Path, workers: int) -> dict[str, Any]:
    """Runs, and per variant parameters, FLOPs, cache, tokens after matching, memory and expected seconds; nothing is started.

    `rows` are the cells of a design; of a search the first PREVIEW that it will draw (those of `tpe`, `gp` and `nsga2` change
    once results are known), which stand for the rest.  `not_trained` are the cells of a design that break a constraint.
    """
    chosen, refused = _cells(study, root)
    rate, source = _rate(root, study.run_config(study.baseline, study.seeds[0]))
    rows = [_row(study, cell, rate) for cell in chosen]
    trials = len(chosen) if study.search.designed else int(study.search.trials or 1)
    per_trial = sum(row["seconds"] * len(study.seeds) + row["retune_seconds"] for row in rows) / len(rows)
    per_trial_flops = sum(row["train_flops"] * (len(study.seeds) + _retune_share(study)) for row in rows) / len(rows)
    return {
        "study": study.name,
        "question": study.question,
        "sampler": study.search.sampler,
        "variants": trials,
        "seeds": len(study.seeds),
        "runs": trials * study.runs_per_trial,
        "retune_runs": trials * (study.runs_per_trial - len(study.seeds)),
        "matched": None if study.budget.matched == "none" else study.budget.matched,
        "train_tokens": rows[0]["train_tokens"],
        "train_flops": per_trial_flops * trials,
        "workers": workers,
        "expected_seconds": per_trial * trials / workers,
        "estimate": f"{rate / 1e9:.1f} GFLOP/s per worker, {source}",
        "notes": [*notes(study), *_preview_note(study, len(rows))],
        "not_trained": refused,
        "rows": rows,
    }


def _cells(study: Study, root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The cells that are trained, or stand for them, and those of a design that break a constraint, with the reason."""
    if not study.search.designed:
        return preview(study, root, min(int(study.search.trials or 1), PREVIEW)), []
    trained, refused = [], []
    for cell in cells(study):
        reasons = broken(study.bounds, study, study.run_config(cell, study.seeds[0]))
        if reasons:
            refused.append({"variant": label(cell, study.baseline), "cell": cell, "reason": "; ".join(reasons)})
        else:
            trained.append(cell)
    return trained, refused


def _preview_note(study: Study, shown: int) -> list[str]:
    if study.search.designed or shown >= (study.search.trials or 1):
        return []
    later = "" if study.search.sampler in ("random", "quasi-random") else "; what comes later depends on what they reach"
    return [f"the first {shown} of {study.search.trials} trials as {study.search.sampler} draws them{later}"]


def _retune_share(study: Study) -> float:
    """Training of the short runs of a trial over that of one of its replicates."""
    return study.retune.points * study.retune.tokens_share if study.retune else 0.0


def _row(study: Study, cell: dict[str, Any], rate: float) -> dict[str, Any]:
    config, matched = study.matched_config(cell, study.seeds[0])
    known = describe(config)
    training = known["train_flops"] * (1 + _validation_share(config)) / rate
    points = study.retune.points if study.retune else 0
    return {
        "variant": label(cell, study.baseline),
        "cell": cell,
        **known,
        "matched": matched.to_dict() if matched else None,
        "seconds": training + START_SECONDS,
        "retune_seconds": training * _retune_share(study) + START_SECONDS * points,
    }


def _validation_share(config: RunConfig) -> float:
    """Cost of the validations over that of the training: a forward pass is a third of a step."""
    training = config.training
    domains = len(get_args(Domain)) if config.data.corpus in ("quickstart", "default") else 1
    validations = max(config.steps // training.validate_every, 1)
    return validations * domains * training.validation_tokens / 3 / training.train_tokens


def _rate(root: Path, config: RunConfig) -> tuple[float, str]:
    """FLOP/s of a worker: as measured by runs that the root has, else by steps of the baseline, else guessed from a matrix product."""
    rates = []
    for path in sorted((root / schema.RUNS_DIRECTORY).glob(f"*/{schema.SUMMARY_FILE}")):
        summary = _json(path)
        if summary.get("state") == schema.FINISHED and schema.TRAIN_FLOPS_PER_TOKEN in summary["metrics"] and summary["seconds"] > 0:
            rates.append(summary["metrics"][schema.TRAIN_FLOPS_PER_TOKEN] * summary["tokens"] / summary["seconds"])
    if rates:
        return float(np.median(rates)), f"the median of {len(rates)} finished runs of this study"
    if accounting.total_parameters(config.model) <= PROBE_PARAMETERS:
        return _measured(config), f"measured on this machine now: {PROBE_STEPS} training steps of the baseline on one thread, random tokens"
    a = np.random.default_rng(0).random((PROBE_SIZE, PROBE_SIZE), np.float32)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < PROBE_SECONDS:
        a @ a
        count += 1
    peak = count * 2 * PROBE_SIZE**3 / (time.perf_counter() - began)
    return peak * SHARE_OF_PEAK, f"estimated as {SHARE_OF_PEAK:.0%} of a matrix product's rate here"


def _measured(config: RunConfig) -> float:
    """FLOP/s of forward and backward passes of the real model on one thread; the first, which warms up, is not counted."""
    import torch  # noqa: PLC0415  (seconds, and only this estimate needs it)

    from research.model.loss import chunked_language_loss  # noqa: PLC0415
    from research.model.transformer import Transformer  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = Transformer(config.model).initialise(0)
        size = config.training.micro_batch_size or config.training.batch_size
        ids = torch.randint(config.model.vocab_size, (size, config.data.sequence_length + 1), generator=torch.Generator().manual_seed(0))
        began = 0.0
        for step in range(PROBE_STEPS + 1):
            if step == 1:
                began = time.perf_counter()
            chunked_language_loss(model.hidden(ids[:, :-1])[0], model.lm_head.weight, ids[:, 1:]).backward()
        seconds = (time.perf_counter() - began) / PROBE_STEPS
    finally:
        torch.set_num_threads(threads)
    return accounting.train_flops_per_token(config.model, config.data.sequence_length) * size * config.data.sequence_length / seconds


def _json(path: Path) -> dict[str, Any]:
    import json  # noqa: PLC0415

    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
