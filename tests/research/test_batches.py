"""Batches: shares of ranks, and the thread that makes them ready before they are asked for."""

import argparse
import pydoc
import threading
import time
import typing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.config import DataConfig
from research.data import corpora
from research.data.batches import batch, mixture_shares
from research.data.prefetch import Prefetcher
from research.data.prepare import prepare

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        files = [Path(module.__file__) for module in (argparse, pydoc, typing)]
        patch.setattr(corpora, "_installed_files", lambda: files)  # all of the library takes ten seconds
        config = DataConfig(corpus="installed", tokenizer_vocab_size=280, sequence_length=24, mixture={"en": 3, "code": 1})
        yield prepare(config), config


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_the_ranks_rows_are_the_global_batch(corpus, seed, step, world_size, each):
    data, config = corpus
    size = world_size * each
    whole = batch(data, config, seed=seed, step=step, batch_size=size)
    parts = [batch(data, config, seed=seed, step=step, batch_size=size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert whole.shape == (size, 25)
    assert all(part.shape == (each, 25) for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("rank", "world_size", "said"),
    [(0, 3, "world_size=3 must divide batch_size=8"), (0, 0, "world_size=0"), (4, 4, r"rank=4 must lie in 0\.\.3"), (-1, 4, "rank=-1")],
)
def test_ranks_that_do_not_exist(corpus, rank, world_size, said):
    data, config = corpus
    with pytest.raises(ValueError, match=said):
        batch(data, config, seed=0, step=0, batch_size=8, rank=rank, world_size=world_size)


def test_domains_come_by_the_mixture(corpus):
    data, config = corpus
    assert dict(zip(data.domains, mixture_shares(data, config), strict=True)) == {"code": 0.25, "en": 0.75}
    rows = batch(data, config, seed=1, step=1, batch_size=4000)
    windows = {row.tobytes() for row in np.lib.stride_tricks.sliding_window_view(np.asarray(data.train_tokens("en"), np.int64), 25)}
    share = np.mean([row.tobytes() in windows for row in rows])
    assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5  # five standard deviations of a draw of 4,000


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def numbers(step):
    return np.full((2, 3), step)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_what_was_made_ahead_is_what_is_made_at_once(corpus, depth):
    data, config = corpus

    def make(step):
        return batch(data, config, seed=7, step=step, batch_size=4)

    found = list(Prefetcher(make, range(3, 12), CPU, depth))
    assert [step for step, _ in found] == list(range(3, 12))
    for step, ids in found:
        np.testing.assert_array_equal(ids.numpy(), make(step))
    assert not threads()


def test_no_more_is_made_ahead_than_said():
    made = []
    for step, _ in Prefetcher(lambda step: made.append(step) or numbers(step), range(100), CPU, depth=3):
        until = time.monotonic() + 10
        while len(made) < step + 4 and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.01)  # as long as it could wish for to make one more
        assert made[-1] == step + 3
        if step == 5:
            break
    assert made == list(range(9))
    assert not threads()


def test_batches_are_made_while_the_step_runs_and_waiting_is_counted():
    made = [threading.Event() for _ in range(10)]

    def make(step):
        time.sleep(0.03 if step == 0 else 0)
        made[step].set()
        return numbers(step)

    began = time.perf_counter()
    batches = Prefetcher(make, range(10), CPU)
    for step, _ in batches:
        if step == 0:
            assert 0.02 < batches.waited_seconds < time.perf_counter() - began
        assert step == 9 or made[step + 1].wait(30), "the step is held up until the next batch is ready"
    assert batches.waited_seconds < time.perf_counter() - began


def test_an_error_comes_where_its_batch_is_asked_for():
    def make(step):
        if step == 4:
            raise OSError("shard is gone")
        return numbers(step)

    batches = iter(Prefetcher(make, range(10), CPU))
    assert [step for step, _ in islice(batches, 4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="shard is gone"):
        next(batches)
    assert not threads()


def test_the_thread_ends_with_the_loop_however_that_ends():
    def left_by(error):
        for step, _ in Prefetcher(numbers, range(10), CPU):
            if step == 2:
                raise error

    kept = []
    for error in (RuntimeError("diverged"), KeyboardInterrupt()):
        try:
            left_by(error)
        except BaseException as caught:
            kept.append(caught)  # with its traceback, as a caller may
        assert not threads()
    assert len(kept) == 2
    assert list(Prefetcher(numbers, range(0), CPU)) == []
    with pytest.raises(ValueError, match="depth=0"):
        Prefetcher(numbers, range(3), CPU, depth=0)
