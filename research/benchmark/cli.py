"""`python -m research benchmark`: correctness and speed on the machine at hand, as a dated page."""

import json
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

FAILED = 3
"""Exit code when a check failed or something could not be measured; the page says which."""


def benchmark(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    preset: Annotated[
        list[str] | None, typer.Option(help="Model to train and decode, a preset or deepseek-v2-lite-slice; repeatable, by default some that fit")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: does it run, and is it right?")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the page and its JSON are written")] = Path("reports/benchmarks"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the values instead of the page")] = False,
) -> None:
    """Check the fast paths against their slow twins, measure training and decoding beside the machine's own peaks, write a page.

    Exit code 3 when a check failed or something could not be measured.

    Example: python -m research benchmark --device cuda
    Example: python -m research benchmark --device cpu --quick --out /tmp/benchmarks --json
    """
    from research.benchmark.machine import describe_machine  # noqa: PLC0415
    from research.benchmark.measure import measure  # noqa: PLC0415
    from research.benchmark.page import as_values, render, write_page  # noqa: PLC0415
    from research.benchmark.plan import make_plan  # noqa: PLC0415
    from research.devices import choose_device  # noqa: PLC0415
    from research.errors import UserError  # noqa: PLC0415

    place = choose_device(device)
    plan = make_plan(place, preset or [], quick=quick)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out = {out}: cannot be made ({error}); name a folder that can be written to") from error
    command, day = shlex.join(["python", "-m", "research", *sys.argv[1:]]), date.today()
    machine = describe_machine(place)
    found = measure(place, plan, lambda line: print(line, file=sys.stderr, flush=True))
    try:
        page = write_page(out, machine, found, command, day, quick=quick)
    except OSError as error:
        raise UserError(f"--out = {out}: cannot be written ({error})") from error
    print(json.dumps(as_values(machine, found, command, day), indent=1) if as_json else render(machine, found, command, day, quick=quick))
    print(f"written: {page}", file=sys.stderr)
    if not found.passed:
        raise typer.Exit(FAILED)
