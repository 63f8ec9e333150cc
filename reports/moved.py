"""What runs on several workers sent and waited for, beside what is simulated."""

import math
from statistics import mean

from reports.analysis import Analysis, Variant
from reports.document import Cell, Table
from reports.simulated import bytes_that_leave
from reports.statistics import estimate
from reports.store import Run
from sweeps import schema

WAYS = 4
"""Dispatch and combine, forward and backward."""


def moved(analysis: Analysis) -> Table | None:
    """Bytes per step and seconds in collectives by variant, measured beside simulated; None if no run was on several workers."""
    workers = int((analysis.record.study.get("resources") or {}).get("workers_per_trial", 1))
    rows = [row for v in analysis.variants if (row := _row(v, workers)) is not None]
    if not rows:
        return None
    layers = max((_layers(v) for v in analysis.variants), default=0)
    return Table(
        name="moved",
        caption=f"What {workers} real workers sent and waited for, beside the simulation",
        head=(
            "variant", "M", "sent per step, measured (kB)", "simulated (kB)", "measured / simulated", "in collectives per step, measured (ms)",
            "all-to-alls of a step, simulated (µs)", "received violation",
        ),
        rows=tuple(rows),
        note="Sent: payload that left its worker, dispatch and combine forward and backward, counted where it is handed to a collective; simulated: "
        "of the same function that predicts every byte matrix, for held-out text routed by the trained model, with nothing dropped. Seconds: of "
        "the average worker, waiting for slower ones included, through this machine's memory where it has no network between them; simulated: "
        f"{layers} layers, forward and backward, on the study's cluster with its own tokens per GPU. They are to be compared over M, not with "
        "each other. Violation: (largest - mean) / mean of the tokens that the workers receive. Means over seeds, ± half a 95 % t-interval.",
    )  # fmt: skip


def _row(variant: Variant, workers: int) -> tuple[Cell, ...] | None:
    sent = _values(variant, schema.PARALLEL_BYTES)
    if not sent:
        return None
    predicted = [value for run in variant.runs if (value := predicted_bytes(run, workers)) is not None]
    simulated = [2 * _layers(variant) * seconds for seconds in _values(variant, schema.ALL_TO_ALL_SECONDS)]
    limit = next(((run.config["model"].get("moe") or {}).get("device_limit") for run in variant.runs if run.config), None)
    ratio: Cell = "not recorded"
    if predicted and mean(predicted):
        ratio = (f"{mean(sent) / mean(predicted):.3f}", mean(sent) / mean(predicted))
    return (
        variant.words,
        ("no limit", math.inf) if limit is None else (str(limit), float(limit)),
        _cell(sent, 1e-3, 1),
        _cell(predicted, 1e-3, 1),
        ratio,
        _cell(_values(variant, schema.PARALLEL_SECONDS), 1e3, 1),
        _cell(simulated, 1e6, 0),
        _cell(_values(variant, schema.RECEIVED_VIOLATION), 1.0, 3),
    )


def predicted_bytes(run: Run, workers: int) -> float | None:
    """Payload that leaves its worker in a training step, by the run's routing; None where that is not recorded or does not divide."""
    if run.trace is None or not run.config:
        return None
    model, training = run.config["model"], run.config["training"]
    parts = math.gcd(workers, run.trace.expert_devices)
    tokens = training["batch_size"] * run.config["data"]["sequence_length"]
    # Blocks that are computed again send their tokens again, forward.
    ways = WAYS + (2 if training.get("activation_checkpointing") == "blocks" else 0)
    try:
        return ways * tokens * bytes_that_leave(run.trace, parts, model["hidden_size"], training.get("precision", "auto"))
    except ValueError:
        return None


def _layers(variant: Variant) -> int:
    """With routed experts."""
    return max((len(run.trace.layers) for run in variant.runs if run.trace is not None), default=0)


def _values(variant: Variant, metric: str) -> list[float]:
    return [value for run in variant.runs if (value := run.value(metric)) is not None]


def _cell(values: list[float], scale: float, digits: int) -> Cell:
    found = estimate([scale * value for value in values]) if values else None
    if found is None:
        return "not recorded"
    spread = f" ± {found.high - found.mean:,.{digits}f}" if found.high is not None else ""
    return (f"{found.mean:,.{digits}f}{spread}", found.mean)
