"""Studies with planted truth: a store as `sweeps.schema` says, written without training, and records of it in memory."""

import json
from functools import lru_cache

import numpy as np
import yaml

from reports.store import Run, StudyRecord
from research.config import to_dict
from research.configfile import load_run_config
from research.routing_trace import RoutingTrace
from sims import AllToAll, reroute, simulate, synthetic_trace
from sweeps import schema

LATENT, LIMIT, CHOSEN = "model.attention.kv_lora_rank", "model.moe.device_limit", "model.moe.num_experts_per_tok"
BASELINE = {LATENT: 64, LIMIT: 3}
VARIANTS = {
    "baseline": BASELINE,
    "kv_lora_rank=16": {**BASELINE, LATENT: 16},
    "device_limit=2": {**BASELINE, LIMIT: 2},
    "device_limit=8": {**BASELINE, LIMIT: 8},
}
DOMAINS = ("code", "en")


def losses(variants, seeds, effects=None, *, noise=0.001, spread=None, seed=5):
    """{variant: {seed: bits per byte}}: 2.0, a seed's own 0.05 each, the planted effect, noise (or a variant's own spread)."""
    random = np.random.default_rng(seed)
    return {
        name: {s: 2.0 + 0.05 * s + (effects or {}).get(name, 0.0) + random.normal(0, (spread or {}).get(name, noise)) for s in seeds}
        for name in variants
    }


def write_store(
    root,
    effects=None,
    *,
    noise=0.001,
    seeds=(0, 1, 2),
    states=None,
    state="finished",
    spread=None,
    variants=VARIANTS,
    sampler="one-factor",
    objective=schema.BITS_PER_BYTE,
    records=10,
    name="planted",
    cell_config=(),
    seed=5,
):
    """`states` maps (variant, seed) to how that run ended; `cell_config` holds overrides of every configuration."""
    space = {path: sorted({cell[path] for cell in variants.values()}) for path in next(iter(variants.values()))}
    study = {
        "name": name, "question": "Does it matter?", "base": {}, "baseline": variants["baseline"], "space": space,
        "search": {"sampler": sampler}, "objectives": [{"metric": objective, "direction": "minimize"}],
        "seeds": list(seeds), "budget": {"matched": "tokens"}, "resources": {},
        "cluster": {"file": "h800", "nodes": 2, "gpus_per_node": 4, "tokens_per_device": 64, "hidden_size": 512, "dispatch_bits": 16, "combine_bits": 16},
    }  # fmt: skip
    root.mkdir(parents=True)
    (root / schema.STUDY_FILE).write_text(yaml.safe_dump(study))
    found = losses(variants, seeds, effects, noise=noise, spread=spread, seed=seed)
    for trial, (variant, cell) in enumerate(variants.items()):
        for s in seeds:
            ended = (states or {}).get((variant, s), schema.FINISHED)
            write_run(
                root / schema.RUNS_DIRECTORY / f"{trial:03d}-{s}", trial, variant, cell, s, ended, found[variant][s], records, name, cell_config
            )
    about = {
        "schema": 1, "study": name, "state": state, "planned": len(variants) * len(seeds), "runs": {}, "commit": "abc", "versions": {"torch": "1"},
        "started": "2026-11-24T09:00:00+00:00", "updated": "2026-11-24T10:30:00+00:00",
    }  # fmt: skip
    (root / schema.STATE_FILE).write_text(json.dumps(about))
    sizes = {"train_bytes": 9000, "train_tokens": 4000, "heldout_bytes": 900, "heldout_tokens": 400}
    data = {"schema": 1, "data_id": "d1", "corpus": "quickstart", "vocab_size": 264, "domains": dict.fromkeys(DOMAINS, sizes),
            "identity": {"archives": {"tinytext": "0123456789abcdef"}}, "split": "by hash"}  # fmt: skip
    (root / schema.DATA_FILE).write_text(json.dumps(data))
    return root


def write_run(folder, trial, variant, cell, seed, state, loss, records, study, extra):
    folder.mkdir(parents=True)
    about = {"schema": 1, "run": folder.name, "study": study, "trial": trial, "variant": variant, "seed": seed, "baseline": variant == "baseline",
             "parameters": cell, "config_id": f"id{trial}{seed}", "commit": "abc"}  # fmt: skip
    (folder / schema.RUN_FILE).write_text(json.dumps(about))
    (folder / schema.CONFIG_FILE).write_text(json.dumps({**_config(tuple(cell.items()), tuple(extra)), "seed": seed}))
    if state == "running":
        return
    limit = cell.get(LIMIT, 3)
    failed = state == schema.FAILED
    summary = {"schema": 1, "state": state, "reason": "Traceback\nValueError: planted" if failed else None, "steps": 10, "tokens": 1000, "seconds": 36.0,
               "attempts": 1, "metrics": {} if failed else final_metrics(cell, loss), "versions": {}, "device": "a CPU"}  # fmt: skip
    (folder / schema.SUMMARY_FILE).write_text(json.dumps(summary))
    (folder / schema.METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in curve(loss, records, limit, trial * 100 + seed)))
    if failed:
        return
    trace, simulation = _routed(limit, cell.get(CHOSEN, 4), seed)
    trace.save(folder / schema.ROUTING_FILE)
    (folder / schema.SIMULATION_FILE).write_text(json.dumps(simulation))


