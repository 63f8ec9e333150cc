"""The tables of a page, out of an analysis."""

from reports import confounds, words
from reports.analysis import Analysis, Variant
from reports.document import Cell, Table, code, safe
from reports.statistics import OWN_SPREAD, Effect, Estimate, estimate
from reports.store import REPLICATE
from reports.words import effect_words, estimate_words
from sweeps import schema


def _number(value: Estimate | None, form: str) -> Cell:
    return "not recorded" if value is None else (form.format(value.mean), value.mean)


def _estimated(value: Estimate | None) -> Cell:
    return "not recorded" if value is None else (estimate_words(value), value.mean)


def _p(value: float | None) -> Cell:
    if value is None:
        return "none"
    return ("< 0.0001" if value < 1e-4 else f"{value:.4f}", value)


def quality(analysis: Analysis) -> Table:
    """Sorted by effect, the baseline at its place (an effect of zero); variants without an effect last."""
    rows: list[tuple[float, tuple[Cell, ...]]] = []
    for v in analysis.variants:
        rank = v.effect.mean if v.effect else 0.0 if v.baseline else float("inf")
        rank = rank if analysis.lower_is_better or rank == float("inf") else -rank
        told: Cell = ("baseline", 0.0) if v.baseline else (effect_words(v.effect), v.effect.mean) if v.effect else "none"
        value = estimate(list(v.values.values()))
        cells = (
            v.words,
            told,
            _answer(analysis, v),
            _p(v.effect.p_holm) if v.effect else ("", 1.0) if v.baseline else "none",
            _estimated(value),
            (f"{len(v.values)} of {len(v.runs)}", float(len(v.values))),
            _number(v.means.get(schema.KV_BYTES_PER_TOKEN), "{:,.0f}"),
            _number(v.means.get(schema.ACTIVATED_PARAMETERS), "{:,.0f}"),
            _number(v.means.get(schema.TOKENS_PER_SECOND), "{:,.0f}"),
        )
        rows.append((rank, cells))
    rows.sort(key=lambda row: row[0])
    head = ("variant", "difference to baseline", "verdict", "p (Holm)", words.metric_name(analysis.metric), "seeds")
    return Table(
        name="effects",
        caption=f"Variants by their effect on {words.metric_name(analysis.metric)}",
        head=(*head, "KV bytes/token", "activated parameters", "tokens/s"),
        rows=tuple(cells for _, cells in rows),
        note=interval_note([v.effect for v in analysis.variants if v.effect]),
    )


def _answer(analysis: Analysis, variant: Variant) -> str:
    if variant.baseline:
        return "baseline"
    if variant.effect is None:
        states = {run.state for run in variant.runs}
        if schema.FINISHED in states:
            return "not recorded" if not variant.values else "no seed in common"
        return join_states(states)
    if not variant.effect.shown:
        return "not shown"
    return "worse" if analysis.worse(variant) else "better"


def join_states(states: set[str]) -> str:
    return words.join(sorted(states))


def interval_note(effects: list[Effect]) -> str:
    """What the ± mean, as they were computed."""
    parts = ["± of a mean is half a 95 % t-interval over its seeds."]
    if not effects:
        return parts[0]
    parts.append(
        "A difference is paired seed by seed; its 95 % interval is the wider of a percentile bootstrap over the seeds and Student's t (a bootstrap "
        "of n seeds alone holds the truth in at most 1 - 2^(1-n) of all studies: 50 % with 2 seeds, 75 % with 3, 94 % with 5)."
    )
    if any(not e.pooled and e.seeds >= OWN_SPREAD for e in effects):
        parts.append("The spread is the variant's own, never less than the median of all variants'.")
    if any(e.pooled for e in effects):
        parts.append(f"With fewer than {OWN_SPREAD} seeds it is that of all variants together (a block design: variant + seed + noise of one size).")
    if any(not e.pooled and 1 < e.seeds < OWN_SPREAD for e in effects):
        parts.append("With two seeds and one variant it is that of two differences, which is a weak basis.")
    parts.append("p is Student's, corrected by Holm over all comparisons; a difference counts as shown at 0.05.")
    return " ".join(parts)


def routing(analysis: Analysis) -> Table:
    columns = {
        "devices/token": (schema.DISTINCT_DEVICES, "{:.2f}"),
        "expert violation": (schema.EXPERT_VIOLATION, "{:.2f}"),
        "device violation": (schema.DEVICE_VIOLATION, "{:.2f}"),
        "dropped": (schema.DROPPED_SHARE, "{:.1%}"),
    }
    rows = []
    for v in analysis.variants:
        time = v.means.get(schema.ALL_TO_ALL_SECONDS)
        cells = [_number(v.means.get(key), form) for key, form in columns.values()]
        rows.append((v.words, *cells, (f"{time.mean * 1e6:,.0f}", time.mean) if time else "not recorded"))
    return Table(
        name="routing",
        caption="Routing at the end of training",
        head=("variant", *columns, "simulated all-to-all (µs)"),
        rows=tuple(rows),
        note="Of the last recorded training batch, mean over layers and seeds. Violation is (largest load - mean) / mean, dropped the share of "
        "(token, expert) assignments over a device's capacity; simulated time is dispatch and combine of one layer, routed as the trained "
        "model routes held-out text.",
    )


def domains(analysis: Analysis) -> Table | None:
    prefix = f"{schema.BITS_PER_BYTE}/"
    names = sorted({key.removeprefix(prefix) for run in analysis.record.runs for key in run.metrics if key.startswith(prefix)})
    if not names:
        return None
    rows = []
    for v in analysis.variants:
        found = [estimate([x for run in v.runs if (x := run.value(prefix + name)) is not None]) for name in names]
        rows.append((v.words, *map(_estimated, found)))
    return Table(name="domains", caption="Held-out bits per byte by domain", head=("variant", *map(safe, names)), rows=tuple(rows))


