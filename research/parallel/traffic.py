"""The bytes that moved: counted where they are handed to a collective, per source, destination, layer and step."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from research.atomic import room_for
from research.errors import DataError

DISPATCH, COMBINE = "dispatch", "combine"
DISPATCH_BACKWARD, COMBINE_BACKWARD = "dispatch backward", "combine backward"
"""The way back of each: gradients of what was dispatched go where combine went, those of what was combined where dispatch went."""
PAYLOAD = (DISPATCH, COMBINE, DISPATCH_BACKWARD, COMBINE_BACKWARD)
METADATA = "metadata"
"""Counts, chosen experts and gates, which travel beside the tokens."""
METADATA_BACKWARD = "metadata backward"
EVALUATION = " (evaluation)"
"""Ends the name of what is sent in a pass that nothing is learned from: validation and routing snapshots."""


BYTES = "parallel/bytes_per_step"
RECEIVED_VIOLATION = "parallel/received_violation"
SECONDS = "parallel/seconds_per_step"


@dataclass(slots=True)
class Ledger:
    """Bytes that this worker sent to each of the `workers` of its replica, own ones included, by (step, layer, phase)."""

    workers: int = 1
    sent: dict[tuple[int, int, str], np.ndarray] = field(default_factory=dict)
    witness: bool = False
    """Also keep who was routed where, so that the bytes can be predicted from it."""
    routed: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=dict)
    """By (step, layer), for each pass int16 (tokens, K): the experts of this worker's tokens, -1 where dropped."""

    def add(self, step: int, layer: int, phase: str, counts: Sequence[int]) -> None:
        """`counts` bytes to each worker."""
        row = np.asarray(counts, np.int64)
        before = self.sent.get((step, layer, phase))
        self.sent[step, layer, phase] = row if before is None else before + row

    def route(self, step: int, layer: int, expert_ids: np.ndarray) -> None:
        self.routed.setdefault((step, layer), []).append(expert_ids.astype(np.int16))

    def take(self) -> dict[tuple[int, int, str], np.ndarray]:
        """What has been counted since the last time."""
        taken, self.sent = self.sent, {}
        return taken


def traffic_metrics(ledgers: Sequence[Mapping[tuple[int, int, str], np.ndarray]]) -> dict[str, float]:
    """Of the ledgers of all ranks, per training step: payload bytes that left their worker, and how much more of the dispatched tokens
    the fullest worker of a replica receives than the average one, (largest - mean) / mean, mean over layers; own tokens count there."""
    keys = {key for ledger in ledgers for key in ledger if key[2] in PAYLOAD}
    if not keys:
        return {}
    left, violations = 0, []
    for key in keys:
        matrix = np.stack([ledger[key] for ledger in ledgers])
        replicas = matrix.reshape(-1, matrix.shape[1], matrix.shape[1])
        left += int(matrix.sum() - replicas.diagonal(axis1=1, axis2=2).sum())
        if key[2] == DISPATCH:
            received = replicas.sum(1)
            violations.append(float((received.max(1) / received.mean(1).clip(1e-9) - 1).mean()))
    return {BYTES: left / len({step for step, _, _ in keys}), RECEIVED_VIOLATION: float(np.mean(violations))}


class TrafficFile:
    """traffic.jsonl: a line per step, layer and phase with the bytes of every worker to every worker of its replica.

    A resumed run repeats steps that stand there already; the last line of a step counts, and they are equal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, rows: Iterable[dict[tuple[int, int, str], np.ndarray]]) -> None:
        """One ledger per rank, in the order of the ranks."""
        joined: dict[tuple[int, int, str], list[list[int]]] = defaultdict(list)
        for ledger in rows:
            for key, row in ledger.items():
                joined[key].append(row.tolist())
        lines = [json.dumps({"step": s, "layer": layer, "phase": phase, "bytes": matrix}) for (s, layer, phase), matrix in sorted(joined.items())]
        with room_for(self.path, "the bytes that moved"), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def read_traffic(path: Path) -> dict[tuple[int, int, str], np.ndarray]:
    """int64 (ranks, P) by (step, layer, phase).  DataError for a line that is none; a last one cut short by a crash is left out."""
    found = {}
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
            found[int(row["step"]), int(row["layer"]), str(row["phase"])] = np.array(row["bytes"], np.int64)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: is not a line of traffic ({error})") from error
    return found
