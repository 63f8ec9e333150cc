"""`calibrate`: the constants of communication and of computing from the measured points."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from research.errors import ConfigError
from research.terminal import console
from sims.calibrate import FITTED, calibrate, write
from sims.commands import app
from sims.commands.question import AsJson
from sims.outputs.files import check_target
from sims.training import efficiency


@app.command("calibrate")
def command(
    out: Annotated[Path | None, typer.Option(help="Write the fit of communication here, and nothing else")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report only, write nothing")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="path=value of the inputs; needs --out or --dry-run")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit, residuals, what no point identifies; writes the draws.  Example: python -m sims calibrate --dry-run

    Residual: the fit against the point.  Left out: predicted from the other points only.  Both signed, positive is too slow.

    --set changes what the communication is fitted on, never the committed files: priors.nic_efficiency.best=0.9 (.low, .high),
    points.h800-1-node-dispatch.value=150e9 (.spread, .sms, ...), workload.hidden_size=4096, draws=64; computing is then not fitted.
    """
    if overrides and out is None and not dry_run:
        raise ConfigError(f"--set {overrides[0]}: changes the calibration's inputs; say with --out FILE where to write, or take --dry-run")
    path = out or FITTED
    check_target(path, "--out")
    fitted = calibrate(tuple(overrides or ()))
    if not dry_run:
        write(fitted, path)
    compute = efficiency.fit() if out is None and not overrides else None
    if compute is not None and not dry_run:
        efficiency.write(compute)
    if as_json:
        print(json.dumps(fitted if compute is None else {**fitted, "compute": compute.report()}))
        return
    points = Table("point", "measured us", "residual", "left out", "source", title="measured points (sims/calibration/all_to_all.yaml)")
    for point in fitted["points"]:
        points.add_row(
            point["name"], f"{point['seconds'] * 1e6:,.0f}", f"{point['residual']:+.1%}", f"{point['leave_one_out']:+.1%}", point["source"]
        )
    console().print(points)
    table = Table("constant", "best", "prior", "log spread", "of the prior", "seen by (d log seconds / d log constant)")
    for name, found in fitted["constants"].items():
        seen = ", ".join(f"{point} {value:+.2f}" for point, value in found["seen_by"].items()) or "no point"
        row = (f"{found['best']:.4g}", f"{found['prior_best']:.4g}", f"{found['log_spread']:.3f}", f"{found['prior_log_spread']:.3f}")
        table.add_row(name, *row, seen if found["identified"] else f"not identified: {seen}")
    console().print(table)
    if compute is not None:
        console().print(_of_computing(compute.report()))
    print(
        f"mean absolute error: {fitted['mean_absolute_residual']:.1%} fitted, {fitted['mean_absolute_leave_one_out']:.1%} left out"
        + ("" if dry_run else f"; written: {path}")
    )


def _of_computing(report: dict[str, Any]) -> Table:
    title = f"computing: fitted on {report['point']} = {report['published']:,.0f} (sims/calibration/compute.yaml)"
    table = Table("constant", "best", "prior", "log spread", "of the prior", title=title)
    for name, row in report["constants"].items():
        cells = (f"{row['best']:.4g}", f"{row['prior_best']:.4g}", f"{row['log_spread']:.3f}", f"{row['prior_log_spread']:.3f}")
        table.add_row(name if row["identified"] else f"{name} (not identified)", *cells)
    return table
