"""The cluster model's part of the page of `make bench`."""

from typing import Any

TARGETS = {"collective": 0.020, "step": 10.0, "sweep": 120.0}
"""Seconds that a collective of 64 GPUs, a step on 128 GPUs and 200 points may take."""


def sims(found: dict[str, Any]) -> list[str]:
    """Targets beside what was measured, events beside SimPy's own rate, and the curves."""
    at = found["sims"]
    events, collective, step, sweep = at["events"], at["collective"], at["step"], at["sweep"]
    busy = f"; {1e3 * collective['processor_seconds']:.1f} ms of processor time"
    rows = [
        (
            "all-to-all of 64 GPUs with 4,096 tokens each, routing given, 64 draws",
            _within(collective["seconds"], TARGETS["collective"], 1e3, "ms") + busy,
        ),
        ("the same with its routing made up", f"{1e3 * collective['seconds_with_routing']:,.0f} ms"),
        ("DeepSeek-V2's step on 128 GPUs, closed form, 64 draws", _within(step["seconds"], TARGETS["step"], 1, "s")),
        (f"the same with all {step['events']:,} events", _within(step["seconds_events"], TARGETS["step"], 1, "s")),
        (f"{sweep['points']} points of M x K x nodes, routing included", _within(sweep["seconds"], TARGETS["sweep"], 1, "s")),
    ]
    head = ("GPUs", "all-to-all, groups of 64 folded, ms", "step, folded, s", "its events", "phases they stand for")
    curve = [
        (f"{row['gpus']:,}", f"{1e3 * row['all_to_all_seconds']:,.0f}",
         *((f"{row['step_seconds']:.2f}", f"{row['step_events']:,}", f"{row['step_phases']:,}") if "step_seconds" in row else ("", "", "")))
        for row in at["curve"]
    ]  # fmt: skip
    whole = [(f"{row['gpus']:,}", f"{1e3 * row['seconds']:,.0f}", f"{1e3 * row['seconds'] / row['gpus']:.2f}", f"{1e3 * row['events_seconds']:,.0f}")
             for row in at["devices"]]  # fmt: skip
    return [
        "## The cluster model",
        "",
        *_table(("what", "wall time"), rows),
        f"Events: {events['events_per_second']:,.0f} phases per second of a training step in SimPy, a bare loop of time-outs with as many processes "
        f"{events['bare_events_per_second']:,.0f} in the same run: {events['share']:.2f} of it.",
        "",
        "### Over GPUs, symmetry folded",
        "",
        *_table(head, curve),
        "### One expert-parallel group, nothing folded",
        "",
        *_table(("GPUs", "all-to-all, ms", "ms per GPU", "T1, a process per GPU, ms"), whole),
    ]


def _within(seconds: float, target: float, scale: float, unit: str) -> str:
    """Bold where the target is missed."""
    mark = "" if seconds <= target else "**"
    return f"{scale * seconds:,.1f} {unit} ({mark}target {scale * target:g} {unit}{mark})"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows), ""]
