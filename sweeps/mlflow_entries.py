"""What stands in MLflow: tags, parameters, metrics, datasets and notes, as values.  Who writes them is `tracking`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research import accounting
from research.configfile import load_run_config
from sweeps import schema
from sweeps.progress import duration, plus_minus
from sweeps.status import RunStatus, StudyStatus, Variant, failure_class, mean_and_error, read_json
from sweeps.study import Study, short_name

MAX_KEYS = 150
"""Metric keys of one run: MLflow's page of a run grows slow, then freezes, beyond some hundreds."""
RECORD_KEYS = 110
"""Of them for what is recorded over steps; the rest is for final values and the machine."""
NOTE_VARIANTS = 40
RECORDED = ("train/", "routing/", "validation/")
SIZES = (
    "model.hidden_size",
    "model.num_hidden_layers",
    "model.attention.kind",
    "model.attention.num_attention_heads",
    "model.attention.kv_lora_rank",
    "model.moe.n_routed_experts",
    "model.moe.n_shared_experts",
    "model.moe.num_experts_per_tok",
    "model.moe.moe_intermediate_size",
    "model.moe.expert_devices",
    "model.moe.device_limit",
    "data.corpus",
    "data.sequence_length",
    "training.train_tokens",
    "training.batch_size",
    "training.optimizer.learning_rate",
)
"""Settings that are parameters of every run beside the searched ones; the whole configuration is an artifact."""


def experiment_tags(study: Study) -> dict[str, str]:
    # The kind spares a person MLflow's question whether this is about language-model traces.
    return {"mlflow.note.content": study.question, "mlflow.experimentKind": "custom_model_development", schema.TAG_QUESTION: study.question}


def study_tags(study: Study, root: Path, commit: str) -> dict[str, str]:
    return {
        schema.TAG_SCHEMA: str(schema.SCHEMA_VERSION),
        schema.TAG_STUDY: study.name,
        schema.TAG_QUESTION: study.question,
        schema.TAG_ROLE: "study",
        schema.TAG_STATE: "running",
        schema.TAG_COMMIT: commit,
        schema.TAG_ROOT: str(root),
        "mlflow.note.content": f"# {study.question}\n\nRunning.",
    }


def run_tags(study: Study, root: Path, about: Mapping[str, Any], parent: str) -> dict[str, str]:
    """What runs are grouped by; each searched setting is a tag too, `moelab.parameter.<name>`."""
    changed = {path: value for path, value in about["parameters"].items() if path not in study.baseline or study.baseline[path] != value}
    names = _names(about["parameters"])
    lines = [f"* {path}: {study.baseline.get(path)} → **{value}**" for path, value in changed.items()]
    return {
        "mlflow.parentRunId": parent,
        schema.TAG_SCHEMA: str(schema.SCHEMA_VERSION),
        schema.TAG_STUDY: study.name,
        schema.TAG_ROLE: "retune" if about.get("role") == "retune" else "run",
        schema.TAG_ROOT: str(root),
        schema.TAG_RUN: about["run"],
        schema.TAG_VARIANT: about["variant"],
        schema.TAG_SEED: str(about["seed"]),
        schema.TAG_TRIAL: str(about["trial"]),
        schema.TAG_BASELINE: str(about["baseline"]).lower(),
        schema.TAG_STATE: "running",
        schema.TAG_COMMIT: about["commit"],
        schema.TAG_CONFIG: about["config_id"],
        schema.TAG_CHANGED: ", ".join(names[path] for path in changed) or "nothing",
        **{f"{schema.TAG_PARAMETER}{names[path]}": str(value) for path, value in about["parameters"].items()},
        "mlflow.note.content": "\n\n".join([f"{_head(about)}, of the study *{study.question}*", "\n".join(lines) or "The baseline itself."]),
    }


def end_tags(study: Study, about: Mapping[str, Any], summary: Mapping[str, Any], known: set[str]) -> list[Any]:
    from mlflow.entities import RunTag  # noqa: PLC0415

    last = (summary["reason"] or "").strip()[-4000:]
    values = [f"* {o.metric}: **{summary['metrics'][o.metric]:.6g}**" for o in study.objectives if o.metric in summary["metrics"]]
    took = f"{summary['state']} after {summary['steps']} steps, {summary['tokens']:,} tokens, {duration(summary['seconds'])}"
    note = [f"{_head(about)}, of the study *{study.question}*", took + f", attempt {summary['attempts']}", "\n".join(values)]
    note += ["\n".join(["```", last, "```"])] if last else []
    tags = {
        schema.TAG_STATE: summary["state"],
        schema.TAG_ATTEMPT: str(summary["attempts"]),
        "mlflow.note.content": "\n\n".join(part for part in note if part),
    }
    failed = {schema.TAG_REASON: last, schema.TAG_FAILURE: failure_class(summary) or ""}
    # Empty ones clear those of an earlier attempt; a run that never failed has none.
    tags |= {name: value for name, value in failed.items() if value or summary["attempts"] > 1}
    left_out = [name for name in summary["metrics"] if name not in known and not name.startswith("system/")]
    if left_out:
        tags[schema.TAG_LEFT_OUT] = f"{len(left_out)} metrics beyond {MAX_KEYS}, all in {schema.SUMMARY_FILE} and {schema.METRICS_FILE}"
    return [RunTag(name, value) for name, value in tags.items()]


