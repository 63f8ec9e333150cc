"""The page of a benchmark: Markdown to read, the same values as JSON beside it."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from research.atomic import write_text
from research.benchmark.machine import Machine
from research.benchmark.measure import Measured


def as_values(machine: Machine, found: Measured, command: str, day: date) -> dict[str, Any]:
    """Everything that was found, plain, ready for JSON."""
    values = dataclasses.asdict(found)
    for check, plain in zip(found.checks, values["checks"], strict=True):
        plain["passed"] = check.passed
    return {"date": day.isoformat(), "command": command, "passed": found.passed, "machine": dataclasses.asdict(machine), **values}


def write_page(folder: Path, machine: Machine, found: Measured, command: str, day: date, *, quick: bool) -> Path:
    """DATE-CARD.md and .json in `folder` (with a number behind, where that is taken); the path of the page.

    OSError when it cannot be written.  The JSON comes first, so that a page has its values beside it.
    """
    stem = f"{day.isoformat()}-{machine.slug}{'-quick' if quick else ''}"
    names = [stem, *(f"{stem}-{i}" for i in range(2, 1000))]
    name = next(n for n in names if not (folder / f"{n}.md").exists())
    values = as_values(machine, found, command, day)
    write_text(folder / f"{name}.json", json.dumps(values, indent=1) + "\n")
    page = folder / f"{name}.md"
    write_text(page, render(machine, found, command, day, quick=quick))
    return page


def render(machine: Machine, found: Measured, command: str, day: date, *, quick: bool) -> str:
    """Markdown."""
    about = {key: value for key, value in dataclasses.asdict(machine).items() if value is not None}
    if machine.memory_bytes is not None:
        about["memory_bytes"] = f"{machine.memory_bytes / 2**30:.1f} GiB"
    quickly = ["Measured with `--quick`: the sizes are tiny, and the rates say that it runs, not how fast the machine is.", ""]
    lines = [f"# Benchmark of {day.isoformat()}: {machine.card}", "", f"    {command}", "", *(quickly if quick else [])]
    lines += _table(("", ""), ((key.replace("_bytes", "").replace("_", " "), str(value)) for key, value in about.items()))
    lines += ["## Correctness", "", "Relative differences, |a - b| / |b|, the largest over outputs and, where it says so, gradients.", ""]
    rows = [
        (c.name, _number(c.difference, ".1e"), f"{c.bound:.0e}", "passed" if c.passed else f"**failed** {c.error or ''}".strip())
        for c in found.checks
    ]
    lines += _table(("check", "difference", "bound", ""), rows)
    lines += [
        "## Speed",
        "",
        "Medians of repeated runs after a warm-up.  Peaks are measured here, on values drawn at random, not read off a data sheet.",
        "",
    ]
    lines += _peaks(found)
    lines += _grouped(found)
    lines += _training(found)
    lines += _decode(found)
    if found.failures:
        lines += ["## Not measured", "", *(f"* {failure}" for failure in found.failures), ""]
    return "\n".join(lines)


def _peaks(found: Measured) -> list[str]:
    peaks = found.peaks
    products = [
        (f"product of two {peaks.product_size}-square matrices, {name}", _flops(rate)) for name, rate in peaks.product_flops_per_second.items()
    ]
    size = f"{peaks.copy_bytes / 1e9:.2f} GB"
    moved = [
        (f"copy of {size}, read and written", f"{peaks.copy_bytes_per_second / 1e9:,.1f} GB/s"),
        (f"sum over {size}, read", f"{peaks.read_bytes_per_second / 1e9:,.1f} GB/s"),
    ]
    return _table(("peak", ""), [*products, *moved])


def _grouped(found: Measured) -> list[str]:
    if not found.grouped:
        return []
    first = found.grouped[0]
    title = f"### Grouped product\n\n`grouped_mm` of {first.experts} experts, {first.inputs} to {first.outputs}, {first.precision}, evenly loaded.\n"
    rows = [
        (
            f"{g.tokens_per_expert:,}",
            _flops(g.forward_flops_per_second),
            f"{g.forward_of_peak:.1%}",
            _flops(g.both_flops_per_second),
            f"{g.both_of_peak:.1%}",
        )
        for g in found.grouped
    ]
    return [title, *_table(("tokens per expert", "forward", "of peak", "forward and backward", "of peak"), rows)]


def _training(found: Measured) -> list[str]:
    said = "Forward, balance losses, backward, clipping and AdamW, on random tokens.  MFU is over the measured peak of the precision."
    rows = [
        (
            t.model,
            f"{t.parameters / 1e6:,.1f} M",
            t.precision,
            f"{t.batch_size} x {t.sequence_length}",
            f"{t.tokens_per_second:,.0f}",
            f"{t.mfu:.1%}",
            _gigabytes(t.peak_memory_bytes),
        )
        for t in found.training
    ]
    columns = ("model", "parameters", "precision", "batch", "tokens/s", "MFU", "peak memory")
    return ["### Training", "", said, "", *_table(columns, rows)] if rows else []


def _decode(found: Measured) -> list[str]:
    said = "One sequence, greedy.  The floor is the time to read the activated weights and the cache once at the measured bandwidth."
    rows = [
        (
            d.model,
            d.precision,
            f"{d.context:,}",
            f"{d.tokens_per_second:,.1f}",
            f"{d.seconds_per_token * 1e3:.3f}",
            f"{d.floor_seconds * 1e3:.3f}",
            f"{d.times_floor:.2f}",
            _gigabytes(d.peak_memory_bytes),
        )
        for d in found.decode
    ]
    columns = ("model", "precision", "context", "tokens/s", "ms per token", "floor, ms", "times the floor", "peak memory")
    return ["### Decoding", "", said, "", *_table(columns, rows)] if rows else []


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(columns), _row(["---"] * len(columns)), *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.1f} TFLOPS" if rate >= 1e12 else f"{rate / 1e9:,.1f} GFLOPS"


def _gigabytes(size: int | None) -> str:
    return "not counted" if size is None else f"{size / 1e9:.2f} GB"


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
