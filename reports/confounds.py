"""What was held equal between the variants, what was not, and settings that differ although nobody asked for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.store import Run, StudyRecord
from sweeps import schema
from sweeps.variants import sets

EQUAL = 0.02
"""Relative difference within which a quantity counts as held equal."""
NAMED = "set by the named variants"
"""Why a setting differs that a study's `variants` lay over its base."""
QUANTITIES = {
    "tokens": "training tokens",
    "training_flops": "training FLOPs",
    "activated_parameters": "activated parameters",
    "total_parameters": "parameters",
    "kv_bytes": "KV cache",
    "communication_seconds": "simulated all-to-all time",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A setting outside the searched ones; `why` says what explains it, or is empty."""

    path: str
    variant: str
    ours: Any
    theirs: Any
    why: str


def differences(record: StudyRecord) -> list[Difference]:
    """Each variant's resolved configuration against the baseline's of the same seed, without what was searched and the seed."""
    reference = {run.seed: run for run in record.baseline if run.config}
    if not reference:
        return []
    found: dict[tuple[str, str], Difference] = {}
    for run in record.runs:
        if run.baseline or not run.config:
            continue
        base = reference.get(run.seed, next(iter(reference.values())))
        ours, theirs = leaves(run.config), leaves(base.config)
        for path in sorted({*ours, *theirs} - set(run.parameters) - set(record.study["space"]) - {"seed"}):
            if ours.get(path) != theirs.get(path):
                why = _reason(record, run, base, path)
                found.setdefault(
                    (run.variant, path), Difference(path=path, variant=run.variant, ours=ours.get(path), theirs=theirs.get(path), why=why)
                )
    return list(found.values())


def _reason(record: StudyRecord, run: Run, base: Run, path: str) -> str:
    matched = record.study.get("budget") or {}
    if path == matched.get("adjust") or path in _texts(run.matched) or path in _texts(base.matched):
        return "turned to match the budget"
    if sets(record.study.get("variants") or {}, path):
        return NAMED
    if path == "training.optimizer.learning_rate" and (run.retuned or record.study.get("retune")):
        return "tuned anew for each variant"
    return ""


def _texts(value: Any) -> set[str]:
    """Every string in a nested value, keys too."""
    if isinstance(value, Mapping):
        return {text for key, item in value.items() for text in ({str(key)} | _texts(item))}
    if isinstance(value, list | tuple):
        return {text for item in value for text in _texts(item)}
    return {value} if isinstance(value, str) else set()


def leaves(value: object, prefix: str = "") -> dict[str, Any]:
    """Dotted path of every leaf; a section that is absent (no experts) is a leaf of its own, None."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {path: leaf for key, item in value.items() for path, leaf in leaves(item, f"{prefix}.{key}".lstrip(".")).items()}


def quantities(runs: Sequence[Run]) -> dict[str, float]:
    """Means over the finished runs of what a budget can be counted in."""
    done = [run for run in runs if run.finished]
    found: dict[str, list[float]] = {}
    for run in done:
        tokens = run.summary.get("tokens")
        flops = run.value(schema.TRAIN_FLOPS_PER_TOKEN)
        values = {
            "tokens": tokens,
            "training_flops": flops * tokens if flops is not None and tokens else None,
            "activated_parameters": run.value(schema.ACTIVATED_PARAMETERS),
            "total_parameters": run.value(schema.TOTAL_PARAMETERS),
            "kv_bytes": run.value(schema.KV_BYTES_PER_TOKEN),
            "communication_seconds": run.value(schema.ALL_TO_ALL_SECONDS),
        }
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def provenance_differences(record: StudyRecord) -> list[str]:
    """Sentences on runs that were not made alike: commits, versions, devices, seeds."""
    found = []
    commits = sorted({run.commit for run in record.runs})
    if len(commits) > 1:
        found.append(f"runs were made by {len(commits)} commits: {', '.join(commits)}")
    versions: dict[str, set[str]] = {}
    for run in record.runs:
        for name, version in (run.summary.get("versions") or {}).items():
            versions.setdefault(name, set()).add(str(version))
    found += [f"runs were made with {len(v)} versions of {name}: {', '.join(sorted(v))}" for name, v in sorted(versions.items()) if len(v) > 1]
    devices = sorted({str(run.summary["device"]) for run in record.runs if run.summary.get("device")})
    if len(devices) > 1:
        found.append(f"runs were trained on different devices: {', '.join(devices)}")
    return found
