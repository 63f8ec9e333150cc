"""What a run reports while it goes, and the plain file that keeps it.

The names are those of `sweeps/schema.py`; a test holds the two equal, since research may not import sweeps.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from research.atomic import room_for
from research.parallel import traffic

LOSS = "train/loss"
BALANCE_EXPERT = "train/balance_expert"
BALANCE_DEVICE = "train/balance_device"
BALANCE_COMMUNICATION = "train/balance_communication"
GRADIENT_NORM = "train/gradient_norm"
LEARNING_RATE = "train/learning_rate"
TOKENS_PER_SECOND = "train/tokens_per_second"
DISTINCT_DEVICES = "routing/distinct_devices_per_token"
EXPERT_VIOLATION = "routing/expert_violation"
DEVICE_VIOLATION = "routing/device_violation"
DROPPED_SHARE = "routing/dropped_share"
DEAD_EXPERTS = "routing/dead_experts"
BITS_PER_BYTE = "validation/bits_per_byte"
CACHE_BITS_PER_BYTE = "cache/bits_per_byte_at_{}_bits"
CACHE_BYTES_PER_TOKEN = "cache/bytes_per_token_at_{}_bits"
KV_BYTES_PER_TOKEN = "model/kv_cache_bytes_per_token"
TOTAL_PARAMETERS = "model/total_parameters"
ACTIVATED_PARAMETERS = "model/activated_parameters"
TRAIN_FLOPS_PER_TOKEN = "model/train_flops_per_token"
NGRAM_BITS_PER_BYTE = "reference/order2_bits_per_byte"
PARALLEL_BYTES = traffic.BYTES
PARALLEL_SECONDS = traffic.SECONDS
RECEIVED_VIOLATION = traffic.RECEIVED_VIOLATION


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Metrics by name after optimizer step `step`, when `tokens` training tokens had been seen."""

    step: int
    tokens: int
    metrics: Mapping[str, float]


class Meter:
    """Seconds of a run over all its parts, and tokens per second of training alone: what is done in `paused` is left out."""

    def __init__(self, seconds: float, tokens: int) -> None:
        now = time.perf_counter()
        self._began, self._window_began, self._window_tokens = now - seconds, now, tokens
        self._stopped_at: float | None = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._stopped_at = stopped_at = time.perf_counter()
        yield
        self._window_began += time.perf_counter() - stopped_at
        self._stopped_at = None

    def tokens_per_second(self, tokens: int) -> float:
        """Since the last question, of a run that has seen `tokens` tokens; to be asked in a pause."""
        assert self._stopped_at is not None
        seconds, seen = self._stopped_at - self._window_began, tokens - self._window_tokens
        self._window_began, self._window_tokens = self._stopped_at, tokens
        return seen / max(seconds, 1e-9)


class Recorder(Protocol):
    """The first of the loop's two seams; the other is `should_stop(record) -> bool`."""

    def record(self, record: Record) -> None: ...


class NoRecorder:
    """Of a worker that is not the first: what it would write is written there."""

    def record(self, record: Record) -> None:
        pass


class JsonlRecorder:
    """One JSON object per record, appended and flushed to the disk, so that none is missing before a checkpoint that stands.

    A resumed run goes back to its checkpoint and repeats, to the bit, steps that are in the file
    already; those are skipped, so that each step stands there once.  A line cut short by a crash is
    removed first.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step = 0
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                os.truncate(self.path, len(whole.encode()))
            if whole:
                self.last_step = int(json.loads(whole.splitlines()[-1])["step"])

    def record(self, record: Record) -> None:
        if record.step <= self.last_step:
            return
        line = json.dumps({"step": record.step, "tokens": record.tokens, **record.metrics})
        with room_for(self.path, f"the record of step {record.step}"), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.last_step = record.step
