"""The compiled kernels against plain PyTorch in float64: outputs and every gradient, at odd sizes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_agreement import agree, normal
from odd_models import NEEDS_COMPILER, YARN, random_model, small
from torch.nn import functional as F

from research.model.experts import looped_experts
from research.model.kernels import attending, functions, native
from research.model.layers import rotary_table
from research.model.router import Routing
from research.model.transformer import language_loss

pytestmark = NEEDS_COMPILER


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), size=st.integers(2, 70), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_rms_norm(rows, size, scale):
    def exact(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    agree(lambda x, w: functions.normalise(x, w, 1e-6), exact, [normal(rows, size) * scale, 1 + 0.3 * normal(size, seed=1)])


def test_rms_norm_of_a_slice_reads_the_slice():
    whole = normal(3, 5, 11)
    agree(lambda x, w: functions.normalise(x[..., :7], w, 1e-6), lambda x, w: F.rms_norm(x[..., :7], (7,), w, 1e-6), [whole, normal(7, seed=2)])


def test_the_gradient_of_a_residual_connection_is_added_in_its_norm():
    def exact(x, weight):
        return x * 3 + x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def fast(x, weight):
        same, y = functions.normalise_beside(x, weight, 1e-6)
        return same * 3 + y

    inputs = [normal(5, 9, 33), 1 + 0.3 * normal(33, seed=1)]
    agree(fast, exact, inputs)
    agree(lambda x, w: functions.normalise_beside(x, w, 1e-6)[1], lambda x, w: exact(x, w) - 3 * x, inputs)
    agree(lambda x, w: functions.normalise_beside(x, w, 1e-6)[0] * w, lambda x, w: x * w, inputs)
    agree(lambda x, w: fast(x[..., 1:12], w[1:12]), lambda x, w: exact(x[..., 1:12], w[1:12]), inputs)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 30), size=st.integers(1, 40), widths=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_products_of_one_input(rows, size, widths):
    inputs = [normal(2, rows, size), *(normal(width, size, seed=i) for i, width in enumerate(widths, 1))]
    agree(lambda *x: torch.cat(functions.products(*x), -1), lambda x, *w: torch.cat([x @ one.T for one in w], -1), inputs)


def ffn(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), size=st.integers(1, 40), width=st.integers(1, 40), scale=st.sampled_from([0.1, 1.0, 30.0]), onto=st.booleans())
def test_feed_forward(rows, size, width, scale, onto):
    gate, up = normal(width, size, seed=1) / size**0.5 * scale, normal(width, size, seed=2)
    torch.testing.assert_close(functions.swiglu(gate, up), F.silu(gate) * up)
    inputs = [normal(2, rows, size), gate, up, normal(size, width, seed=3), *([normal(2, rows, size, seed=4)] if onto else [])]
    agree(functions.feed_forward, lambda *x: ffn(*x[:4]) + (x[4] if onto else 0.0), inputs)


@st.composite
def routings(draw):
    """Tokens, experts, choices and who is kept; at times all choose the same, or nobody is kept."""
    experts = draw(st.integers(1, 9))
    chosen, tokens = draw(st.integers(1, experts)), draw(st.integers(1, 600))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    taste = torch.rand(tokens, experts, generator=random)
    if draw(st.booleans()):
        taste[:, 0] += 2  # one expert takes all
    if draw(st.booleans()):
        taste[:, -1] -= 2 if chosen < experts else 0  # one gets nobody
    ids = taste.topk(chosen).indices
    kept = torch.rand(tokens, chosen, generator=random) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return experts, ids, kept


@settings(max_examples=25, deadline=None)
@given(routing=routings(), size=st.integers(1, 20), width=st.integers(1, 12))
def test_routed_experts_against_the_loop_over_tokens_and_choices(routing, size, width):
    experts, ids, kept = routing
    ids, kept = ids[:40], kept[:40]  # the loop is slow
    gates = normal(*ids.shape, seed=3).abs() * kept

    def exact(x, gates, gate_up, down):
        return looped_experts(x, Routing(ids, gates, gates, kept), gate_up, down) + 0 * (x.sum() + gates.sum() + gate_up.sum() + down.sum())

    inputs = [normal(len(ids), size), gates, normal(experts, 2 * width, size, seed=1), normal(experts, size, width, seed=2)]
    agree(lambda x, gates, *w: functions.routed_experts(x, gates, ids, kept, *w), exact, inputs)
    shared = [normal(width, size, seed=4), normal(width, size, seed=5), normal(size, width, seed=6), normal(len(ids), size, seed=7)]
    agree(
        lambda x, gates, a, b, *w: functions.sparse_feed_forward(x, gates, ids, kept, w[:3], (a, b), w[3]),
        lambda x, gates, a, b, *w: exact(x, gates, a, b) + ffn(x, *w[:3]) + w[3],
        [*inputs, *shared],
    )


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), size=st.integers(1, 70), scale=st.sampled_from([0.1, 1.0, 60.0]), seed=st.integers(0, 99))
def test_exponentials_of_logits(rows, size, scale, seed):
    logits = normal(rows, size, seed=seed) * scale
    wanted = (logits.double() - logits.double().amax(1, keepdim=True)).exp()
    largest, sums = functions.exponentials(said := logits.clone())
    torch.testing.assert_close(said.double(), wanted, rtol=1e-6 + 1e-7 * 10 * scale, atol=1e-37)
    torch.testing.assert_close(sums.double(), wanted.sum(1, keepdim=True), rtol=1e-5, atol=0)
    assert torch.equal(largest, logits.amax(1, keepdim=True))


def test_exponentials_of_what_is_no_number():
    _, sums = functions.exponentials(torch.tensor([[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [0.0, -math.inf, 1.0]]))
    assert sums[:2].isnan().all()
    assert sums[2] == pytest.approx(1 + math.exp(-1))


@settings(max_examples=15, deadline=None)
@given(routing=routings())
def test_routed_experts_of_many_tokens(routing):
    """More assignments to one expert than are taken at once."""
    experts, ids, kept = routing
    gates = normal(*ids.shape, seed=3).abs() * kept

    def exact(x, gates, gate_up, down):
        hidden = torch.einsum("md,efd->mef", x, gate_up)
        out = torch.einsum("mef,edf->med", F.silu(hidden[..., :5]) * hidden[..., 5:], down)
        return (out.gather(1, ids[..., None].expand(-1, -1, 6)) * (gates * kept)[..., None]).sum(1)

    inputs = [normal(len(ids), 6), gates, normal(experts, 10, 6, seed=1), normal(experts, 6, 5, seed=2)]
    agree(lambda x, gates, *w: functions.routed_experts(x, gates, ids, kept, *w), exact, inputs)


@settings(max_examples=60, deadline=None)
@given(
    devices=st.integers(1, 6),
    per_device=st.integers(1, 6),
    tokens=st.integers(1, 20),
    levels=st.sampled_from([2, 5, 10**6]),
    data=st.data(),
)
def test_the_chosen_experts_are_those_of_the_rule_ties_and_all(devices, per_device, tokens, levels, data):
    limit = data.draw(st.integers(1, devices))
    chosen = data.draw(st.integers(1, limit * per_device))
    scores = torch.randint(-levels, levels, (tokens, devices * per_device), generator=torch.Generator().manual_seed(levels + tokens)).float()
    wanted = []
    for row in scores.tolist():
        # sorted() keeps the order of equals: the lower device, the lower expert.
        reach = sorted(range(devices), key=lambda d: -max(row[d * per_device : (d + 1) * per_device]))[:limit]
        wanted.append(sorted((e for e in range(len(row)) if e // per_device in reach), key=lambda e: -row[e])[:chosen])
    assert functions.choose_experts(scores, devices, limit, chosen).tolist() == wanted


def test_experts_are_chosen_even_where_scores_are_no_numbers():
    ids = functions.choose_experts(torch.full((3, 12), math.nan), 4, 2, 5)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 12 and len({e // 3 for e in row}) <= 2 for row in ids.tolist())


def test_what_is_not_a_number_comes_through():
    bad = normal(1, 70, 6)
    bad[0, 33, 1] = math.nan
    sizes = attending.Sizes(1, 1, 4, 2, 3)
    out = attending.latent_attention(bad, normal(1, 70, 7), normal(1, 70, 2), rotary_table(torch.arange(70), 2, 100.0), sizes, 1.0)
    assert out.isnan().any(-1)[0].nonzero().flatten().tolist() == [33]
    assert functions.swiglu(torch.tensor([math.nan, 1.0]), torch.ones(2)).isnan().tolist() == [True, False]
    assert functions.normalise(torch.tensor([[math.nan, 1.0]]), torch.ones(2), 1e-6).isnan().all()


@pytest.mark.parametrize("config", [small(), small(q=None, yarn=YARN, limit=2, shared=2), small(dense=3), small(latent=4), small(q=None, latent=5)])
def test_a_model_says_the_same_with_and_without(config, monkeypatch):
    ids = torch.randint(0, 41, (2, 75), generator=torch.Generator().manual_seed(1))
    found = []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(native, "library", lambda: None)
        model = random_model(config)
        out = model(ids[:, :-1])
        language_loss(out.logits, ids[:, 1:]).backward()
        found.append((out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (fast, fast_gradients), (plain, gradients) = found
    assert not torch.equal(fast, plain), "the kernels were not used"
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        assert float((gradient - fast_gradients[name]).norm()) <= 1e-4 * float(gradient.norm()), name


def test_wider_narrower_and_threaded_work_is_left_to_torch():
    assert native.usable(torch.ones(2))
    assert not native.usable(torch.ones(2, dtype=torch.float64))
    assert not native.usable(torch.ones(2, dtype=torch.bfloat16))
    assert not native.usable(torch.ones(2, device="meta"))
    torch.set_num_threads(2)
    assert not native.usable(torch.ones(2))
