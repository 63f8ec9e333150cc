"""`bytes`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from research.terminal import console
from sims.commands import app
from sims.measured import read_run


@app.command("bytes")
def bytes_command(
    run: Annotated[Path, typer.Argument(help="Directory of a run of `python -m research train --workers D --witness`")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table")] = False,
) -> None:
    """Bytes that a real expert-parallel run counted, beside those that its routing predicts; exit code 1 if one entry differs.

    Example: python -m sims bytes /tmp/run
    """
    found = read_run(run)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        limit = found.device_limit or "unrestricted"
        table = Table("phase", "bytes counted", "bytes predicted", "entries", "of which differ")
        left_out = f", {found.left_out} of other workers or not whole left out" if found.left_out else ""
        table.title = f"{found.workers} workers x {found.replicas} replicas, M {limit}, {found.steps} steps, {found.layers} layers{left_out}"
        for phase in found.phases:
            table.add_row(phase.name, f"{phase.measured:,}", f"{phase.predicted:,}", f"{phase.entries:,}", f"{phase.different:,}")
        console().print(table)
    if not found.agrees:
        raise typer.Exit(1)
