"""The page of claims: every sentence with a number in it is computed."""

from collections import Counter
from collections.abc import Sequence

from reports.charts import Bars, Chart, Interval, Intervals
from reports.claims.published import published
from reports.claims.reference import correction_lines, model_table, published_tables
from reports.claims.rows import ALONE, CLOSE, HOW, MISSED, REPRODUCED, UNDECIDED, UNMEASURED, VERDICTS, Row
from reports.document import Block, Bullets, Cell, Document, Heading, Picture, Table, Text, safe
from reports.words import join

TONES = {REPRODUCED: "better", CLOSE: "none", UNDECIDED: "none", MISSED: "worse"}
MEASURED = HOW["measurement"]
COMPARED = (REPRODUCED, CLOSE, MISSED)


def document(rows: Sequence[Row]) -> Document:
    """The whole page."""
    blocks: list[Block] = [Heading("Published against ours"), *_errors(rows), *_measured(rows), *_reading()]
    pictures = {"Training cost": _savings(rows), "Generation throughput": _throughput(rows)}
    for section in published().sections:
        inside = [row for row in rows if row.section == section.title]
        blocks += [Heading(section.title), _table(section.title, inside)]
        if section.title in pictures:
            blocks.append(Picture(pictures[section.title]))
    blocks += [Heading("Sizes of the models"), model_table()]
    blocks += [Heading("Often said, and not so"), Bullets(tuple(correction_lines(rows)))]
    blocks += [Heading("Published, not recomputed"), Text(_not_recomputed()), *published_tables()]
    blocks += [Heading("How to make this page"), Bullets(_how())]
    return Document(
        title="DeepSeek-V2's claims, recomputed",
        kicker="V2 is DeepSeek-V2 (arXiv 2405.04434), DeepSeekMoE arXiv 2401.06066",
        answer=answer(rows),
        facts=_facts(rows),
        blocks=tuple(blocks),
    )


def answer(rows: Sequence[Row]) -> str:
    """The page in two sentences."""
    computed = [row for row in rows if row.how != MEASURED and row.verdict in COMPARED]
    trained = [row for row in rows if row.how == MEASURED]
    found = {verdict: [row for row in computed if row.verdict == verdict] for verdict in COMPARED}
    parts = [f"{len(found[REPRODUCED])} are reproduced", f"{len(found[CLOSE])} {'is' if len(found[CLOSE]) == 1 else 'are'} close"]
    missed = "; ".join(_lower(row.claim) for row in found[MISSED])
    parts.append(f"{len(found[MISSED])} {'is' if len(found[MISSED]) == 1 else 'are'} missed{f' ({missed})' if missed else ''}")
    return f"Of {len(computed)} published figures {join(parts)}. {_trained(trained)}"


def _lower(text: str) -> str:
    first, _, rest = text.partition(" ")
    return f"{first.lower()} {rest}" if first.istitle() and first.isalpha() and first != "DeepSeek" else text


def _trained(rows: Sequence[Row]) -> str:
    """How many claims about trained models there are, and what became of them."""
    claims = {row.id for row in rows}
    done = [row for row in rows if row.verdict != UNMEASURED]
    if not done:
        return f"None of {len(claims)} claims about trained models is measured here yet."
    counts = Counter(row.verdict for row in done)
    said = join([f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]])
    covered = len({row.id for row in done})
    return (
        f"Of {len(claims)} claims about trained models {covered} {'is' if covered == 1 else 'are'} measured here, in {len(done)} comparisons: {said}."
    )


