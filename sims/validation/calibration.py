"""The points that constants are fitted on: residuals, predictions with each point left out, and what identifies which constant."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from sims.calibrate import FITTED, Case, cases
from sims.collective import collective_seconds
from sims.constants import load_constants
from sims.formulas import FORMULAS, formulas
from sims.outputs.figures import svg_bytes
from sims.quantiles import Quantiles
from sims.traffic import payload_bytes
from sims.validation.comparison import Comparison, Held, mean_absolute_errors
from sims.validation.document import Figure, Section, band, inside, signed, table
from sims.validation.pictures import errors_figure

MICRO = 1e6


def comparisons(held: Held = ()) -> list[Comparison]:
    """Measured against fitted microseconds of every point, with the formulas of other tools."""
    return [_comparison(case, held) for case in cases()]


def _comparison(case: Case, held: Held) -> Comparison:
    constants = load_constants(case.cluster, given=dict(held))
    point, spec = case.point, case.spec
    theirs = formulas(
        case.cluster,
        nodes=spec.nodes,
        gpus_per_node=spec.gpus_per_node,
        tokens=spec.tokens_per_device,
        chosen=spec.num_experts_per_tok,
        dispatch_bytes=payload_bytes(spec.hidden_size, spec.dispatch_bits),
        combine_bytes=payload_bytes(spec.hidden_size, spec.combine_bits),
    )
    return Comparison(
        group=f"all-to-all, {point.direction}",
        name=point.name,
        unit="us",
        value=case.seconds * MICRO,
        ours=Quantiles.of(collective_seconds(case.traffic, case.cluster, constants, sms=spec.sms) * MICRO),
        kind="fitted",
        baselines={name: seconds[f"{point.direction}_seconds"] * MICRO for name, seconds in theirs.items()},
        source=point.source,
    )


def calibration_section(rows: list[Comparison]) -> Section:
    """Fitted and left out, beside every baseline."""
    fitted = json.loads(FITTED.read_text(encoding="utf-8"))
    stored = {point["name"]: point for point in fitted["points"]}
    names = list(FORMULAS)
    body = []
    for row in rows:
        theirs = [signed(row.baselines[name], row.value) for name in names]
        body.append(
            [row.name, f"{row.value:,.0f}", band(row.ours, digits=0), signed(row.ours.p50, row.value), inside(row.ours, row.value),
             f"{100 * stored[row.name]['leave_one_out']:+.1f} %", *theirs]
        )  # fmt: skip
    for direction in ("dispatch", "combine"):
        some = [row for row in rows if row.name.endswith(direction)]
        means = mean_absolute_errors(some)
        left = float(np.mean([abs(stored[row.name]["leave_one_out"]) for row in some]))
        cells = [f"{100 * means[name]:.0f} %" for name in names]
        body.append([f"mean absolute error, {direction}", "", "", f"{100 * means['ours']:.1f} %", "", f"{100 * left:.1f} %", *cells])
    head = [
        "point",
        "measured, us",
        "ours, us, P50 (P10 to P90)",
        "error, **FITTED**",
        "P10 to P90",
        "error, point left out",
        *(f"`{n}`" for n in names),
    ]
    blocks = [
        "DeepEP's kernels: 4,096 tokens per GPU, hidden 7,168, top 8 of 256, FP8 dispatch and BF16 combine. These points are the only ones that "
        "constants "
        "are fitted on, so their residuals prove little; the column beside them predicts each point from all others. The formulas of other tools "
        "get the "
        "same hardware figures. Errors are signed, (predicted - measured) / measured.",
        table(head, body),
        "### What identifies which constant",
        "A constant counts as identified where the points narrow its prior to 70 % of its spread or less. What no point sees keeps the prior, "
        "which is "
        "part of every band on this page.",
        _identified(fitted["constants"]),
    ]
    figure = Figure(
        name="calibration-errors",
        caption="Errors of the fitted points: ours with its band, the formulas of other tools as marks.",
        alternative="Signed errors per point. Ours: " + "; ".join(f"{row.name} {100 * row.error:+.1f} %" for row in rows) + ".",
        svg=svg_bytes(errors_figure(rows, names)),
    )
    return Section(title="Calibration: the all-to-all (FITTED)", blocks=blocks, figures=[figure])


def _identified(constants: Mapping[str, Any]) -> str:
    rows = []
    for name, fitted in constants.items():
        if "prior_best" not in fitted:
            continue
        low, high = np.quantile(fitted["draws"], (0.1, 0.9))
        seen = ", ".join(dict.fromkeys(name.rsplit("-", 1)[0] for name in fitted["seen_by"])) or "no point"
        rows.append([f"`{name}`", f"{fitted['best']:.3g}", f"{low:.3g} to {high:.3g}", f"{fitted['prior_best']:.3g}",
                     f"{fitted['log_spread'] / fitted['prior_log_spread']:.2f}", "yes" if fitted["identified"] else "**no**", seen])  # fmt: skip
    return table(["constant", "best fit", "P10 to P90", "prior", "spread over prior's", "identified", "seen by"], rows)
