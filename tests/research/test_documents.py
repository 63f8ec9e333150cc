"""Masked documents: a packed sequence computes what each of its documents computes alone, and nothing flows between them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_models import random_model, small
from test_attention import small as dense

from research.configfile import load_run_config
from research.data.batches import batch, heldout_batches
from research.data.packing import document_index
from research.data.prepare import prepare
from research.evaluation.bits_per_byte import evaluate_domains
from research.model.cache import Cache
from research.model.transformer import Transformer, language_loss
from research.training import records
from research.training.loop import train
from research.training.records import JsonlRecorder

END = 0
MODELS = {
    "mla, experts": small,
    "mla, experts, limited": lambda: small(limit=2),
    **{kind: lambda kind=kind: dense(kind) for kind in ("mla", "mha", "gqa", "mqa")},
}


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4))
@settings(deadline=None)
def test_the_index_counts_the_ends_before_a_position(rows):
    found = document_index(torch.tensor(rows), END)
    assert found.tolist() == [[row[:t].count(END) for t in range(len(row))] for row in rows]


def packed(lengths, vocabulary, seed=0):
    """Documents of such lengths, each with its end token; their concatenation int64 (1, T)."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.cat((torch.randint(1, vocabulary, (n - 1,), generator=generator), torch.tensor([END]))) for n in lengths]
    return parts, torch.cat(parts)[None]


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_sequence_is_its_documents_alone(name):
    config = MODELS[name]()
    model = random_model(config, torch.float64)
    parts, ids = packed((5, 1, 9, 2, 7), config.vocab_size)
    with torch.no_grad():
        together = model(ids, documents=document_index(ids, END)).logits[0]
        alone = torch.cat([model(part[None]).logits[0] for part in parts])
        crossing = model(ids).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)
    assert (crossing[5:] - alone[5:]).abs().max() > 1e-2, "without the mask these documents see each other"


def test_rows_of_a_batch_have_their_own_documents():
    model = random_model(small(), torch.float64)
    ids = torch.cat([packed(lengths, 41, seed)[1] for seed, lengths in enumerate(((4, 8), (9, 3), (12,)))])
    index = document_index(ids, END)
    with torch.no_grad():
        rows = torch.cat([model(ids[i : i + 1], documents=index[i : i + 1]).logits for i in range(3)])
        torch.testing.assert_close(model(ids, documents=index).logits, rows, atol=1e-10, rtol=0)
        one = torch.zeros_like(ids)
        torch.testing.assert_close(model(ids, documents=one).logits, model(ids).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["mla, experts", "gqa"])
def test_gradients_do_not_cross(name):
    config = MODELS[name]()
    ids = torch.tensor([[3, 4, 5, END, 7, 8, 9, 10]])
    for index, flows in ((document_index(ids, END), False), (None, True)):
        model = random_model(config, torch.float64)
        model(ids, documents=index).logits[:, 4:].square().sum().backward()
        assert bool(model.embed_tokens.weight.grad[[3, 4, 5, END]].abs().max() > 0) is flows
        assert (model.embed_tokens.weight.grad[[7, 8, 9, 10]].abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", ["mla, experts", "gqa"])
def test_masked_documents_out_of_a_cache_that_was_empty_and_of_no_other(name):
    config = MODELS[name]()
    model = random_model(config, torch.float64)
    _, ids = packed((5, 6), config.vocab_size)
    index = document_index(ids, END)
    with torch.no_grad():
        cache = Cache.allocate(model.config, 1, 12, dtype=torch.float64, device="cpu")
        torch.testing.assert_close(model(ids, cache, documents=index).logits, model(ids, documents=index).logits, atol=1e-10, rtol=0)
        with pytest.raises(ValueError, match="cache that is empty"):
            model(ids[:, :1], cache, documents=index[:, :1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on many short documents; no dropping, which depends on who shares a pass."""
    folder = tmp_path_factory.mktemp("documents")
    lines = [json.dumps({"text": f"the {i * 7919 % 10007} brown foxes jump over {i * i % 97} dogs"}) for i in range(900)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CACHE", str(folder / "cache"))
        config = load_run_config(
            {
                "model": {"preset": "deepseek-v2-nano", "vocab_size": 280, "moe": None},
                "data": {"corpus": "files", "paths": [str(folder / "*.jsonl")], "tokenizer_vocab_size": 280, "sequence_length": 96},
                "training": {"train_tokens": 2 * 4 * 96, "batch_size": 4, "record_every": 1, "validation_tokens": 960},
            }
        )
        yield config, prepare(config.data)


def alone(model, row, end):
    """Summed nats of the targets of one row int64 (T + 1,), every document by itself."""
    given, targets, total, start = row[:-1], row[1:], 0.0, 0
    for stop in [*(np.flatnonzero(given == end) + 1), len(given)]:
        if stop > start:
            part = slice(start, stop)
            logits = model(torch.from_numpy(given[part].copy())[None]).logits
            total += float(language_loss(logits, torch.from_numpy(targets[part].copy())[None])) * (stop - start)
        start = stop
    return total


@torch.no_grad()
def test_validation_scores_each_document_alone(run):
    config, data = run
    model = random_model(config.model, torch.float64)
    windows = np.concatenate(list(heldout_batches(data, config.data, domain="text", max_tokens=960)))
    assert (windows[:, 1:-1] == data.end_of_text).any(1).all(), "every window has several documents"
    masked = evaluate_domains(model, data, replace(config.data, mask_documents=True), 960)["text"]
    assert masked.bits == pytest.approx(sum(alone(model, w, data.end_of_text) for w in windows) / math.log(2), rel=1e-6)
    crossing = evaluate_domains(model, data, config.data, 960)["text"]
    assert abs(masked.bits / crossing.bits - 1) > 1e-3
    from_cache = evaluate_domains(model, data, replace(config.data, mask_documents=True), 960, bits=16)["text"]
    assert abs(from_cache.bits - masked.bits) < abs(crossing.bits - masked.bits) / 10, "16 bits round; they do not unmask"


def test_training_sees_each_document_alone(run, tmp_path):
    config, data = run
    rows = batch(data, config.data, seed=config.seed, step=1, batch_size=4)
    with torch.no_grad():
        model = Transformer(config.model).initialise(config.seed)
        wanted = sum(alone(model, row, data.end_of_text) for row in rows) / (4 * 96)
    first = {}
    for masked in (True, False):
        changed = replace(config, data=replace(config.data, mask_documents=masked))
        path = tmp_path / f"{masked}.jsonl"
        train(changed, tmp_path / str(masked), JsonlRecorder(path), lambda record: False, device="cpu")
        first[masked] = json.loads(path.read_text().splitlines()[0])[records.LOSS]
    assert first[True] == pytest.approx(wanted, rel=1e-6)
    assert abs(first[False] - wanted) > 1e-5