def _facts(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    counts = Counter(row.verdict for row in rows)
    return tuple((verdict.capitalize(), str(counts[verdict])) for verdict in VERDICTS if counts[verdict] or verdict in COMPARED)


def _table(title: str, rows: Sequence[Row]) -> Table:
    return Table(
        name=title.lower().replace(" ", "-"),
        caption=title,
        head=("claim", "published", "ours", "error", "verdict", "tolerance", "how", "printed in", "rests on"),
        rows=tuple(_cells(row) for row in rows),
        note=_intervals_note(rows),
        prose=True,
    )


def _cells(row: Row) -> tuple[Cell, ...]:
    verdict = f"**{row.verdict}**" if row.verdict in COMPARED else row.verdict
    error: Cell = "" if row.error is None else (_percent(row.error), row.error)
    return (
        safe(row.claim),
        _sorted_by(safe(row.published_text) or "nothing", row.published),
        _sorted_by(safe(row.ours_text), row.ours),
        error,
        (verdict, float(VERDICTS.index(row.verdict))),
        row.tolerance,
        row.how,
        safe(row.source),
        safe(row.rests_on),
    )


def _percent(share: float) -> str:
    """With its sign, which a share that rounds to 0 has not."""
    text = f"{100 * share:+.1f}"
    return f"{text.lstrip('+-') if float(text) == 0 else text} %"


def _sorted_by(text: str, value: float | None) -> Cell:
    return text if value is None else (text, value)


def _intervals_note(rows: Sequence[Row]) -> str:
    kinds = {row.how for row in rows if row.low is not None}
    parts = []
    if HOW["simulation"] in kinds:
        parts.append("In brackets behind a simulated median: P10 to P90 over what is uncertain about the hardware.")
    if MEASURED in kinds:
        parts.append("A measured difference is that of the first model to the second, paired by seed, with its 95 % interval.")
    return " ".join(parts)


def _errors(rows: Sequence[Row]) -> list[Block]:
    """The headline figures: one picture for closed forms, one for simulations, whose errors are of another size."""
    chosen = {claim.id for claim in published().claims() if claim.headline}
    pictures: list[Block] = []
    for how, extra in (("closed form", ""), ("simulation", " Whiskers: P10 to P90 over what is uncertain about the hardware.")):
        inside = [row for row in rows if row.id in chosen and row.how == HOW[how]]
        tolerance = 100 * published().tolerances[how].reproduced
        panel = Intervals(title=f"By {how}", x_label="error of ours, %", items=tuple(map(_error_item, inside)), band=tolerance)
        worst = max(inside, key=lambda row: abs(row.error or 0.0))
        chart = Chart(
            name=f"errors-{how.replace(' ', '-')}",
            caption=f"Ours against the published figure; the grey band is what counts as reproduced.{extra}",
            alternative=f"Relative errors of {len(inside)} figures by {how}; the largest is {worst.short}: {100 * (worst.error or 0):+.1f} %",
            panels=(panel,),
        )
        pictures.append(Picture(chart))
    return pictures


def _error_item(row: Row) -> Interval:
    assert row.error is not None
    ends = [None if end is None else 100 * _error_at(row, end) for end in (row.low, row.high)]
    low, high = (min(ends), max(ends)) if ends[0] is not None and ends[1] is not None else (None, None)  # type: ignore[type-var]
    note = f"{row.ours_text}, published {row.published_text}: {100 * row.error:+.1f} %, {row.verdict}"
    return Interval(name=row.short, mean=100 * row.error, low=low, high=high, tone=TONES[row.verdict], note=note)


def _error_at(row: Row, end: float) -> float:
    """Of an end of the interval, as the row's own error is taken."""
    assert row.published is not None
    return (100 - end) / (100 - row.published) - 1 if row.unit.startswith("% ") else end / row.published - 1


def _measured(rows: Sequence[Row]) -> list[Block]:
    """The measured differences, where there are any."""
    found = [row for row in rows if row.how == MEASURED and row.ours is not None]
    if not found:
        return [Text(f"{_trained([row for row in rows if row.how == MEASURED])} The rows say which study would answer each.")]
    items = tuple(
        Interval(name=f"{row.claim} ({row.study})", mean=row.ours or 0.0, low=row.low, high=row.high, tone=TONES[row.verdict],
                 note=f"{row.ours_text}, {row.verdict}")
        for row in found
    )  # fmt: skip
    chart = Chart(
        name="measured",
        caption="Trained here, at small scale: the first model's metric less the second's, relative, with 95 % intervals.",
        alternative=f"{len(items)} measured differences: " + "; ".join(f"{row.claim}: {row.verdict}" for row in found),
        panels=(Intervals(title="measured on trained models", x_label="difference, % of the second", items=items),),
    )
    return [Picture(chart)]


def _bars(name: str, rows: Sequence[Row], ids: Sequence[str], label: str, caption: str) -> Chart:
    by_id = {row.id: row for row in rows}
    chosen = [by_id[each] for each in ids]
    return Chart(
        name=name,
        caption=caption,
        alternative="; ".join(f"{row.short}: published {row.published_text}, ours {row.ours_text}" for row in chosen),
        panels=(
            Bars(
                title="",
                x_label=label,
                names=tuple(row.short for row in chosen),
                groups=(("published", tuple(row.published or 0.0 for row in chosen)), ("ours", tuple(row.ours or 0.0 for row in chosen))),
            ),
        ),
    )


def _savings(rows: Sequence[Row]) -> Chart:
    caption = "What is saved against DeepSeek 67B: above published, below ours, by three ways of counting the cost."
    return _bars("savings", rows, ("kv-cut", "cost-flops", "cost-simulated", "cost-published"), "% less", caption)


def _throughput(rows: Sequence[Row]) -> Chart:
    caption = "One node of 8 H800: above published, below ours; the published 100K prompt tokens are a lower bound."
    return _bars("throughput", rows, ("generated-bar", "generated-67b", "prompts"), "thousand tokens per second", caption)


def _reading() -> list[Block]:
    tolerances = published().tolerances
    closed, simulated, measured = (tolerances[how] for how in ("closed form", "simulation", "measurement"))
    return [
        Bullets(
            (
                f"**Closed form**: reproduced within {100 * closed.reproduced:g} % or the last printed digit, close within {100 * closed.close:g} %.",
                f"**Simulation**: reproduced within {100 * simulated.reproduced:g} %, close within {100 * simulated.close:g} %.",
                "**Measured**: a claimed direction is reproduced or missed where the study shows a difference at 95 %, else undecided; "
                f"equality is reproduced where the 95 % interval ends below +{100 * measured.reproduced:g} %, close where only the mean does and the "
                f"interval ends below +{100 * measured.close:g} %.",
                "The error of a saving is taken on what remains: 98 % saved for 93 % would be an error of 71 %, not of 5 %.",
                f"**{ALONE.capitalize()}**: the paper has no such figure; ours stands alone, and is not counted.",
            )
        )
    ]


def _not_recomputed() -> str:
    return (
        "Benchmarks and chat scores would take the released weights, which this code reads the names of and was never given. "
        "They are shown as printed, and no verdict is passed on them."
    )


def _how() -> tuple[str, ...]:
    return (
        "`python -m reports claims` makes this page from the presets, the cluster file, the calibrated constants and the committed reports.",
        "`--study NAME` reads another study's measured results; `--json` prints the rows; `--check` says whether the committed page is this one.",
        "Published values, sources and tolerances are in `reports/claims/data/`.",
    )
