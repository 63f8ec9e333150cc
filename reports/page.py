"""A study's page: blocks in reading order, every number and sentence computed from the store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports import caches, confounds, routing_effects, tables, verdict, words
from reports.analysis import Analysis, has_experts
from reports.charts import Chart
from reports.document import Block, Bullets, Cell, Document, Heading, Notice, Picture, Table, Text, code, safe
from reports.moved import moved
from research.schedule import batch_schedule
from sweeps import schema

MOST_HASHES = 12
"""Files named on the page; the store has all."""


def page(analysis: Analysis, charts: dict[str, Chart], missing: dict[str, str]) -> Document:
    """The whole page."""

    def picture(name: str) -> list[Block]:
        return [Picture(charts[name])] if name in charts else [Text(f"Not shown. {safe(missing[name])}")]

    blocks: list[Block] = [*_notices(analysis), Heading("Answer")]
    if found := verdict.sentences(analysis):
        blocks.append(Bullets(tuple(found)))
    blocks += [*picture("effects"), tables.quality(analysis)]
    blocks += [Heading("What this study can show"), Text(" ".join(verdict.floor_sentences(analysis))), *_some(tables.needs(analysis))]
    blocks += [Text(verdict.reference_sentence(analysis))]
    blocks += [Heading("Over training"), *picture("loss-curves"), *_some(tables.domains(analysis))]
    blocks += [Heading("What it costs and what it saves"), *picture("pareto"), *_caches(analysis, picture), *_simulation(analysis, picture)]
    if (table := moved(analysis)) is not None:
        blocks += [Heading("What moved between workers"), table]
    if any(has_experts(run) for run in analysis.record.runs):
        blocks += [Heading("Who was routed where"), tables.routing(analysis), *routing_effects.blocks(analysis), *picture("distinct-devices")]
        blocks += [*picture("device-load"), *picture("expert-load")]
    blocks += [Heading("What matters"), *picture("importances")]
    blocks += [
        Heading("What was held equal"),
        *_matched(analysis),
        *_some(tables.budget(analysis)),
        *_some(tables.named(analysis)),
        Bullets(tuple(_confounds(analysis))),
    ]
    blocks += [Heading("Set-up"), Bullets(tuple(_setup(analysis))), *_text_table(analysis)]
    blocks += [Heading("What did not finish"), Bullets(tuple(_failures(analysis)))]
    blocks += [Heading("Provenance"), Bullets(tuple(_provenance(analysis))), tables.runs(analysis)]
    return Document(
        title=safe(analysis.record.question),
        kicker=_kicker(analysis),
        answer=verdict.headline(analysis),
        facts=_facts(analysis),
        blocks=tuple(blocks),
    )


def _some(table: Table | None) -> list[Block]:
    return [table] if table is not None else []


def _kicker(analysis: Analysis) -> str:
    record = analysis.record
    dates = [str(record.state[key])[:10] for key in ("started", "updated") if record.state.get(key)]
    when = f", {' to '.join(dict.fromkeys(dates))}" if dates else ""
    return f"Study {code(record.name)}, {sum(run.finished for run in record.runs)} of {len(record.runs)} runs finished{when}"


def _facts(analysis: Analysis) -> tuple[tuple[str, str], ...]:
    unit = words.unit(analysis.metric)
    seeds = sorted({len(v.values) for v in analysis.variants})
    facts = [
        ("Variants", f"{sum(not v.baseline for v in analysis.variants)} beside the baseline"),
        ("Seeds", f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"),
        ("Noise floor", "none" if analysis.floor is None else f"{words.number(analysis.floor)} {unit}"),
        (
            "Smallest effect shown 4 times of 5",
            "none" if analysis.smallest is None else "any: there is no noise" if not analysis.spread else f"{words.number(analysis.smallest)} {unit}",
        ),
    ]
    if analysis.expected is not None:
        facts.append(("Expected effect", f"{words.stated(analysis.expected.effect)} {unit}"))
    return tuple(facts)


def _notices(analysis: Analysis) -> list[Block]:
    """What a reader must know before the answer."""
    if not analysis.incomplete:
        return []
    said = [
        f"{p.place}: {p.text}" if p.place != "study" else f"the study {p.text}" if not p.text.startswith("the ") else p.text
        for p in analysis.incomplete
    ]
    more = f"; and {len(said) - MOST_HASHES} more, under *What did not finish*" if len(said) > MOST_HASHES else ""
    return [
        Notice(
            f"This report is incomplete; what follows rests on what is there, and nothing was filled in. {safe('; '.join(said[:MOST_HASHES]))}{more}."
        )
    ]


def _simulation(analysis: Analysis, picture: Any) -> list[Block]:
    if not any(has_experts(run) for run in analysis.record.runs):
        return [Text("No variant has routed experts: there is nothing to simulate.")]
    said = (
        "The cluster is simulated: published measurements over M do not exist, so its curve over M rests on exact bytes and on "
        "measured bandwidths, not on a measured sweep."
    )
    return [*picture("simulated"), *_some(tables.limits(analysis)), Text(said)]


def _caches(analysis: Analysis, picture: Any) -> list[Block]:
    found = caches.table(analysis)
    return [] if found is None else [*picture("caches"), found]


def _matched(analysis: Analysis) -> list[Block]:
    asked = analysis.record.study.get("budget") or {}
    base = analysis.baseline
    reference = confounds.quantities(base.runs) if base else {}
    equal, unequal = [], []
    for name, label in confounds.QUANTITIES.items():
        shares = [
            found[name] / reference[name] - 1
            for v in analysis.variants
            if not v.baseline and reference.get(name) and name in (found := confounds.quantities(v.runs))
        ]
        if shares and max(map(abs, shares)) <= confounds.EQUAL:
            equal.append(label)
        elif shares:
            low, high = (f"{share:+.0%}" for share in (min(shares), max(shares)))
            unequal.append(f"{label} ({low})" if low == high else f"{label} ({low} to {high})")
    matched = str(asked.get("matched", "budgets"))
    parts = ["The study asked for no equal budget." if matched == "none" else f"The study asked for equal {safe(_quantity(matched))}."]
    parts.append(f"Equal within {confounds.EQUAL * 100:.0f} %: {words.join(equal)}." if equal else "Nothing that was recorded is equal within 2 %.")
    if unequal:
        parts.append(f"Not equal: {words.join(unequal)}.")
    rows: dict[str, str] = {}
    for run in analysis.record.runs:
        kept = _match_words(run.matched)
        if run.retuned:
            edge = ", at the edge of those tried: a better one may lie outside" if run.retuned.get("edge") else ""
            kept.append(f"learning rate {_short(run.retuned.get('learning_rate'))} chosen by short runs{edge}")
        if kept:
            rows.setdefault(run.variant, ", ".join(kept))
    alike: dict[str, list[str]] = {}
    for variant, text in rows.items():
        alike.setdefault(text, []).append(variant)
    items = []
    for text, variants in alike.items():
        more = f" and {len(variants) - 6} more" if len(variants) > 6 else ""
        who = "every variant" if len(variants) == len(analysis.variants) > 1 else ", ".join(variants[:6]) + more
        items.append(f"{safe(who)}: {safe(text)}")
    return [Text(" ".join(parts)), *([Bullets(tuple(items))] if items else [])]


def _quantity(name: str) -> str:
    return confounds.QUANTITIES.get(name, name.replace("_", " "))


def _match_words(matched: dict[str, Any]) -> list[str]:
    """`660,480 training tokens of 660,000 asked (+0.1 %), by training.train_tokens = 1,234`; nothing where nothing was matched."""
    requested, achieved = (matched.get(key) for key in ("requested", "achieved"))
    if not isinstance(achieved, int | float) or not isinstance(requested, int | float) or not requested:
        return []
    text = f"{_short(achieved)} {_quantity(str(matched.get('quantity')))} of {_short(requested)} asked ({100 * (achieved / requested - 1):+.1f} %)"
    return [text, f"by {matched['adjusted']} = {_short(matched.get('value'))}"] if matched.get("adjusted") else [text]


def _short(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _confounds(analysis: Analysis) -> list[str]:
    found = []
    explained: dict[str, list[str]] = {}
    for d in analysis.differences:
        if d.why == confounds.NAMED:
            continue  # a table of their own
        text = f"{safe(d.variant)} has {safe(str(d.ours))}, the baseline {safe(str(d.theirs))}"
        explained.setdefault(f"`{d.path}` ({d.why})" if d.why else f"**Confound:** `{d.path}` also differs", []).append(text)
    for head, parts in explained.items():
        more = f"; and {len(parts) - 6} more" if len(parts) > 6 else ""
        found.append(f"{head}: {'; '.join(parts[:6])}{more}.")
    if not any(not d.why for d in analysis.differences):
        found.append(
            "Resolved configurations differ from the baseline's only in the searched settings and the seed"
            + (", and in what is said above." if found or tables.named(analysis) else ".")
        )
    found += [f"**Confound:** {safe(text)}." for text in confounds.provenance_differences(analysis.record)]
    seeds = {v.words: sorted(v.values) for v in analysis.variants}
    if len({tuple(s) for s in seeds.values()}) > 1:
        found.append(
            "Not every variant has every seed: " + "; ".join(f"{name} {', '.join(map(str, s)) or 'none'}" for name, s in seeds.items()) + "."
        )
    return found


def _setup(analysis: Analysis) -> list[str]:
    record, base = analysis.record, analysis.record.baseline
    lines = []
    config = next((run.config for run in base if run.config), None)
    if config is None:
        lines.append("The baseline's configuration was not recorded.")
    else:
        try:
            lines += _configured(config)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # Of another version, or damaged: the page does without these lines, and says so.
            lines.append("The baseline's configuration is not one that this version can read.")
    seeds = ", ".join(map(str, record.study["seeds"]))
    lines.append(f"Seeds {seeds}: the same seed sees the same tokens in the same order in every variant.")
    if cluster := record.study.get("cluster"):
        lines.append(
            f"Simulated cluster: {safe(str(cluster['file']))}, {cluster['nodes']} nodes of {cluster['gpus_per_node']} GPUs, "
            f"{cluster['tokens_per_device']} tokens per GPU, "
            f"hidden size {cluster['hidden_size']}, {cluster['dispatch_bits']}-bit dispatch and {cluster['combine_bits']}-bit combine."
        )
    sampler = (record.study.get("search") or {}).get("sampler", "one-factor")
    space = "; ".join(
        f"{safe(words.setting(path))} (`{path}`) {safe(str(choices if isinstance(choices, list) else dict(choices)))}"
        for path, choices in record.study["space"].items()
    )
    lines.append(f"Search: {safe(str(sampler))} over {space}.")
    if record.others:
        lines.append(
            f"{len(record.others)} short runs chose settings for others ({', '.join(sorted({r.role for r in record.others}))}); "
            "they are no replicates."
        )
    return lines


def _configured(config: dict[str, Any]) -> list[str]:
    model, data, training = config["model"], config["data"], config["training"]
    attention, moe = model["attention"], model["moe"]
    routed = (
        f"{moe['n_routed_experts']} routed experts of width {moe['moe_intermediate_size']} on {moe['expert_devices']} virtual devices, "
        f"{moe['num_experts_per_tok']} used per token, {moe['n_shared_experts']} shared, first {moe['first_k_dense_replace']} layer(s) dense"
        if moe
        else "no experts"
    )
    schedule = batch_schedule(
        train_tokens=training["train_tokens"],
        sequence_length=data["sequence_length"],
        batch_size=training["batch_size"],
        first=training.get("batch_ramp_from"),
        ramp_tokens=training.get("batch_ramp_tokens") or 0,
        multiple=training.get("micro_batch_size") or 1,
    )
    layers, width = model["num_hidden_layers"], model["hidden_size"]
    return [
        f"Baseline: {layers} layers of width {width}, {attention['kind'].upper()} with {attention['num_attention_heads']} heads; {routed}.",
        f"Data: corpus `{data['corpus']}`, byte-level BPE of {data['tokenizer_vocab_size']} tokens, sequences of {data['sequence_length']}.",
        f"Training: {schedule.tokens(schedule.steps):,} tokens in the baseline's runs.",
    ]


def _text_table(analysis: Analysis) -> list[Block]:
    """How much text of each domain there was."""
    found = analysis.record.data.get("domains")
    if not found:
        return []
    keys = ("train_bytes", "train_tokens", "heldout_bytes", "heldout_tokens")
    rows: list[tuple[Cell, ...]] = [(safe(domain), *((f"{sizes[key]:,}", float(sizes[key])) for key in keys)) for domain, sizes in found.items()]
    head = ("domain", "training bytes", "training tokens", "held-out bytes", "held-out tokens")
    return [Table(name="text", caption="Text, of which a run sees its budget's share", head=head, rows=tuple(rows))]


def _failures(analysis: Analysis) -> list[str]:
    record = analysis.record
    rows = []
    for run in record.runs:
        kinds = [str(a["failure"]) for a in run.attempts if a.get("failure")]
        kind = str(run.summary.get("failure") or (kinds[-1] if kinds else ""))
        reason = f": {safe(str(run.reason).strip().splitlines()[-1])}" if run.reason and str(run.reason).strip() else ""
        if not run.finished:
            rows.append(
                f"`{run.name}` ({safe(run.variant)}, seed {run.seed}): {safe(run.state)}"
                f"{f' ({safe(kind)})' if kind and kind != run.state else ''}{reason}"
            )
        elif kinds:
            rows.append(f"`{run.name}` ({safe(run.variant)}, seed {run.seed}): finished after {_counted(kinds)}")
    rows += [f"{safe(p.place)}: {safe(p.text)}" for p in record.problems]
    rows += [f"{safe(p.place)}: {safe(p.text)}" for p in analysis.incomplete if p not in record.problems and analysis.metric in p.text]
    planned = record.state.get("planned") or 0
    if planned > len(record.runs) and record.state.get("state") != "finished":
        rows.append(f"{planned - len(record.runs)} planned runs were never started.")
    return rows or ["Nothing: every planned run finished."]


def _counted(kinds: Sequence[str]) -> str:
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return ", ".join(f"{count} x {safe(kind)}" for kind, count in counts.items())


def _data(record_data: dict[str, Any]) -> str:
    if not record_data:
        return "not recorded"
    identity = record_data.get("identity") or {}
    hashes = identity.get("archives") or identity.get("files")
    rows = [f"{safe(Path(name).name)} `{value[:12]}`" for name, value in sorted(hashes.items())] if isinstance(hashes, dict) else []
    more = f" and {len(rows) - MOST_HASHES} more" if len(rows) > MOST_HASHES else ""
    listed = f"; SHA-256 {', '.join(rows[:MOST_HASHES])}{more} (all in {schema.DATA_FILE})" if rows else ""
    licences = ". Sources and licences: `python -m research data list`" if identity.get("archives") else ""
    return f"`{record_data.get('data_id')}`, corpus `{record_data.get('corpus')}`{listed}{licences}"


def _provenance(analysis: Analysis) -> list[str]:
    record = analysis.record
    commits = sorted({run.commit for run in record.runs})
    versions = ", ".join(f"{name} {value}" for name, value in sorted(record.state.get("versions", {}).items()))
    devices = sorted({str(run.summary["device"]) for run in record.runs if run.summary.get("device")})
    seconds = sum(float(run.summary.get("seconds") or 0) for run in record.runs)
    times = [
        f"{word} {safe(str(record.state[key]))}" for key, word in (("started", "last started"), ("updated", "last written")) if record.state.get(key)
    ]
    return [
        f"Commit: {safe(', '.join(commits)) or 'not recorded'}",
        f"Versions: {safe(versions) or 'not recorded'}",
        f"Trained on: {safe('; '.join(devices)) or 'not recorded'}; {seconds / 3600:,.2f} hours of training in all",
        f"Times, of the store: {'; '.join(times) or 'not recorded'}",
        f"Data: {_data(record.data)}",
        f"Reproduce: `python -m sweeps run {schema.STUDY_FILE}` with the file of this name beside the report, "
        f"then `python -m reports build {record.name}`",
    ]
