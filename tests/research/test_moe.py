"""Routing, balance losses, dropping and experts against the formulas written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.config import BalanceConfig, MoEConfig
from research.model.balance import balance_losses
from research.model.experts import grouped_experts, looped_experts
from research.model.router import choose, drop, route
from research.routing_trace import select_experts


@st.composite
def routings(draw):
    devices, per_device = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    limit = draw(st.one_of(st.none(), st.integers(1, devices)))
    reach = (limit or devices) * per_device
    config = MoEConfig(
        n_routed_experts=devices * per_device,
        num_experts_per_tok=draw(st.integers(1, min(reach, 6))),
        moe_intermediate_size=3,
        expert_devices=devices,
        device_limit=limit,
        routed_scaling_factor=draw(st.sampled_from([1.0, 16.0])),
        capacity_factor=1.0,
    )
    logits = torch.randn(draw(st.integers(1, 4)) * 6, config.n_routed_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    return config, logits * draw(st.sampled_from([0.1, 1.0, 4.0]))


@settings(max_examples=150, deadline=None)
@given(routings())
def test_routing_laws(case):
    config, logits = case
    routing = route(logits, config)
    ids = routing.expert_ids_MK.numpy()
    devices = ids // config.experts_per_device
    for token in range(len(ids)):
        assert len(set(ids[token])) == config.num_experts_per_tok
        assert len(set(devices[token])) <= (config.device_limit or config.expert_devices)
    np.testing.assert_array_equal(
        ids, select_experts(logits.double().softmax(-1).numpy(), config.num_experts_per_tok, config.expert_devices, config.device_limit)
    )
    expected = logits.double().softmax(-1).gather(-1, routing.expert_ids_MK) * config.routed_scaling_factor
    torch.testing.assert_close(routing.gates_MK.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_masked_device_never_receives_a_token_whatever_the_sign():
    config = MoEConfig(n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=1, expert_devices=2, device_limit=1)
    scores = torch.tensor([[-1.0, -9.0, -9.0, -2.0, -2.0, -2.0]])
    assert sorted(choose(scores, config)[0].tolist()) == [0, 1, 2]
    assert sorted(select_experts(scores.numpy(), 3, 2, 1)[0].tolist()) == [0, 1, 2]


def literal_losses(ids_TK, scores_TE, config):
    """Equations 23 to 31 for one sequence."""
    length, experts, devices = len(ids_TK), config.n_routed_experts, config.expert_devices
    members = [range(d * config.experts_per_device, (d + 1) * config.experts_per_device) for d in range(devices)]
    f = [experts / (config.num_experts_per_tok * length) * sum(i in ids_TK[t] for t in range(length)) for i in range(experts)]
    p = [sum(scores_TE[t][i] for t in range(length)) / length for i in range(experts)]
    expert = sum(a * b for a, b in zip(f, p, strict=True))
    device = sum(sum(f[j] for j in g) / len(g) * sum(p[j] for j in g) for g in members)
    limit = config.device_limit or devices
    sent = [devices / (limit * length) * sum(any(j in ids_TK[t] for j in g) for t in range(length)) for g in members]
    communication = sum(s * sum(p[j] for j in g) for s, g in zip(sent, members, strict=True))
    return expert, device, communication


@settings(max_examples=60, deadline=None)
@given(routings())
def test_balance_losses_are_the_equations_per_sequence(case):
    config, logits = case
    routing = route(logits, config)
    sequences = len(logits) // 6
    ids, scores = routing.expert_ids_MK.view(sequences, 6, -1).tolist(), routing.scores_ME.view(sequences, 6, -1).tolist()
    expected = np.mean([literal_losses(i, s, config) for i, s in zip(ids, scores, strict=True)], axis=0)
    np.testing.assert_allclose([float(x) for x in balance_losses(routing, config, sequences)], expected, rtol=2e-5)


def test_under_perfect_balance_each_loss_is_its_alpha():
    config = MoEConfig(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=1, expert_devices=4, device_limit=2)
    ids = torch.tensor([[0, 2], [4, 6], [1, 3], [5, 7]])
    routing = route(torch.zeros(4, 8), config)._replace(expert_ids_MK=ids)
    losses = balance_losses(routing, config, 1)
    np.testing.assert_allclose([float(x) for x in losses], [1, 1, 1], rtol=1e-6)
    assert float(losses.weighted(BalanceConfig(expert=0.003, device=0.05, communication=0.02))) == pytest.approx(0.073)


def test_gradient_reaches_the_gate_only_through_p():
    config = MoEConfig(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=1, expert_devices=3, device_limit=2)
    logits = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = balance_losses(route(logits, config), config, 1)
    (found,) = torch.autograd.grad(losses.expert, logits)
    scores = logits.softmax(-1)
    counts = torch.bincount(choose(scores, config).flatten(), minlength=6)
    (expected,) = torch.autograd.grad((counts * 6 / (2 * 10) * scores.mean(0)).sum(), logits)
    torch.testing.assert_close(found, expected)


def literal_drop(ids, affinity, config, protected):
    kept = np.ones_like(ids, dtype=bool)
    budget = math.ceil(config.capacity_factor * ids.size / config.expert_devices)
    for device in range(config.expert_devices):
        here = [(t, k) for t in range(len(ids)) for k in range(ids.shape[1]) if ids[t, k] // config.experts_per_device == device]
        droppable = sorted((x for x in here if not protected[x[0]]), key=lambda x: affinity[x])
        for t, k in droppable[: max(len(here) - budget, 0)]:
            kept[t, k] = False
    return kept


@settings(max_examples=80, deadline=None)
@given(routings(), st.integers(0, 2**24 - 1))
def test_dropping_takes_the_lowest_affinities_of_each_overfull_device(case, bits):
    config, logits = case
    routing = route(logits, config)
    protected = torch.tensor([bool(bits >> i & 1) for i in range(len(logits))])
    dropped = drop(routing, config, protected)
    affinity = routing.scores_ME.gather(-1, routing.expert_ids_MK).numpy()
    np.testing.assert_array_equal(dropped.kept_MK.numpy(), literal_drop(routing.expert_ids_MK.numpy(), affinity, config, protected.tolist()))
    assert (dropped.gates_MK[~dropped.kept_MK] == 0).all()
    assert dropped.kept_MK[protected].all()


@settings(max_examples=30, deadline=None)
@given(routings(), st.integers(1, 9), st.booleans(), st.booleans())
def test_grouped_experts_equal_the_loop_in_outputs_and_gradients(case, width, dropping, one_takes_all):
    config, logits = case
    if one_takes_all:
        logits = logits + torch.nn.functional.one_hot(torch.tensor(0), logits.shape[1]) * 50
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(len(logits), width, generator=generator, dtype=torch.float64)
    weights = [torch.randn(config.n_routed_experts, *s, generator=generator, dtype=torch.float64) for s in ((6, width), (width, 3))]
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    results = []
    for form in (grouped_experts, looped_experts):
        leaves = [t.clone().requires_grad_() for t in (logits.double(), x, *weights)]
        routing = route(leaves[0], config)
        if dropping:
            routing = drop(routing, config, torch.zeros(len(logits), dtype=torch.bool))
        out = form(leaves[1], routing, leaves[2], leaves[3])
        results.append((out, *torch.autograd.grad((out * upstream).sum(), leaves, allow_unused=True, materialize_grads=True)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


def test_under_autocast_the_products_are_narrow_and_the_sums_are_not():
    random = torch.Generator().manual_seed(0)
    config = MoEConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    x = torch.randn(30, 16, generator=random)
    gate_up, down = torch.randn(4, 16, 16, generator=random) / 4, torch.randn(4, 16, 8, generator=random) / 3
    routing = route(torch.randn(30, 4, generator=random), config)
    narrow, exact = [[t.clone().requires_grad_() for t in (x, gate_up, down)] for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_experts(narrow[0], routing, *narrow[1:])
    wanted = looped_experts(exact[0], routing, *exact[1:])
    assert out.dtype == torch.float32
    assert 1e-4 < float(((out - wanted).norm() / wanted.norm()).detach()) < 1e-2, "bfloat16 keeps 8 bits"
    out.sum().backward()
    wanted.sum().backward()
    for ours, theirs in zip(narrow, exact, strict=True):
        assert ours.grad.dtype == torch.float32
        assert float((ours.grad - theirs.grad).norm()) < 2e-2 * float(theirs.grad.norm())
