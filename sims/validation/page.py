"""The whole page, made from committed data alone."""

from collections.abc import Sequence
from typing import Any

from sims.validation.byte_counts import devices_section, measured_section, ratio_section
from sims.validation.calibration import calibration_section, comparisons
from sims.validation.comparison import Comparison, Held
from sims.validation.document import Document, Section, band, inside, signed, table
from sims.validation.serving import prediction, serving_section
from sims.validation.training import predictions, training_section

TITLE = "The cluster model against what was published"
LEAD = (
    "Made by `python -m sims validate` from committed data; nothing here was typed in. *FITTED* rows are what constants were fitted on, "
    "*predicted* rows "
    "were never seen by a fit. Errors are signed, (ours - published) / published; every time has P10, P50 and P90; a published figure outside that "
    "band is "
    "marked, and misses stay on the page."
)
WHAT_IF = (
    "**What if:** on this page some calibrated constants are held at a value instead of drawn; errors with a point left out and what identifies "
    "which constant are still those of the committed fit. Held:"
)
UNVALIDATED = (
    "**The device limit M on hardware.** No public sweep over M exists. The curve over M rests on exact bytes and on times that were checked over "
    "other "
    "numbers of nodes and of experts per token; it was never compared with a measured curve over M.",
    "**Skewed routing.** Published all-to-all and training figures are taken with routing that is (nearly) balanced by force. Times under skew "
    "follow from "
    "bytes and from waiting for the slowest, and no public measurement checks them.",
    "**DeepSeek-V2's cluster.** The number of GPUs and whether the 8 devices of a layer share a node are not published: both placements and several "
    "numbers of GPUs are shown.",
    "**Request lengths** of the service behind the published throughput are not published: the ratio is shown over a range of them.",
    "**Faults.** Goodput is held against the closed form of checkpointing (Young and Daly) by tests, not against a real cluster's log.",
)


def build(held: Held = ()) -> tuple[Document, list[Comparison]]:
    """The page and every comparison on it; `held` are constants that are not drawn but have a value."""
    points, (training, steps), (serving, ratio) = comparisons(held), predictions(held), prediction(held)
    predicted = [row for row in (*training, *serving) if row.kind == "predicted"]
    sections = [
        Section(title="Predictions at a glance", blocks=[_glance(predicted)]),
        calibration_section(points),
        training_section(training, steps, held),
        serving_section(serving, ratio),
        ratio_section(),
        devices_section(),
        measured_section(),
        Section(title="What no public data validates", blocks=["\n".join(f"- {sentence}" for sentence in UNVALIDATED)]),
    ]
    rows = [*points, *training, *serving]
    lead = LEAD if not held else f"{LEAD} {WHAT_IF} {', '.join(f'`{name}` = {value:g}' for name, value in held)}."
    return Document(title=TITLE, lead=lead, sections=[*sections, _sources(rows)]), rows


def _glance(rows: Sequence[Comparison]) -> str:
    head = ["prediction", "published", "ours, P50 (P10 to P90)", "error", "P10 to P90", "simplest baseline", "its error"]
    body = []
    for row in rows:
        digits = 2 if row.value < 10 else 1 if row.value < 1000 else 0
        name, value = next(iter(row.baselines.items()), ("", 0.0))
        body.append(
            [row.name, f"{row.value:,.{digits}f} {row.unit}", band(row.ours, digits=digits), signed(row.ours.p50, row.value),
             inside(row.ours, row.value), name, signed(value, row.value) if name else ""]
        )  # fmt: skip
    return table(head, body)


def _sources(rows: Sequence[Comparison]) -> Section:
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.source, []).append(row.name)
    return Section(title="Sources", blocks=["\n".join(f"- {source}: {', '.join(dict.fromkeys(names))}." for source, names in found.items())])


def as_values(rows: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Plain values for JSON, to seven digits: more would differ between machines."""
    return [_rounded(row.to_dict()) for row in rows]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value