def params(study: Study, about: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
    """The searched settings by their short names, the preset, and the sizes that tell models apart."""
    from mlflow.entities import Param  # noqa: PLC0415

    names = _names(about["parameters"])
    found = {names[path]: value for path, value in about["parameters"].items()}
    model = study.base.get("model")
    preset = model.get("preset") if isinstance(model, Mapping) else model
    found |= {"preset": preset} if isinstance(preset, str) else {}
    for path in SIZES:
        value = _at(config, path)
        if path not in about["parameters"] and value is not None:
            found.setdefault(short_name(path), value)
    architecture = load_run_config(config).model
    found["total_parameters"] = accounting.total_parameters(architecture)
    found["activated_parameters"] = accounting.activated_parameters(architecture)
    return [Param(name, str(value)[:6000]) for name, value in found.items()]


def metrics(records: Sequence[Mapping[str, Any]], stamp: int, known: set[str], objectives: set[str]) -> list[Any]:
    """Records as MLflow's metrics.  `known` holds the keys that the run has, and grows; a key beyond RECORD_KEYS is left out."""
    from mlflow.entities import Metric  # noqa: PLC0415

    names = dict.fromkeys(name for record in records for name in record if name not in ("step", "tokens"))
    _admit(sorted(names, key=lambda name: (name not in objectives, name.count("/"), name)), known, RECORD_KEYS)
    return [Metric(name, float(record[name]), stamp, record["step"]) for record in records for name in record if name in known and name in names]


def system_metrics(records: Iterable[Mapping[str, Any]], known: set[str]) -> list[Any]:
    """Samples of the machine, each with the time at which it was taken."""
    from mlflow.entities import Metric  # noqa: PLC0415

    found = []
    for record in records:
        names = [name for name in record if name.startswith("system/")]
        _admit(names, known, MAX_KEYS)
        found += [Metric(name, float(record[name]), int(record["time"] * 1000), int(record["sample"])) for name in names if name in known]
    return found


def final_metrics(summary: Mapping[str, Any], stamp: int, known: set[str]) -> list[Any]:
    """What only the end of a run knows; what is recorded over steps has been sent."""
    from mlflow.entities import Metric  # noqa: PLC0415

    final = {name: value for name, value in summary["metrics"].items() if not name.startswith(RECORDED)}
    final["run/seconds"] = summary["seconds"]
    _admit(sorted(final, key=lambda name: (name != "run/seconds", name.count("/"), name)), known, MAX_KEYS)
    return [Metric(name, float(value), stamp, summary["steps"]) for name, value in final.items() if name in known]


def study_metrics(status: StudyStatus, stamp: int) -> list[Any]:
    """Of the parent run: how many runs ended how, and the best mean of each objective."""
    from mlflow.entities import Metric  # noqa: PLC0415

    found: dict[str, float] = {"study/runs": status.planned}
    found |= {f"study/{state}": count for state, count in status.counts.items()}
    for metric, direction in status.objectives:
        if (best := status.best(metric, direction)) is not None and best.mean is not None:
            found[f"best/{metric}"] = best.mean
    return [Metric(name, float(value), stamp, 0) for name, value in found.items()]


def log_datasets(client: Any, run_id: str, root: Path, study: str) -> None:
    """The prepared text as inputs of a run: the corpus under its digest, for training, and what is held out of it, for validation."""
    from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415

    data = read_json(root / schema.DATA_FILE)
    if not data:
        return
    identity = json.dumps(data["identity"])
    source = {"corpus": data["corpus"], "identity": data["identity"] if len(identity) < 50_000 else f"in {schema.DATA_FILE} of study {study}"}
    shape = json.dumps({"kind": "byte-level BPE", "vocab_size": data["vocab_size"], "split": data["split"]})
    inputs = []
    for name, context, part in ((data["corpus"], "training", "train"), (f"{data['corpus']}-held-out", "validation", "heldout")):
        sizes = {domain: _part(about, part) for domain, about in data["domains"].items()}
        profile = json.dumps({"data_id": data["data_id"], "domains": sizes})
        entity = Dataset(name, data["data_id"][:36], "moelab", json.dumps(source), schema=shape, profile=profile)
        inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", context)]))
    client.log_inputs(run_id, datasets=inputs)


def study_note(study: Study, status: StudyStatus, state: str, verdict: str | None) -> str:
    """Markdown: the question, the report's verdict if there is one, what the numbers say, and what failed."""
    parts = [f"# {study.question}"]
    if verdict:
        parts.append(f"**Verdict.** {verdict}")
    parts += [_finding(status), f"State: **{state}**, {status.done} of {status.planned} runs, {status.seeds} seeds per variant."]
    for metric in [o.metric for o in study.objectives]:
        parts.append(_note_table(status, metric))
    failed = [run for run in status.runs if run.failure]
    if failed:
        lines = [f"* {run.run} ({run.variant}, seed {run.seed}): **{run.failure}**, attempt {run.attempts}: {_last_line(run)}" for run in failed[:50]]
        lines += [f"* and {len(failed) - 50} more"] if len(failed) > 50 else []
        parts.append("\n".join(["## Failed and diverged", "", *lines]))
    parts.append(f"`{status.root}`   report: `python -m reports build {study.name}`")
    return "\n\n".join(part for part in parts if part)


def _finding(status: StudyStatus) -> str:
    """One sentence per objective: which variant is best so far, and by how much against the baseline on the same seeds."""
    sentences = []
    for metric, direction in status.objectives:
        best = status.best(metric, direction)
        if best is None or best.mean is None:
            continue
        word = "Highest" if direction == "maximize" else "Lowest"
        text = f"{word} {metric}: **{best.name}** with {plus_minus(best.mean, best.standard_error)} ({best.finished} seeds)"
        mean, error, pairs = paired_difference(status, best, metric)
        if mean is not None and not best.baseline:
            text += f", {mean:+.4g}{'' if error is None else f' ± {error:.2g}'} against the baseline on {pairs} common seeds"
        sentences.append(text + ".")
    return " ".join(sentences)


def paired_difference(status: StudyStatus, variant: Variant, metric: str) -> tuple[float | None, float | None, int]:
    """Mean over common seeds of variant minus baseline, its standard error, and how many seeds there were."""
    base = {r.seed: r.values[metric] for r in status.runs if r.baseline and r.counts and r.state == schema.FINISHED and metric in r.values}
    mine = {r.seed: r.values[metric] for r in variant.runs if r.state == schema.FINISHED and metric in r.values}
    common = sorted(base.keys() & mine.keys())
    mean, error = mean_and_error(mine[seed] - base[seed] for seed in common)
    return mean, error, len(common)


def _note_table(status: StudyStatus, metric: str) -> str:
    """Mean and standard error of every variant, baseline first, then best first."""
    direction = dict(status.objectives)[metric]
    sign = -1.0 if direction == "maximize" else 1.0
    rows = []
    for variant in status.variants:
        mean, error = mean_and_error(r.values[metric] for r in variant.runs if r.state == schema.FINISHED and metric in r.values)
        if mean is None:
            continue
        difference, spread, pairs = paired_difference(status, variant, metric)
        delta = "" if difference is None or variant.baseline else f"{difference:+.4g}{'' if spread is None else f' ± {spread:.2g}'} ({pairs})"
        row = f"| {variant.trial} | {variant.name} | {plus_minus(mean, error)} | {delta} | {variant.finished} |"
        rows.append((not variant.baseline, sign * mean, row))
    rows.sort(key=lambda row: row[:2])
    more = [f"and {len(rows) - NOTE_VARIANTS} more variants"] if len(rows) > NOTE_VARIANTS else []
    head = [f"| trial | variant | {metric}, mean ± standard error | minus baseline (common seeds) | seeds |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row for _, _, row in rows[:NOTE_VARIANTS]), *([""] if more else []), *more]) if rows else ""


def _head(about: Mapping[str, Any]) -> str:
    return f"**{about['variant']}**, seed {about['seed']}, trial {about['trial']}"


def _last_line(run: RunStatus) -> str:
    lines = (run.reason or "").strip().splitlines()
    return lines[-1][:300] if lines else "no reason was recorded"


def _names(paths: Iterable[str]) -> dict[str, str]:
    """Short names of searched settings; two that would share one keep their whole paths."""
    found = {path: short_name(path) for path in paths}
    taken = list(found.values())
    return {path: path if taken.count(name) > 1 else name for path, name in found.items()}


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _part(about: Any, part: str) -> Any:
    """A domain's sizes in one side of the split, where the manifest tells the sides apart."""
    if not isinstance(about, Mapping):
        return about
    own = {key.removeprefix(f"{part}_"): value for key, value in about.items() if key.startswith(part)}
    return own or dict(about)


def _admit(names: Iterable[str], known: set[str], limit: int) -> None:
    for name in names:
        if name not in known and len(known) < limit:
            known.add(name)
