"""The yardstick: an interpolated Kneser-Ney model of the same training tokens.

Order n conditions on n tokens of context.  A language model that has learned nothing beyond local
statistics does not get below order 2.
"""

import math
from dataclasses import dataclass

import numpy as np

from research.config import RunConfig
from research.data.batches import batch, heldout_batches
from research.data.prepare import PreparedData

LARGEST_TOKENS = 50_000_000
"""Of training text that is counted in memory (about 100 bytes per token)."""


@dataclass(frozen=True, slots=True)
class _Level:
    """Counts of one order: sorted codes (context * V + token) with their counts, and sums per context."""

    codes: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    discount: float


class KneserNey:
    """P(token | two tokens before), interpolated down to uniform.

    The highest order uses counts, the lower ones the number of distinct left neighbours (Chen and
    Goodman 1999, interpolated Kneser-Ney); discounts are n1 / (n1 + 2 n2) of each order.
    """

    def __init__(self, train_ids: np.ndarray, vocab_size: int, order: int = 2) -> None:
        """train_ids int64 (sequences, tokens): n-grams do not cross rows."""
        ids = np.atleast_2d(train_ids).astype(np.int64)
        self.vocab_size, self.order = vocab_size, order
        self.levels: list[_Level] = []
        codes, counts = np.unique(_codes(ids, vocab_size, order), return_counts=True)
        for level in range(order, -1, -1):
            self.levels.insert(0, _level(codes, counts, vocab_size))
            # Each distinct n-gram votes once for the shorter one at its end.
            codes, counts = np.unique(codes % vocab_size**level, return_counts=True)

    def probability(self, grams: np.ndarray) -> np.ndarray:
        """float64 (N,): P(last token | tokens before it) of grams int64 (N, <= order + 1)."""
        grams = np.asarray(grams, np.int64)
        result = np.full(len(grams), 1.0 / self.vocab_size)
        for level in range(min(grams.shape[1] - 1, self.order) + 1):
            result = self._interpolate(self.levels[level], grams[:, grams.shape[1] - 1 - level :], result)
        return result

    def _interpolate(self, level: _Level, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        code = _codes(grams, self.vocab_size, grams.shape[1] - 1)
        count = _look_up(level.codes, level.counts, code)
        total = _look_up(level.contexts, level.totals, code // self.vocab_size)
        kinds = _look_up(level.contexts, level.kinds, code // self.vocab_size)
        known = total > 0
        safe = np.where(known, total, 1)
        return np.where(known, np.maximum(count - level.discount, 0) / safe + level.discount * kinds / safe * lower, lower)


def bits(model: KneserNey, heldout_ids: np.ndarray) -> float:
    """Code length in bits of all tokens but the first of each row of heldout_ids (sequences, tokens)."""
    ids = np.atleast_2d(heldout_ids)
    total = 0.0
    for position in range(1, min(model.order, ids.shape[1] - 1)):
        total -= float(np.log2(model.probability(ids[:, : position + 1])).sum())
    windows = np.lib.stride_tricks.sliding_window_view(ids, min(model.order + 1, ids.shape[1]), axis=1)
    return total - float(np.log2(model.probability(windows.reshape(-1, windows.shape[-1]))).sum())


def bits_per_byte(model: KneserNey, heldout_ids: np.ndarray, token_bytes: np.ndarray) -> float:
    """Bits over the bytes that the predicted tokens spell."""
    size = int(np.asarray(token_bytes)[np.atleast_2d(heldout_ids)[:, 1:]].sum())
    return bits(model, heldout_ids) / size if size else math.nan


def reference_bits_per_byte(data: PreparedData, config: RunConfig, steps: int) -> float:
    """The order-2 model of exactly the batches that a run of `config` saw in `steps` steps, on its held-out windows, all domains by bytes.

    ValueError if that is more than LARGEST_TOKENS tokens.
    """
    training, schedule = config.training, config.schedule
    if (tokens := schedule.tokens(steps)) > LARGEST_TOKENS:
        raise ValueError(f"the order-2 reference counts at most {LARGEST_TOKENS:,} training tokens in memory, the run saw {tokens:,}")
    seen = (batch(data, config.data, seed=config.seed, step=step, batch_size=schedule.batch_size(step)) for step in range(1, steps + 1))
    model = KneserNey(np.concatenate(list(seen)), data.vocab_size)
    token_bytes, total, size = np.asarray(data.token_bytes()), 0.0, 0
    for domain in data.domains:
        for window in heldout_batches(data, config.data, domain=domain, max_tokens=training.validation_tokens):
            total += bits(model, window)
            size += int(token_bytes[window[:, 1:]].sum())
    return total / size


def _codes(ids: np.ndarray, vocab_size: int, order: int) -> np.ndarray:
    """int64: every run of order + 1 tokens as one number in base V."""
    length = ids.shape[1] - order
    code = np.zeros((ids.shape[0], max(length, 0)), np.int64)
    for offset in range(order + 1):
        code = code * vocab_size + ids[:, offset : offset + max(length, 0)]
    return code.ravel()


def _level(codes: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Level:
    contexts, first = np.unique(codes // vocab_size, return_index=True)
    totals = np.add.reduceat(counts, first) if len(first) else counts
    kinds = np.diff(np.append(first, len(codes)))
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return _Level(codes, counts, contexts, totals, kinds, once / (once + 2 * twice) if once else 0.5)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] == wanted, else 0."""
    if not len(keys):
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
