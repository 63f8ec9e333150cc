"""The blocks' step in decoding by one call, against the modules' own forward."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_models import NEEDS_COMPILER, YARN, random_model, small

from research.model import decoding
from research.model.cache import Cache
from research.model.generation import generate
from research.presets import preset

pytestmark = NEEDS_COMPILER


def run(model, batch, new, lengths, monkeypatched):
    """Logits, routings and the cache of `new` tokens behind prompts of unequal lengths; and how often the blocks went by the kernels."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        if monkeypatched:
            patch.setattr(decoding, "prepared", lambda *_: None)
        else:
            step = decoding.Blocks.step
            patch.setattr(decoding.Blocks, "step", lambda *given: taken.append(1) or step(*given))
        cache = Cache.allocate(model.config, batch, max(lengths) + new + 3, dtype=torch.float32, device="cpu")
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            prompt = torch.randint(0, model.config.vocab_size, (batch, max(lengths)), generator=random)
            model(prompt, cache, new_B=torch.tensor(lengths))
            out = model(torch.randint(0, model.config.vocab_size, (batch, new), generator=random), cache)
    return out, cache, len(taken)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    new=st.integers(1, 4),
    query_latent=st.sampled_from([None, 9]),
    sum_to_one=st.booleans(),
    shared=st.sampled_from([0, 2]),
    limit=st.sampled_from([1, 2, None]),
    yarn=st.sampled_from([None, YARN]),
    seed=st.integers(0, 9),
)
def test_the_same_as_the_modules(lengths, new, query_latent, sum_to_one, shared, limit, yarn, seed):
    config = small(q=query_latent, shared=shared, limit=limit, scaling=2.5, yarn=yarn)
    config = replace(config, moe=replace(config.moe, norm_topk_prob=sum_to_one))
    model = random_model(config, seed=seed).eval()
    said, cache, taken = run(model, len(lengths), new, lengths, False)
    wanted, other, none = run(model, len(lengths), new, lengths, True)
    assert (taken, none) == (1, 0)
    scale = float(wanted.logits.abs().max())
    torch.testing.assert_close(said.logits, wanted.logits, atol=1e-5 * scale, rtol=1e-5)
    for one, two in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(one.first.rows, two.first.rows, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.second.rows, two.second.rows, atol=1e-5, rtol=1e-5)
    assert said.routings.keys() == wanted.routings.keys()
    for layer, routing in said.routings.items():
        assert torch.equal(routing.expert_ids_MK, wanted.routings[layer].expert_ids_MK)
        assert routing.kept_MK.all()
        torch.testing.assert_close(routing.gates_MK, wanted.routings[layer].gates_MK, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(routing.scores_ME, wanted.routings[layer].scores_ME, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("batch", "lengths"), [(8, [5] * 8), (1, [300]), (2, [1, 40])])
def test_a_preset(batch, lengths):
    model = random_model(preset("deepseek-v2-nano"), seed=1).eval()
    said, _, taken = run(model, batch, 1, lengths, False)
    wanted, _, _ = run(model, batch, 1, lengths, True)
    assert taken == 1
    torch.testing.assert_close(said.logits, wanted.logits, atol=1e-5 * float(wanted.logits.abs().max()), rtol=1e-4)


def test_what_the_kernels_do_not_know_goes_by_the_modules():
    """More rows than they take, a packed cache, padding, another attention, dropping, gradients."""
    cases = {
        "too many rows": lambda m: run(m, 3, 3, [4, 4, 4], False)[2],
        "packed": lambda m: _taken(m, bits=8),
        "bfloat16 rows": lambda m: _taken(m, bits=16),
        "padding": lambda m: _taken(m, new_B=torch.tensor([1])),
        "dropping": lambda m: _taken(m, protected_B=torch.tensor([False])),
        "gradients": lambda m: _taken(m, gradients=True),
    }
    model = random_model(small(), seed=0).eval()
    for name, case in cases.items():
        assert case(model) == 0, name
    others = ["mixtral-nano", "hash-nano", "switch-nano"]
    for name in others:
        assert _taken(random_model(preset(name), seed=0).eval()) == 0, name


def _taken(model, bits=None, gradients=False, **given):
    taken = []
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(gradients):
        step = decoding.Blocks.step
        patch.setattr(decoding.Blocks, "step", lambda *arguments: taken.append(1) or step(*arguments))
        cache = Cache.allocate(model.config, 1, 12, dtype=torch.float32, device="cpu", bits=bits)
        with torch.no_grad():
            model(torch.arange(4)[None], cache)
        model(torch.arange(2)[None], cache, **given)
    return len(taken)


def test_generated_words_are_the_same():
    """A long greedy continuation, with prompts of unequal lengths."""
    model = random_model(preset("deepseek-v2-nano"), seed=2).eval()
    prompts = [torch.arange(7) * 5, torch.arange(30) * 3]
    said = torch.stack(list(generate(model, prompts, 60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "prepared", lambda *_: None)
        wanted = torch.stack(list(generate(model, prompts, 60)))
    assert torch.equal(said, wanted)


def test_what_is_no_number_is_seen():
    """A NaN in a weight reaches the logits, as it does by the modules."""
    for spoil in (lambda m: m.layers[1].mlp.gate.weight, lambda m: m.layers[0].self_attn.o_proj.weight, lambda m: m.layers[0].mlp.down_proj.weight):
        model = random_model(small(), seed=0).eval()
        with torch.no_grad():
            spoil(model).fill_(math.nan)
        assert run(model, 1, 1, [3], False)[0].logits.isnan().all()


def _next(model, cache, length):
    """Logits of one more token behind `length` of the cache."""
    cache.lengths[:] = length
    with torch.no_grad():
        return model(torch.tensor([[7]]), cache).logits


def test_what_is_prepared_is_prepared_once_and_again_when_the_model_changes():
    """Whatever changes between two tokens of a cache: a value, a tensor, a module, where the tensors lie, the model."""
    model, other = (random_model(small(), seed=seed).eval() for seed in (0, 1))
    cache = Cache.allocate(model.config, 1, 12, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model(torch.arange(4)[None], cache)
    _next(model, cache, 4)
    first = cache.prepared
    for length in range(5, 9):
        _next(model, cache, length)
    assert isinstance(first, decoding.Blocks)
    assert cache.prepared is first

    def by_modules(of):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "prepared", lambda *_: None)
            return _next(of, cache, 9)

    last, attention = model.layers[-1], model.layers[0].self_attn
    changes = {
        "a value": lambda: attention.o_proj.weight.data.mul_(2.0),
        "where a tensor lies": lambda: setattr(attention.o_proj.weight, "data", attention.o_proj.weight.data.clone() * 2.0),
        "a parameter": lambda: setattr(last.mlp.gate, "weight", torch.nn.Parameter(last.mlp.gate.weight.flip(0).clone())),
        "a module": lambda: setattr(last, "mlp", other.layers[-1].mlp),
        "all of it, twice": lambda: model.double().float(),
    }
    for name, change in changes.items():
        before = _next(model, cache, 9)
        change()
        said = _next(model, cache, 9)
        assert torch.allclose(said, before) == (name == "all of it, twice"), name
        torch.testing.assert_close(said, by_modules(model), atol=1e-5 * float(said.abs().max()), rtol=1e-5)
        assert (cache.prepared is first) == (name == "a value"), name
    torch.testing.assert_close(_next(other, cache, 9), by_modules(other), atol=1e-5 * float(before.abs().max()), rtol=1e-5)


def test_a_copy_of_a_cache_has_rows_of_its_own():
    """As a search over several continuations would make; the first cache's rows stay as they are."""
    model = random_model(small(), seed=0).eval()
    cache = Cache.allocate(model.config, 1, 12, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model(torch.arange(4)[None], cache)
    wanted = _next(model, cache, 4)
    rows = cache.layers[0].first.rows.clone()
    for other in (
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
        replace(cache, layers=copy.deepcopy(cache.layers), lengths=torch.tensor([5])),
    ):
        for layer in other.layers:
            layer.first.rows[:, :4].zero_()
        assert not torch.allclose(_next(model, other, 4), wanted)
        assert isinstance(other.prepared, decoding.Blocks)
        assert other.prepared is not cache.prepared
    assert torch.equal(cache.layers[0].first.rows, rows)
    assert torch.equal(_next(model, cache, 4), wanted)
