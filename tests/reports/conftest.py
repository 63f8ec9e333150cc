"""A store as `sweeps.schema` says, with planted effects."""

import json

import numpy as np
import pytest
import yaml

from research.config import to_dict
from research.configfile import load_run_config
from research.routing_trace import RoutingTrace
from sims import AllToAll, reroute, simulate, synthetic_trace
from sweeps import schema

BASELINE = {"model.attention.kv_lora_rank": 64, "model.moe.device_limit": 3}
VARIANTS = {
    "baseline": BASELINE,
    "kv_lora_rank=16": {**BASELINE, "model.attention.kv_lora_rank": 16},
    "device_limit=2": {**BASELINE, "model.moe.device_limit": 2},
    "device_limit=8": {**BASELINE, "model.moe.device_limit": 8},
}


@pytest.fixture(scope="session")
def write_store():
    """write_store(root, effects={variant: bits per byte}, noise=..., seeds=..., states={(variant, seed): state})."""

    def write(root, effects=None, *, noise=0.001, seeds=(0, 1, 2), states=None, state="finished", spread=None):
        study = {
            "name": "planted", "question": "Does it matter?", "base": {}, "baseline": BASELINE,
            "space": {"model.attention.kv_lora_rank": [16, 64], "model.moe.device_limit": [2, 3, 8]},
            "search": {"sampler": "one-factor"}, "objectives": [{"metric": schema.BITS_PER_BYTE, "direction": "minimize"}],
            "seeds": list(seeds), "budget": {"matched": "tokens"}, "resources": {},
            "cluster": {"file": "h800", "nodes": 2, "gpus_per_node": 4, "tokens_per_device": 64, "hidden_size": 512, "dispatch_bits": 16, "combine_bits": 16},
        }  # fmt: skip
        root.mkdir(parents=True)
        (root / schema.STUDY_FILE).write_text(yaml.safe_dump(study))
        random = np.random.default_rng(5)
        for trial, (variant, cell) in enumerate(VARIANTS.items()):
            for seed in seeds:
                ended = (states or {}).get((variant, seed), schema.FINISHED)
                loss = 2.0 + 0.05 * seed + (effects or {}).get(variant, 0.0) + random.normal(0, (spread or {}).get(variant, noise))
                _write_run(root / schema.RUNS_DIRECTORY / f"{trial:03d}-{seed}", trial, variant, cell, seed, ended, loss)
        about = {
            "schema": 1,
            "study": "planted",
            "state": state,
            "planned": len(VARIANTS) * len(seeds),
            "runs": {},
            "commit": "abc",
            "versions": {"torch": "1"},
        }
        (root / schema.STATE_FILE).write_text(json.dumps(about))
        sizes = {"train_bytes": 9000, "train_tokens": 4000, "heldout_bytes": 900, "heldout_tokens": 400}
        data = {"schema": 1, "data_id": "d1", "corpus": "quickstart", "vocab_size": 264, "domains": {"en": sizes},
                "identity": {"archives": {"tinytext": "0123456789abcdef"}}, "split": "by hash"}  # fmt: skip
        (root / schema.DATA_FILE).write_text(json.dumps(data))
        return root

    return write


def _write_run(folder, trial, variant, cell, seed, state, loss):
    folder.mkdir(parents=True)
    overrides = [f"{path}={value}" for path, value in cell.items()]
    config = load_run_config({"model": "deepseek-v2-nano", "training": {"train_tokens": 1000}, "seed": seed}, overrides=overrides)
    about = {"schema": 1, "run": folder.name, "study": "planted", "trial": trial, "variant": variant, "seed": seed, "baseline": variant == "baseline",
             "parameters": cell, "config_id": f"id{trial}{seed}", "commit": "abc"}  # fmt: skip
    (folder / schema.RUN_FILE).write_text(json.dumps(about))
    (folder / schema.CONFIG_FILE).write_text(json.dumps(to_dict(config)))
    if state == "running":
        return
    limit = cell["model.moe.device_limit"]
    metrics = {schema.BITS_PER_BYTE: loss, f"{schema.BITS_PER_BYTE}/en": loss, schema.NGRAM_BITS_PER_BYTE: 2.5, schema.DISTINCT_DEVICES: float(min(limit, 4)),
               schema.KV_BYTES_PER_TOKEN: 2.0 * cell["model.attention.kv_lora_rank"], schema.ALL_TO_ALL_SECONDS: 1e-4 * min(limit, 4)}  # fmt: skip
    failed = state == schema.FAILED
    summary = {"schema": 1, "state": state, "reason": "Traceback\nValueError: planted" if failed else None, "steps": 10, "tokens": 1000, "seconds": 1.0,
               "attempts": 1, "metrics": {} if failed else metrics, "versions": {}, "device": "a CPU"}  # fmt: skip
    (folder / schema.SUMMARY_FILE).write_text(json.dumps(summary))
    records = [{"step": s, "tokens": 100 * s, schema.LOSS: 5 - 0.2 * s, **({schema.BITS_PER_BYTE: loss} if s == 10 else {})} for s in range(1, 11)]
    (folder / schema.METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    if failed:
        return
    trace: RoutingTrace = synthetic_trace(
        "gaussian", tokens=128, n_routed_experts=32, num_experts_per_tok=4, expert_devices=8, device_limit=limit, seed=seed
    )
    trace.save(folder / schema.ROUTING_FILE)
    spec = AllToAll(nodes=2, gpus_per_node=4, tokens_per_device=64, hidden_size=512, n_routed_experts=32, num_experts_per_tok=4)
    by_limit = {"unrestricted" if m is None else str(m): simulate(spec, reroute(trace, m)).record() for m in (2, 3, 8, None)}
    (folder / schema.SIMULATION_FILE).write_text(json.dumps({"result": simulate(spec, trace).record(), "by_device_limit": by_limit}))
