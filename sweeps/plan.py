"""What a study would cost, before anything runs."""

import time
from pathlib import Path
from typing import Any, get_args

import numpy as np

from research import accounting
from research.config import Domain, RunConfig
from research.memory import training_memory
from sweeps import schema
from sweeps.space import cells
from sweeps.study import Study, label

PROBE_STEPS = 5
PROBE_PARAMETERS = 50_000_000
START_SECONDS = 3.0
"""Of a run: reading the data, the order-2 yardstick, the trace and its simulation."""
PROBE_SIZE = 512
PROBE_SECONDS = 0.4
SHARE_OF_PEAK = 0.25
"""Share of a core's matrix-product rate that a training step of the scaled models reaches; `plan` says it is an estimate."""


def plan(study: Study, root: Path, workers: int) -> dict[str, Any]:
    """Runs, and per variant parameters, FLOPs, cache, memory and expected seconds; nothing is started.

    For `random` and `tpe` the baseline stands for the cells that are not drawn yet.
    """
    designed = study.search.sampler in ("one-factor", "grid")
    chosen = cells(study) if designed else [dict(study.baseline)]
    rate, source = _rate(root, study.run_config(study.baseline, study.seeds[0]))
    rows = [_row(study, study.run_config(cell, study.seeds[0]), label(cell, study.baseline), rate) for cell in chosen]
    trials = len(chosen) if designed else int(study.search.trials or 1)
    per_run = sum(row["seconds"] for row in rows) / len(rows)
    runs = trials * len(study.seeds)
    return {
        "study": study.name,
        "question": study.question,
        "variants": trials,
        "seeds": len(study.seeds),
        "runs": runs,
        "train_tokens": rows[0]["train_tokens"],
        "train_flops": sum(row["train_flops"] for row in rows) / len(rows) * runs,
        "workers": workers,
        "expected_seconds": per_run * runs / workers,
        "estimate": f"{rate / 1e9:.1f} GFLOP/s per worker, {source}",
        "rows": rows,
    }


def _row(study: Study, config: RunConfig, variant: str, rate: float) -> dict[str, Any]:
    size = config.training.micro_batch_size or config.training.batch_size
    flops = accounting.train_flops_per_token(config.model, config.data.sequence_length) * config.training.train_tokens
    return {
        "variant": variant,
        "total_parameters": accounting.total_parameters(config.model),
        "activated_parameters": accounting.activated_parameters(config.model),
        "kv_cache_bytes_per_token": accounting.kv_cache_bytes_per_token(config.model),
        "train_tokens": config.training.train_tokens,
        "train_flops": flops,
        "memory_bytes": training_memory(
            config.model,
            size * config.data.sequence_length,
            micro_batches=config.training.batch_size // size,
            checkpointed=config.training.activation_checkpointing == "blocks",
        ).peak,
        "seconds": flops * (1 + _validation_share(config)) / rate + START_SECONDS,
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
        if summary.get("state") == schema.FINISHED:
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
