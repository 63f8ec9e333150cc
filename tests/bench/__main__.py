"""`python -m tests.bench`: all measurements of `make bench`, and their page."""

import dataclasses
import json
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from research.atomic import write_text
from research.benchmark.machine import describe_machine
from research.model.kernels import native
from tests.bench import decoding, moe, parallel, parallel_page, sims, sweeping, training
from tests.bench.common import pin
from tests.bench.page import render

PARTS = ("training", "workers", "moe", "decoding", "sweeps", "sims", "parallel")
OTHERS = {"sims", "parallel"}
"""Which measure no kernel of one core."""
STEPS = [
    ("deepseek-v2-micro", 8, 256),
    ("deepseek-v2-micro", 2, 1024),
    ("deepseek-v2-mini", 8, 256),
    ("deepseek-v2-mini", 2, 1024),
    ("64-experts", 8, 256),
    ("64-experts-shallow", 8, 256),
]
CONTEXTS = [(1, 1024), (1, 4096), (1, 16384), (1, 32768), (8, 1024), (8, 4096)]


def main(
    out: Annotated[Path, typer.Option(help="Folder of the page and its JSON")] = Path("reports/benchmarks"),
    only: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; repeatable, by default all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The smallest of each, once: that it runs, not how fast")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Speed on one CPU core beside transformers and the core's own limits.  Example: python -m tests.bench --only decoding"""
    unknown = sorted(set(only or ()) - set(PARTS))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: no such part; valid: {', '.join(PARTS)}", param_hint="--only")
    parts = only or list(PARTS)
    if native.library() is None and set(parts) - OTHERS:
        raise typer.BadParameter("the compiled kernels are not there, which is what is measured; a C compiler is needed")
    core = pin()
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": " ".join(["python -m tests.bench", *(f"--only {part}" for part in only or []), *(["--quick"] if quick else [])])
        if only or quick
        else "make bench",
        "machine": _machine(),
        "core": core,
    }
    if set(parts) - OTHERS:
        found["peak_gflops"] = 2 * 1024**3 / training.product_seconds("N", "N", 1024, 1024, 1024) / 1e9
        found["read_bytes_per_second"] = decoding.bandwidth()
    rounds = 1 if quick else 5
    if "training" in parts:
        found["training"] = [_said(training.measure_step(*step, rounds)) for step in (STEPS[:1] if quick else STEPS)]
    if "moe" in parts:
        cases = [("small", 128, 1.0), ("larger", 128, 1.0), ("small", 128, 8.0), ("larger", 128, 8.0), ("small", 512, 1.0)]
        found["moe"] = [_said(moe.measure_moe(*case, 1 if quick else 15)) for case in (cases[:1] if quick else cases)]
    if "decoding" in parts:
        models = ["deepseek-v2-nano"] if quick else ["deepseek-v2-small"]
        found["decoding"] = [_said(decoding.measure_decoding(model, *at, rounds)) for model in models for at in (CONTEXTS[:1] if quick else CONTEXTS)]
        found["same_words"] = _said({"of": 16 if quick else 256, "same": decoding.same_words(models[0], 64 if quick else 1024, 16 if quick else 256)})
        found["prefill"] = _said(decoding.measure_prefill(models[0], 256 if quick else 4096))
    if "workers" in parts:
        found["workers"] = _said(training.measure_workers("deepseek-v2-micro", 2 if quick else 12))
    if "sims" in parts:
        found["sims"] = _said(sims.measure_sims(rounds, quick))
    if "sweeps" in parts:
        found["sweeps"] = {"overhead": sweeping.measure_overhead(quick, _said), **sweeping.measure_driver(quick)}
    if "parallel" in parts:
        found["parallel"] = parallel.measure_parallel(quick)
    # A page of some parts takes no whole one's place.
    stem = "-".join(["cpu", found["date"], *(only or []), *(["quick"] if quick else [])])
    write_text(out / f"{stem}.json", json.dumps(found, indent=1) + "\n")
    write_text(out / f"{stem}.md", render(found, stem))
    if "parallel" in found:
        parallel_page.draw(found["parallel"], out / f"{stem}-parallel.png")
    print(json.dumps(found, indent=1) if as_json else f"{out / stem}.md")


def _machine() -> dict[str, object]:
    about = dataclasses.asdict(describe_machine(torch.device("cpu")))
    return {**{key: value for key, value in about.items() if value is not None}, "transformers": transformers.__version__}


def _said(found: dict[str, Any]) -> dict[str, Any]:
    """`found`, shown as it comes: the whole takes minutes."""
    typer.echo(" ".join(f"{key} {value}" for key, value in found.items() if key not in ("rest", "tokens_per_second")), err=True)
    return found


if __name__ == "__main__":
    typer.run(main)
