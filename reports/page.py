"""The report's text: Markdown that a code host renders, every number computed from the store."""

from collections.abc import Sequence
from pathlib import Path

from reports import analysis
from reports.analysis import Estimate
from reports.figures import Figure
from reports.store import Run, StudyRecord
from research.schedule import batch_schedule
from sweeps import schema

MOST_HASHES = 12
"""Files named on the page; the store has all."""


def markdown(record: StudyRecord, figures: Sequence[Figure], missing: Sequence[str]) -> str:
    """The whole page."""
    variants = record.variants
    base = next((runs for runs in variants.values() if runs[0].baseline), [])
    drawn = {figure.name: _figure(figure) for figure in figures}
    sections = [
        f"# {_safe(record.study['question'])}",
        _state(record),
        "## Answer",
        analysis.headline(record),
        "\n".join(f"- {sentence}" for sentence in analysis.verdict(record)),
        _floor(base),
        analysis.reference_sentence(record),
        drawn.get("effects", ""),
        "## Variants",
        _quality_table(record),
        _intervals(record) + " Bytes are of a 16-bit cache.",
        "## Over training",
        drawn.get("loss-curves", ""),
        _domain_table(record),
        "## What it costs and what it saves",
        drawn.get("trade-off", ""),
        drawn.get("all-to-all-by-limit", ""),
        _limit_table(record),
        "The cluster is simulated: published measurements over M do not exist, so its curve over M rests on exact bytes and on "
        "measured bandwidths, not on a measured sweep."
        if _has_routing(record)
        else "No variant has routed experts: there is nothing to simulate.",
        *_routing_section(record, drawn.get("expert-load", "")),
        "## What matters",
        drawn.get("importances", ""),
        "\n".join(f"- Not shown. {sentence}" for sentence in missing),
        "## Set-up",
        _setup(record, base),
        _text_table(record),
        "## What did not finish",
        _failures(record),
        "## Provenance",
        _provenance(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _has_routing(record: StudyRecord) -> bool:
    return any(run.config.get("model", {}).get("moe") for run in record.runs)


def _routing_section(record: StudyRecord, picture: str) -> list[str]:
    if not _has_routing(record):
        return []
    return [
        "## Who was routed where",
        _routing_table(record),
        "Of the last recorded training batch, mean over layers. Violation is (largest load - mean) / mean, dropped the share of (token, expert) "
        "assignments over a device's capacity; simulated time is dispatch and combine of one layer, routed as the trained model routes held-out text.",
        picture,
    ]


def _safe(text: str) -> str:
    """Text from outside, in which a `<` begins no markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _state(record: StudyRecord) -> str:
    done, planned = sum(run.finished for run in record.runs), record.state.get("planned")
    if record.state.get("state") == "finished":
        return f"Study `{record.study['name']}`: {done} runs, all finished."
    when = f" at {record.state['updated']}" if record.state.get("state") == "running" and "updated" in record.state else ""
    return f"> **This study has not finished cleanly.** State: {record.state.get('state', 'unknown')}{when}; {done} of {planned} runs finished. What follows rests on those."


def _floor(base: Sequence[Run]) -> str:
    floor = analysis.noise_floor(base, schema.BITS_PER_BYTE)
    if floor is None:
        return "The baseline has fewer than two finished seeds: there is no noise floor."
    return f"Noise floor: the baseline's standard deviation over {sum(run.finished for run in base)} seeds is {floor:.4f} bits per byte."


def _figure(figure: Figure) -> str:
    return f"![{figure.alternative}](figures/{figure.name}.png)\n\n*{figure.caption}*"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join([':---'] + ['---:'] * (len(head) - 1))}|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _plus(value: Estimate | None, digits: int = 4, *, sign: bool = False) -> str:
    if value is None:
        return "not recorded"
    mean = f"{value.mean:+.{digits}f}" if sign else f"{value.mean:.{digits}f}"
    if value.low is None or value.high is None:
        return f"{mean} (one seed: no interval)"
    return f"{mean} ± {(value.high - value.low) / 2:.{digits}f}"


def _number(value: Estimate | None, form: str) -> str:
    return "not recorded" if value is None else form.format(value.mean)


def _intervals(record: StudyRecord) -> str:
    """What the table's ± mean, as they were computed."""
    text = "± is half a 95 % t-interval over seeds; differences are paired seed by seed."
    if any(effect.pooled for effect in analysis.effects(record, schema.BITS_PER_BYTE).values()):
        text += (
            f" With fewer than {analysis.OWN_SPREAD} seeds a difference's interval takes its spread from all variants together (a block design: "
            "variant + seed + noise of one size)."
        )
    return text


def _quality_table(record: StudyRecord) -> str:
    head = [
        "variant",
        "seeds",
        "bits per byte",
        "difference to baseline",
        "below order-2 model",
        "KV bytes/token",
        "activated parameters",
        "tokens/s",
    ]
    rows = []
    found = analysis.effects(record, schema.BITS_PER_BYTE)
    for name, runs in record.variants.items():
        loss, reference = (analysis.metric(runs, key) for key in (schema.BITS_PER_BYTE, schema.NGRAM_BITS_PER_BYTE))
        rows.append(
            [
                name,
                f"{sum(run.finished for run in runs)} of {len(runs)}",
                _plus(loss),
                "baseline" if runs[0].baseline else _plus(found.get(name), sign=True),
                f"{1 - loss.mean / reference.mean:.1%}" if loss and reference else "not recorded",
                _number(analysis.metric(runs, schema.KV_BYTES_PER_TOKEN), "{:,.0f}"),
                _number(analysis.metric(runs, schema.ACTIVATED_PARAMETERS), "{:,.0f}"),
                _number(analysis.metric(runs, schema.TOKENS_PER_SECOND), "{:,.0f}"),
            ]
        )
    return _table(head, rows)


def _routing_table(record: StudyRecord) -> str:
    columns = {
        "devices/token": (schema.DISTINCT_DEVICES, "{:.2f}"),
        "expert violation": (schema.EXPERT_VIOLATION, "{:.2f}"),
        "device violation": (schema.DEVICE_VIOLATION, "{:.2f}"),
        "dropped": (schema.DROPPED_SHARE, "{:.1%}"),
    }
    rows = []
    for name, runs in record.variants.items():
        time = analysis.metric(runs, schema.ALL_TO_ALL_SECONDS)
        cells = [_number(analysis.metric(runs, key), form) for key, form in columns.values()]
        rows.append([name, *cells, f"{time.mean * 1e6:,.0f}" if time else "not recorded"])
    return _table(["variant", *columns, "simulated all-to-all (µs)"], rows)


def _domain_table(record: StudyRecord) -> str:
    prefix = f"{schema.BITS_PER_BYTE}/"
    domains = sorted({key.removeprefix(prefix) for run in record.runs for key in run.metrics if key.startswith(prefix)})
    if not domains:
        return ""
    rows = [[name, *(_plus(analysis.metric(runs, prefix + d), 3) for d in domains)] for name, runs in record.variants.items()]
    return "Held-out bits per byte by domain:\n\n" + _table(["variant", *domains], rows)


def _limit_table(record: StudyRecord) -> str:
    base = next((run for run in record.runs if run.baseline and run.simulation), None)
    if base is None:
        return ""
    rows = []
    for limit, result in base.simulation["by_device_limit"].items():
        cells = (result["dispatch_seconds"] * 1e6, result["combine_seconds"] * 1e6)
        rows.append(
            [
                limit,
                f"{result['distinct_devices_per_token']:.3f}",
                *(f"{c:,.0f}" for c in cells),
                f"{result['nvlink_bytes'] / 1e6:,.1f}",
                f"{result['infiniband_bytes'] / 1e6:,.1f}",
                result["dispatch"]["binds"],
                f"GPU {result['dispatch']['straggler']}",
            ]
        )
    head = ["M", "devices/token", "dispatch (µs)", "combine (µs)", "NVLink MB (physical)", "InfiniBand MB (physical)", "what binds", "straggler"]
    return f"The baseline's routing (seed {base.seed}) under every device limit:\n\n" + _table(head, rows)


def _setup(record: StudyRecord, base: Sequence[Run]) -> str:
    if not base or not base[0].config:
        return "The baseline's configuration was not recorded."
    config, cluster = base[0].config, record.study["cluster"]
    model, data, training = config["model"], config["data"], config["training"]
    attention, moe = model["attention"], model["moe"]
    routed = (
        f"{moe['n_routed_experts']} routed experts of width {moe['moe_intermediate_size']} on {moe['expert_devices']} virtual devices, {moe['num_experts_per_tok']} "
        f"used per token, {moe['n_shared_experts']} shared, first {moe['first_k_dense_replace']} layer(s) dense"
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
    tokens = schedule.tokens(schedule.steps)
    lines = [
        f"- Model: {model['num_hidden_layers']} layers of width {model['hidden_size']}, {attention['kind'].upper()} with {attention['num_attention_heads']} heads; {routed}.",
        f"- Data: corpus `{data['corpus']}`, byte-level BPE of {data['tokenizer_vocab_size']} tokens, sequences of {data['sequence_length']}.",
        f"- Budget: {tokens:,} tokens per run, matched by {record.study['budget']['matched']}; seeds {', '.join(map(str, record.study['seeds']))}. "
        "The same seed sees the same tokens in the same order in every variant.",
        f"- Simulated cluster: {cluster['file']}, {cluster['nodes']} nodes of {cluster['gpus_per_node']} GPUs, {cluster['tokens_per_device']} tokens per GPU, "
        f"hidden size {cluster['hidden_size']}, {cluster['dispatch_bits']}-bit dispatch and {cluster['combine_bits']}-bit combine.",
        f"- Search: {record.study['search']['sampler']} over "
        + "; ".join(f"`{path}` {choices if isinstance(choices, list) else dict(choices)}" for path, choices in record.study["space"].items())
        + ".",
        f"- Confounds: {_confounds(record, base)}",
    ]
    return "\n".join(lines)


def _confounds(record: StudyRecord, base: Sequence[Run]) -> str:
    """Settings that differ between a variant and the baseline although the space does not vary them."""
    searched = set(record.study["space"])
    reference = dict(_leaves(base[0].config))
    unexpected = sorted({path for run in record.runs for path, value in _leaves(run.config) if reference.get(path) != value} - searched - {"seed"})
    return (
        f"also different between runs: {', '.join(unexpected)}."
        if unexpected
        else "resolved configurations differ only in the searched settings and the seed."
    )


def _leaves(value: object, prefix: str = "") -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [leaf for key, item in value.items() for leaf in _leaves(item, f"{prefix}.{key}".lstrip("."))]


def _failures(record: StudyRecord) -> str:
    rows = [
        f"- `{run.name}` ({run.variant}, seed {run.seed}): {run.state}" + (f": {_safe(run.reason.strip().splitlines()[-1])}" if run.reason else "")
        for run in record.runs
        if not run.finished
    ]
    planned = record.state.get("planned", len(record.runs))
    if planned > len(record.runs):
        rows.append(f"- {planned - len(record.runs)} planned runs were never started.")
    return "\n".join(rows) or "Nothing: every planned run finished."


def _data(record: StudyRecord) -> str:
    if not record.data:
        return "not recorded"
    hashes = record.data["identity"].get("archives") or record.data["identity"].get("files")
    rows = [f"{_safe(Path(name).name)} `{value[:12]}`" for name, value in sorted(hashes.items())] if isinstance(hashes, dict) else []
    more = f" and {len(rows) - MOST_HASHES} more" if len(rows) > MOST_HASHES else ""
    listed = f"; SHA-256 {', '.join(rows[:MOST_HASHES])}{more} (all in {schema.DATA_FILE})" if rows else ""
    licences = ". Sources and licences: `python -m research data list`" if record.data["identity"].get("archives") else ""
    return f"`{record.data['data_id']}`, corpus `{record.data['corpus']}`{listed}{licences}"


def _text_table(record: StudyRecord) -> str:
    """How much text of each domain there was."""
    if not record.data:
        return ""
    keys = ("train_bytes", "train_tokens", "heldout_bytes", "heldout_tokens")
    rows = [[domain, *(f"{sizes[key]:,}" for key in keys)] for domain, sizes in record.data["domains"].items()]
    return "Text, of which a run sees its budget's share:\n\n" + _table(
        ["domain", "training bytes", "training tokens", "held-out bytes", "held-out tokens"], rows
    )


def _provenance(record: StudyRecord) -> str:
    commits = sorted({run.commit for run in record.runs})
    versions = ", ".join(f"{name} {value}" for name, value in sorted(record.state.get("versions", {}).items()))
    devices = sorted({run.summary["device"] for run in record.runs if run.summary.get("device")})
    ids = ", ".join(f"`{run.config_id}` ({run.name})" for run in record.runs)
    lines = [
        f"- Commit: {', '.join(commits) or 'not recorded'}",
        f"- Versions: {versions or 'not recorded'}",
        f"- Trained on: {'; '.join(devices) or 'not recorded'}",
        f"- Configuration ids: {ids}",
        f"- Data: {_data(record)}",
        f"- Reproduce: `python -m sweeps run {schema.STUDY_FILE}` with the file of this name beside the report, then `python -m reports build {record.study['name']}`",
    ]
    return "\n".join(lines)