def final_metrics(cell, loss):
    limit = cell.get(LIMIT, 3)
    return {schema.BITS_PER_BYTE: loss, **{f"{schema.BITS_PER_BYTE}/{d}": loss + 0.1 * i for i, d in enumerate(DOMAINS)}, schema.NGRAM_BITS_PER_BYTE: 2.5,
            schema.DISTINCT_DEVICES: float(min(limit, 4)), schema.KV_BYTES_PER_TOKEN: 2.0 * cell.get(LATENT, 64), schema.ALL_TO_ALL_SECONDS: 1e-4 * min(limit, 4),
            schema.ACTIVATED_PARAMETERS: 400_000.0, schema.TOTAL_PARAMETERS: 1_000_000.0, schema.TRAIN_FLOPS_PER_TOKEN: 2.4e6,
            schema.EXPERT_VIOLATION: 0.5, schema.DEVICE_VIOLATION: 0.1, schema.DROPPED_SHARE: 0.03, schema.TOKENS_PER_SECOND: 15_000.0}  # fmt: skip


def curve(loss, records, limit, seed):
    """Falls to `loss`, which is reached with the last record; held-out loss at every fifth."""
    noise = np.random.default_rng(seed).normal(0, 0.03, records)
    found = []
    for step in range(1, records + 1):
        level = loss + 2.5 * (np.exp(-4 * step / records) - np.exp(-4))
        record = {
            "step": step,
            "tokens": 100 * step,
            schema.LOSS: float(level / 1.4 + noise[step - 1]),
            schema.DISTINCT_DEVICES: float(min(limit, 4)),
        }
        if step == records or step % 5 == 0:
            record[schema.BITS_PER_BYTE] = float(level)
        found.append(record)
    return found


@lru_cache
def _config(cell, extra):
    overrides = [f"{path}={value}" for path, value in (*cell, *extra)]
    return to_dict(load_run_config({"model": "deepseek-v2-nano", "training": {"train_tokens": 1000}, "seed": 0}, overrides=overrides))


@lru_cache
def _routed(limit, chosen, seed):
    """Three snapshots of two layers that grow more even, and what the cluster model says of the last."""
    flat = []
    for step in range(3):
        for layer in range(2):
            family = ("power-law", "gaussian", "random")[step]
            flat.append(synthetic_trace(family, tokens=96, n_routed_experts=32, num_experts_per_tok=chosen, expert_devices=8, device_limit=limit,
                                        seed=100 * seed + layer))  # fmt: skip
    ids = np.stack([t.expert_ids[0, 0] for t in flat]).reshape(3, 2, 96, chosen)
    trace = RoutingTrace(expert_ids=ids, steps=np.array([0, 5, 10]), layers=np.array([1, 2]), scores=np.stack([t.scores[0] for t in flat[-2:]]),
                         n_routed_experts=32, expert_devices=8, device_limit=limit)  # fmt: skip
    spec = AllToAll(nodes=2, gpus_per_node=4, tokens_per_device=64, hidden_size=512, n_routed_experts=32, num_experts_per_tok=chosen)
    by_limit = {"unrestricted" if m is None else str(m): simulate(spec, reroute(trace, m)).record() for m in (2, 3, 8, None)}
    return trace, {"result": simulate(spec, trace).record(), "by_device_limit": by_limit}


def record(values, *, states=None, metric=schema.BITS_PER_BYTE, direction="minimize", sampler="one-factor"):
    """A StudyRecord in memory of {variant: {seed: value}}; the first variant is the baseline."""
    runs = []
    for trial, (variant, by_seed) in enumerate(values.items()):
        for seed, value in by_seed.items():
            state = (states or {}).get((variant, seed), schema.FINISHED)
            metrics = {metric: value} if value is not None and state == schema.FINISHED else {}
            summary = {"state": state, "metrics": metrics, "tokens": 1000, "seconds": 36.0}
            runs.append(Run(name=f"{trial:03d}-{seed}", variant=variant, seed=seed, trial=trial, baseline=trial == 0, parameters={}, config_id="",
                            commit="abc", config={"seed": seed}, state=state, reason=None, summary=summary, records=(), trace=None, simulation={}))  # fmt: skip
    seeds = sorted({seed for by_seed in values.values() for seed in by_seed})
    study = {"name": "planted", "question": "?", "space": {}, "seeds": seeds, "objectives": [{"metric": metric, "direction": direction}],
             "search": {"sampler": sampler}}  # fmt: skip
    return StudyRecord(study=study, state={"state": "finished"}, data={}, runs=tuple(runs))