def needs(analysis: Analysis) -> Table | None:
    """What it would take to show an effect of a stated size."""
    rows = []
    for need in analysis.needs:
        label = f"{need.effect:.2g}" + (" (expected)" if need.expected else "" if need.stated else " (largest not shown)")
        seeds: Cell = (f"{need.seeds}", float(need.seeds)) if need.seeds else "over 1000"
        runs: Cell = (f"{need.runs:,}", float(need.runs)) if need.runs else "none"
        tokens: Cell = (f"{need.tokens / 1e6:,.1f}", need.tokens) if need.tokens else "not recorded"
        hours: Cell = (f"{need.hours:,.1f}", need.hours) if need.hours else "not recorded"
        rows.append(((label, need.effect), seeds, runs, tokens, hours))
    if not rows:
        return None
    return Table(
        name="needs",
        caption=f"What it would take to show an effect on {words.metric_name(analysis.metric)}",
        head=(f"effect ({words.unit(analysis.metric)})", "seeds per variant", "runs", "training tokens (millions)", "hours of training"),
        rows=tuple(rows),
        note="Shown four times of five at Holm's strictest level, by the noncentral t of the paired spread above; runs as long as these, hours as "
        "recorded, one after the other. A longer run has another spread, which only a pilot can tell.",
    )


def limits(analysis: Analysis) -> Table | None:
    """The baseline's simulated routing under every device limit, as the run recorded it."""
    base = next((run for run in analysis.record.baseline if run.simulation.get("by_device_limit")), None)
    if base is None:
        return None
    rows: list[tuple[Cell, ...]] = []
    for limit, result in base.simulation["by_device_limit"].items():
        try:
            rows.append(
                (
                    (limit, float(limit) if limit.isdigit() else 1e9),
                    f"{result['distinct_devices_per_token']:.3f}",
                    *(f"{result[key] * 1e6:,.0f}" for key in ("dispatch_seconds", "combine_seconds")),
                    *(f"{result[key] / 1e6:,.1f}" for key in ("nvlink_bytes", "infiniband_bytes")),
                    safe(str(result["dispatch"]["binds"])),
                    f"GPU {result['dispatch']['straggler']}",
                )
            )
        except (KeyError, TypeError):
            return None
    head = ("M", "devices/token", "dispatch (µs)", "combine (µs)", "NVLink MB", "InfiniBand MB", "what binds", "straggler")
    return Table(name="limits", caption=f"The baseline's routing (seed {base.seed}) under every device limit", head=head, rows=tuple(rows))


def budget(analysis: Analysis) -> Table | None:
    """Quantities relative to the baseline: what was held equal and what was not."""
    base = analysis.baseline
    reference = confounds.quantities(base.runs) if base else {}
    columns = [name for name in confounds.QUANTITIES if reference.get(name)]
    if not base or not columns:
        return None
    rows: list[tuple[Cell, ...]] = []
    for v in analysis.variants:
        found = confounds.quantities(v.runs)
        cells: list[Cell] = [v.words]
        for name in columns:
            share = found[name] / reference[name] - 1 if name in found else None
            absolute = f"{reference[name]:,.4g}" if reference[name] < 1 else f"{reference[name]:,.0f}"
            cells.append("not recorded" if share is None else (absolute, 0.0) if v.baseline else (f"{share:+.1%}", share))
        rows.append(tuple(cells))
    return Table(
        name="budget",
        caption="Budgets: the baseline's, and how far the variants are from it",
        head=("variant", *(confounds.QUANTITIES[name] for name in columns)),
        rows=tuple(rows),
    )


def named(analysis: Analysis) -> Table | None:
    """Settings that the study's named variants lay over its base, where they are not all alike."""
    found = [d for d in analysis.differences if d.why == confounds.NAMED]
    if not found:
        return None
    ours = {(d.path, d.variant): d.ours for d in found}
    theirs = {d.path: d.theirs for d in found}
    shown = [v for v in analysis.variants if not v.baseline and any(d.variant == v.name for d in found)]
    rows: list[tuple[Cell, ...]] = []
    for path in sorted(theirs):
        values = [theirs[path], *(ours.get((path, v.name), theirs[path]) for v in shown)]
        rows.append((f"`{path}`", *("" if value is None else safe(str(value)) for value in values)))
    base = analysis.baseline
    head = ("setting", safe(base.runs[0].variant) if base else "baseline", *(v.words for v in shown))
    return Table(name="named", caption="What the named variants set", head=head, rows=tuple(rows), note="Empty: the variant has no such setting.")


def runs(analysis: Analysis) -> Table:
    """Every run, with what identifies it."""
    rows = []
    for run in (*analysis.record.runs, *analysis.record.others):
        value = run.value(analysis.metric)
        rows.append(
            (
                f"`{run.name}`",
                safe(run.variant) if run.role == REPLICATE else f"{safe(run.variant)} ({safe(run.role)})",
                (str(run.seed), float(run.seed)),
                safe(run.state),
                (f"{value:.5f}", value) if value is not None else "not recorded",
                (f"{run.summary['seconds']:,.0f}", float(run.summary["seconds"])) if run.summary.get("seconds") else "not recorded",
                str(run.summary.get("attempts", len(run.attempts) or "not recorded")),
                code(str(run.config_id)),
            )
        )
    head = ("run", "variant", "seed", "state", words.metric_name(analysis.metric), "seconds", "attempts", "configuration")
    return Table(name="runs", caption="Every run (the variant as MLflow's tag names it)", head=head, rows=tuple(rows))
