"""The bytes that the processes of a real expert-parallel run counted, beside those that its routing predicts.

A run directory of `research train --workers D --witness` holds both: traffic.jsonl, what every worker handed to its collectives, and
routed/, who was routed where.  The prediction is `traffic.traffic_of`, the same function that every simulated all-to-all asks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from research.errors import DataError
from research.parallel.traffic import COMBINE, COMBINE_BACKWARD, DISPATCH, DISPATCH_BACKWARD, PAYLOAD, read_routed, read_traffic
from sims.placement import Placement
from sims.traffic import Traffic, traffic_of

ITEM_BYTES = {"float32": 4, "bfloat16": 4, "float64": 8, "auto": 4}
"""Of a token's element on the way: under autocast, too, what stands between the products is float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Of one phase over all layers and steps: bytes counted and predicted, and entries (source, destination, layer, step) that differ."""

    name: str
    measured: int
    predicted: int
    entries: int
    different: int
    measured_matrix: np.ndarray
    """int64 (P, P), summed over replicas, layers and steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRun:
    workers: int
    replicas: int
    device_limit: int | None
    steps: int
    left_out: int
    """Steps that were taken by another number of workers than the last one, or whose counts are not whole."""
    layers: int
    bytes_per_token: int
    phases: list[Phase]

    @property
    def agrees(self) -> bool:
        return not any(phase.different for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        phases = [
            {"phase": p.name, "measured": p.measured, "predicted": p.predicted, "entries": p.entries, "different": p.different} for p in self.phases
        ]
        plain = {
            name: getattr(self, name) for name in ("workers", "replicas", "device_limit", "steps", "left_out", "layers", "bytes_per_token", "agrees")
        }
        return {**plain, "phases": phases}


def predicted_traffic(expert_ids: np.ndarray, workers: int, n_routed_experts: int, bytes_per_token: int) -> Traffic:
    """Dispatch of the tokens of P workers on one node, int (P, tokens, K), -1 where an expert was dropped: each has E / P experts."""
    per_worker, tokens = n_routed_experts // workers, expert_ids.shape[1]
    kept = expert_ids >= 0
    worker = np.where(kept, expert_ids // per_worker, 0)
    needed = np.zeros((workers, tokens, workers), bool)
    for choice in range(expert_ids.shape[2]):
        np.put_along_axis(needed, worker[:, :, choice, None], kept[:, :, choice, None] | np.take_along_axis(needed, worker[:, :, choice, None], 2), 2)
    index = np.arange(workers)
    where = Placement(np.zeros(workers, np.int64), index, np.arange(n_routed_experts) // per_worker)
    return traffic_of(np.repeat(np.eye(workers), tokens, axis=1), needed.reshape(-1, workers), where, bytes_per_token)


def read_run(directory: Path) -> MeasuredRun:
    """Compare every step, layer, source and destination.  DataError for a directory that lacks one of its files, or where one is damaged.

    A run may have gone on with another number of workers: compared are the steps of the last one.
    """
    for name in ("config.json", "traffic.jsonl", "routed"):
        if not (directory / name).exists():
            raise DataError(f"{directory / name}: is missing; a run of `python -m research train --workers D --witness` has it")
    counted, routed = read_traffic(directory / "traffic.jsonl"), read_routed(directory / "routed")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        moe, training = config["model"]["moe"], config["training"]
        experts, limit = int(moe["n_routed_experts"]), moe["device_limit"]
        width = config["model"]["hidden_size"] * ITEM_BYTES[training["precision"]]
        # Activation checkpointing sends a block's tokens again when it is computed again; routed/ holds them twice, too.
        again = 2 if training["activation_checkpointing"] == "blocks" else 1
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory / 'config.json'}: is not the configuration of a run with experts ({type(error).__name__}: {error})") from error
    whole = [key for key in routed if all((*key, name) in counted for name in PAYLOAD) and len(routed[key]) == len(counted[*key, DISPATCH])]
    if not whole:
        raise DataError(f"{directory}: traffic.jsonl and routed/ have no step in common")
    ranks, workers = counted[*max(whole), DISPATCH].shape
    keys = sorted(key for key in whole if counted[*key, DISPATCH].shape == (ranks, workers))
    ways = {DISPATCH: (False, 1), COMBINE: (True, 1), DISPATCH_BACKWARD: (True, again), COMBINE_BACKWARD: (False, again)}
    sums = {name: [0, 0, 0, 0] for name in PAYLOAD}
    matrices = {name: np.zeros((workers, workers), np.int64) for name in PAYLOAD}
    for step, layer in keys:
        for replica in range(ranks // workers):
            rows = slice(replica * workers, (replica + 1) * workers)
            ids = routed[step, layer][rows]
            there = predicted_traffic(ids, workers, experts, width).logical
            for name, (turned, part) in ways.items():
                wanted, found = (there.T if turned else there) // part, counted[step, layer, name][rows]
                sums[name] = [a + b for a, b in zip(sums[name], (found.sum(), wanted.sum(), found.size, (found != wanted).sum()), strict=True)]
                matrices[name] += found
    phases = []
    for name in PAYLOAD:
        measured, predicted, entries, different = map(int, sums[name])
        matrix = matrices[name]
        phases.append(Phase(name=name, measured=measured, predicted=predicted, entries=entries, different=different, measured_matrix=matrix))
    steps, layers = {step for step, _ in keys}, len({layer for _, layer in keys})
    return MeasuredRun(
        workers=workers,
        replicas=ranks // workers,
        device_limit=limit,
        steps=len(steps),
        left_out=len({step for step, _ in routed} - steps),
        layers=layers,
        bytes_per_token=width,
        phases=phases,
    )
