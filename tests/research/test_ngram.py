"""The yardstick against a dictionary that counts one n-gram at a time, and its place beside a run."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.configfile import load_run_config
from research.data.batches import batch
from research.data.prepare import prepare
from research.evaluation import ngram
from research.evaluation.ngram import KneserNey, bits, bits_per_byte, reference_bits_per_byte


class Literal:
    """Interpolated Kneser-Ney from its definition: raw counts at the top, distinct left neighbours below, uniform at the bottom."""

    def __init__(self, rows, vocabulary, order=2):
        self.vocabulary, self.order = vocabulary, order
        grams = Counter(tuple(row[i : i + order + 1]) for row in rows for i in range(len(row) - order))
        self.counts = {order: grams}
        for level in range(order - 1, -1, -1):
            self.counts[level] = Counter(gram[1:] for gram in set(self.counts[level + 1]))

    def probability(self, context, token):
        context = tuple(context[-self.order :])
        p = 1 / self.vocabulary
        for level in range(len(context) + 1):
            counts = self.counts[level]
            once, twice = (sum(c == n for c in counts.values()) for n in (1, 2))
            discount = once / (once + 2 * twice) if once else 0.5
            here = context[len(context) - level :]
            after = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == here}
            if after:
                total = sum(after.values())
                p = max(after.get(token, 0) - discount, 0) / total + discount * len(after) / total * p
        return p


@st.composite
def texts(draw):
    vocabulary = draw(st.integers(2, 6))
    rows, length = draw(st.integers(1, 4)), draw(st.integers(4, 12))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    return vocabulary, random.integers(0, vocabulary, (rows, length))


@settings(max_examples=60, deadline=None)
@given(texts(), st.integers(0, 2))
def test_probabilities_are_those_of_the_definition_and_sum_to_one(case, context):
    vocabulary, rows = case
    fast, slow = KneserNey(rows, vocabulary), Literal(rows.tolist(), vocabulary)
    random = np.random.default_rng(0)
    before = random.integers(0, vocabulary, (5, context))
    for history in before:
        grams = np.array([[*history, token] for token in range(vocabulary)])
        found = fast.probability(grams)
        assert found.sum() == pytest.approx(1)
        np.testing.assert_allclose(found, [slow.probability(tuple(history), token) for token in range(vocabulary)], rtol=1e-12)


def test_bits_are_the_code_length_of_all_tokens_but_the_first():
    rows = np.array([[0, 1, 2, 0, 1, 2, 0, 1], [2, 1, 0, 2, 1, 0, 2, 2]])
    fast, slow = KneserNey(rows, 3), Literal(rows.tolist(), 3)
    held = [0, 1, 2, 2, 1]
    expected = sum(-math.log2(slow.probability(held[:i], held[i])) for i in range(1, 5))
    assert bits(fast, np.array([held])) == pytest.approx(expected)
    assert bits_per_byte(fast, np.array([held]), np.array([1, 2, 3])) == pytest.approx(expected / (2 + 3 + 3 + 2))


def test_the_reference_of_a_run_has_seen_exactly_its_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path))
    torch.set_num_threads(1)
    config = load_run_config(
        {
            "model": {"preset": "deepseek-v2-nano", "vocab_size": 300},
            "data": {"corpus": "installed", "max_train_megabytes": 0.5, "tokenizer_vocab_size": 300, "sequence_length": 32},
            "training": {"train_tokens": 10 * 256, "batch_size": 8, "validation_tokens": 2048},
        }
    )
    data = prepare(config.data)
    seen = np.concatenate([batch(data, config.data, seed=0, step=s, batch_size=8) for s in range(1, 11)])
    counted: dict[str, list[np.ndarray]] = defaultdict(list)
    original = KneserNey.__init__

    def spy(self, train_ids, *arguments):
        counted["ids"].append(train_ids)
        original(self, train_ids, *arguments)

    monkeypatch.setattr(KneserNey, "__init__", spy)
    found = reference_bits_per_byte(data, config, 10)
    np.testing.assert_array_equal(counted["ids"][0], seen)
    more = reference_bits_per_byte(data, config, 200)
    assert more < found < 8, "more text makes it better, and any beats the uniform byte"
    monkeypatch.setattr(ngram, "LARGEST_TOKENS", 100)
    with pytest.raises(ValueError, match="at most 100 training tokens"):
        reference_bits_per_byte(data, config, 10)
