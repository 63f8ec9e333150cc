"""The bytes that moved: counted where they are handed to a collective, per source, destination, layer and step."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from research.atomic import atomic_write, room_for
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

    def take_routed(self) -> dict[tuple[int, int], list[np.ndarray]]:
        """Of `routed`, what has come since the last time."""
        taken, self.routed = self.routed, {}
        return taken

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
        _remove_cut_line(self.path)
        with room_for(self.path, "the bytes that moved"), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def _remove_cut_line(path: Path) -> None:
    """A last line that a crash cut short would spoil the one behind it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def write_routed(folder: Path, rows: Sequence[Mapping[tuple[int, int], list[np.ndarray]]]) -> None:
    """`folder`/step-N.npz for each step: `layer_L`, int16 (ranks, tokens, K), the experts of the tokens of each rank, -1 where dropped.

    `rows` is what each rank kept, in the order of the ranks; the passes of a step stand one after the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for step in sorted({step for step, _ in rows[0]}):
        layers = {f"layer_{layer}": np.stack([np.concatenate(row[s, layer]) for row in rows]) for s, layer in rows[0] if s == step}
        path = folder / f"step-{step:06d}.npz"
        with room_for(path, "who was routed where"), atomic_write(path) as file:
            np.savez_compressed(file, **layers)  # type: ignore[arg-type]


def read_routed(folder: Path) -> dict[tuple[int, int], np.ndarray]:
    """int16 (ranks, tokens, K) by (step, layer).  DataError if there is nothing or something else."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for path in sorted(folder.glob("step-*.npz")):
        try:
            with np.load(path, allow_pickle=False) as data:
                found |= {(int(path.stem.removeprefix("step-")), int(name.removeprefix("layer_"))): data[name] for name in data.files}
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: is not a record of who was routed where ({error})") from error
    if not found:
        raise DataError(f"{folder}: holds no step-N.npz; train with --workers and --witness")
    return found


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
