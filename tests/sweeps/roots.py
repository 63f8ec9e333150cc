"""Roots of studies as a driver leaves them, written by hand: for what only reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sweeps import schema

METRIC = schema.BITS_PER_BYTE
TRAIN_TOKENS = 1000


def write_root(root: Path, runs: Mapping[str, Mapping[str, Any]], *, state: str = "finished", planned: int | None = None, **more: Any) -> Path:
    """`runs` maps "TRIAL-SEED" to what is special of it: state, value, seconds, tokens (of a run that goes on), failure, reason, parameters."""
    root.mkdir(parents=True, exist_ok=True)
    seeds = sorted({int(run.partition("-")[2]) for run in runs})
    objectives = more.pop("objectives", [{"metric": METRIC, "direction": "minimize"}])
    study = {"name": root.name, "question": "Does it matter?", "seeds": seeds, "objectives": objectives}
    (root / schema.STUDY_FILE).write_text(yaml.safe_dump(study))
    shown = {run: {"state": about["state"], "reason": about.get("reason")} for run, about in runs.items()}
    about = {"schema": 1, "study": root.name, "state": state, "planned": len(runs) if planned is None else planned, "runs": shown, **more}
    (root / schema.STATE_FILE).write_text(json.dumps(about))
    for run, special in runs.items():
        _write_run(root / schema.RUNS_DIRECTORY / run, run, special)
    return root


def _write_run(folder: Path, run: str, special: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trial, seed = map(int, run.split("-"))
    parameters = special.get("parameters", {"model.moe.device_limit": 3 if trial == 0 else trial})
    about = {
        "schema": 1,
        "run": run,
        "study": folder.parent.parent.name,
        "trial": trial,
        "variant": "baseline" if trial == 0 else f"device_limit={trial}",
    }
    about |= {"seed": seed, "baseline": trial == 0, "parameters": parameters, "config_id": f"c{trial}", "commit": "abc"}
    (folder / schema.RUN_FILE).write_text(json.dumps(about))
    (folder / schema.CONFIG_FILE).write_text(json.dumps({"training": {"train_tokens": TRAIN_TOKENS}}))
    state, tokens = special["state"], special.get("tokens", TRAIN_TOKENS)
    if state == "waiting":
        return
    attempt = {"attempt": 1, "state": state, "failure": special.get("failure"), "text": None, "forgiven": False, "charged": False}
    attempts = [{**attempt, "attempt": number + 1} for number in range(special.get("attempts", 1))]
    (folder / schema.ATTEMPTS_FILE).write_text(json.dumps(attempts))
    steps = range(1, tokens // 100 + 1)
    lines = [{"step": s, "tokens": 100 * s, schema.LOSS: 3.0 / s, schema.TOKENS_PER_SECOND: special.get("rate", 100.0)} for s in steps]
    (folder / schema.METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state == "running":
        return
    metrics = special.get("metrics", {METRIC: special["value"]} if "value" in special else {})
    summary = {"schema": 1, "state": state, "reason": special.get("reason"), "steps": len(steps), "tokens": tokens, "failure": special.get("failure")}
    summary |= {"seconds": special.get("seconds", 10.0), "attempts": special.get("attempts", 1), "metrics": metrics, "versions": {}, "device": "cpu"}
    (folder / schema.SUMMARY_FILE).write_text(json.dumps(summary))
