"""The models that the paper stands against, each against its own algorithm written as loops, or against transformers."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from research import accounting
from research.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig
from research.model.balance import balance_losses
from research.model.cache import Cache
from research.model.moe import MoE
from research.model.router import hash_table, route
from research.model.transformer import Transformer
from research.presets import PRESETS, preset

KINDS = [name for name in PRESETS if name.endswith("-nano")]


def moe(config: MoEConfig, seed=0, width=5) -> MoE:
    model = ModelConfig(
        vocab_size=23, hidden_size=width, num_hidden_layers=1, intermediate_size=4, attention=AttentionConfig(num_attention_heads=1), moe=config
    )
    layer = MoE(model, 0).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer


def expert(layer: MoE, index: int, x):
    gate, up = (layer.experts.gate_up_proj[index] @ x).chunk(2)
    return layer.experts.down_proj[index] @ (torch.nn.functional.silu(gate) * up)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([0.5, 1.0, 1.25]))
def test_switch(seed, experts, factor):
    """Fedus et al. 2021: the best expert times its probability, the first tokens up to capacity, the rest by the residual alone."""
    config = MoEConfig(
        n_routed_experts=experts,
        num_experts_per_tok=1,
        moe_intermediate_size=3,
        capacity_factor=factor,
        capacity_of="expert",
        balance=BalanceConfig(expert=0.01, device=0, communication=0, scope="batch"),
    )
    layer = moe(config, seed)
    x = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out, routing = layer(x, torch.zeros(2, 7, dtype=torch.long), protected_B=torch.zeros(2, dtype=torch.bool))
    flat, taken = x.flatten(0, 1), [0] * experts
    capacity = math.ceil(14 / experts * factor)
    probability = torch.stack([(layer.gate.weight @ t).softmax(0) for t in flat])
    for t in range(14):
        best = int(probability[t].argmax())
        expected = torch.zeros(5, dtype=torch.float64)
        if taken[best] < capacity:
            expected = probability[t, best] * expert(layer, best, flat[t])
            taken[best] += 1
        torch.testing.assert_close(out.flatten(0, 1)[t], expected)
    f = [sum(int(p.argmax()) == i for p in probability) / 14 for i in range(experts)]
    loss = experts * sum(f[i] * probability[:, i].mean() for i in range(experts))
    torch.testing.assert_close(balance_losses(routing, config, 2).expert, loss)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.booleans())
def test_gshard(seed, experts, training):
    """Lepikhin et al. 2020, algorithm 1: two renormalised experts, the second by chance, first choices before second ones."""
    config = MoEConfig(
        n_routed_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=3,
        norm_topk_prob=True,
        second_expert="by_chance",
        capacity_factor=1.0,
        capacity_of="expert",
        balance=BalanceConfig(expert=0.01, device=0, communication=0, scope="batch", count_first_choice_only=True),
    )
    layer = moe(config, seed)
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chance = torch.Generator().manual_seed(seed)
    given_ = {"protected_B": torch.zeros(2, dtype=torch.bool), "chance": chance} if training else {}
    out, routing = layer(x, torch.zeros(2, 6, dtype=torch.long), **given_)
    draws = torch.rand(12, generator=torch.Generator().manual_seed(seed))
    flat, taken, expected = x.flatten(0, 1), [0] * experts, torch.zeros(12, 5, dtype=torch.float64)
    capacity = math.ceil(2 * 12 / experts)
    probability = torch.stack([(layer.gate.weight @ t).softmax(0) for t in flat])
    for choice, t in itertools.product(range(2), range(12)):
        two = probability[t].topk(2)
        weight, index = two.values[choice] / two.values.sum(), int(two.indices[choice])
        if training and choice == 1 and not draws[t] < 2 * weight:
            continue
        if training and taken[index] >= capacity:
            continue
        taken[index] += 1
        expected[t] += weight * expert(layer, index, flat[t])
    torch.testing.assert_close(out.flatten(0, 1), expected)
    first = [sum(int(p.argmax()) == i for p in probability) / 12 for i in range(experts)]
    torch.testing.assert_close(balance_losses(routing, config, 2).expert, experts * sum(first[i] * probability[:, i].mean() for i in range(experts)))


def test_mixtral_is_transformers_block_and_loss():
    config = MoEConfig(
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        norm_topk_prob=True,
        balance=BalanceConfig(expert=0.002, device=0, communication=0, scope="batch"),
    )
    layer = moe(config, width=16).float()
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=8, num_experts_per_tok=2, experts_implementation="eager")
    )
    theirs.gate.weight.data.copy_(layer.gate.weight.data)
    theirs.experts.gate_up_proj.data.copy_(layer.experts.gate_up_proj.data)
    theirs.experts.down_proj.data.copy_(layer.experts.down_proj.data)
    x = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(1))
    out, routing = layer(x, torch.zeros(3, 9, dtype=torch.long))
    expected = theirs(x)
    torch.testing.assert_close(out, expected[0] if isinstance(expected, tuple) else expected, atol=1e-4, rtol=1e-4)
    logits = layer.gate(x.flatten(0, 1))
    # Theirs adds the frequencies of both choices, ours divides by K: the preset's 0.002 is the published 0.001.
    torch.testing.assert_close(2 * balance_losses(routing, config, 3).expert, load_balancing_loss_func((logits,), 8, 2))


def test_hash_layers_know_the_token_and_nothing_else():
    config = MoEConfig(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=3, selection="hash")
    layer = moe(config)
    assert layer.gate is None
    ids = torch.arange(22).view(2, 11)
    x = torch.randn(2, 11, 5, dtype=torch.float64)
    out, routing = layer(x, ids)
    other = layer(torch.randn(2, 11, 5, dtype=torch.float64), ids)[1]
    assert torch.equal(routing.expert_ids_MK, other.expert_ids_MK)
    for t in range(22):
        torch.testing.assert_close(out.flatten(0, 1)[t], expert(layer, int(routing.expert_ids_MK[t, 0]), x.flatten(0, 1)[t]))
    counts = torch.bincount(hash_table(1000, replace(config, num_experts_per_tok=3), 1).flatten(), minlength=4)
    assert counts.max() - counts.min() <= 3
    assert (hash_table(1000, config, 0) != hash_table(1000, config, 1)).any(), "each layer hashes in its own way"
    assert not [name for name in layer.state_dict() if "table" in name]


def test_glam_has_experts_in_every_other_layer():
    config = preset("glam-64b-64e")
    assert config.moe_layers == tuple(range(0, 64, 2))
    assert round(accounting.activated_parameters(config) / 1e9, 1) == 96.6
    assert round(accounting.total_parameters(config) / 1e12, 2) == 1.16


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["mla", "mha", "gqa", "mqa"])
def test_every_attention_goes_with_every_ffn(name, kind):
    attention = AttentionConfig(
        kind=kind,
        num_attention_heads=4,
        num_key_value_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    config = replace(preset(name), hidden_size=48, vocab_size=61, attention=attention)
    model = Transformer(config).initialise(0)
    assert sum(p.numel() for p in model.parameters()) == accounting.total_parameters(config)
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = Cache.allocate(config, 2, 12, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        full = model(ids)
        pieces = torch.cat([model(ids[:, a:b], cache).logits for a, b in ((0, 5), (5, 6), (6, 12))], 1)
    torch.testing.assert_close(pieces, full.logits, atol=1e-5, rtol=0)
    assert tuple(full.routings) == config.moe_layers
    training = model(ids, protected_B=torch.zeros(2, dtype=torch.bool), chance=torch.Generator().manual_seed(0))
    training.logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 5))
def test_routing_laws_of_the_device_limit(seed, chosen, devices):
    """Distinct devices never decrease in M; M >= min(D, K) is unrestricted; experts permuted within a device permute the result."""
    per_device = 4
    logits = torch.randn(6, devices * per_device, generator=torch.Generator().manual_seed(seed))
    config = MoEConfig(n_routed_experts=devices * per_device, num_experts_per_tok=chosen, moe_intermediate_size=1, expert_devices=devices)
    reach = []
    for limit in range(1, devices + 1):
        ids = route(logits, replace(config, device_limit=limit)).expert_ids_MK
        reach.append(torch.tensor([len(set((row // per_device).tolist())) for row in ids]))
        if limit >= min(devices, chosen):
            assert torch.equal(ids, route(logits, config).expert_ids_MK)
    assert all((a <= b).all() for a, b in itertools.pairwise(reach))
    shuffle = torch.stack(
        [d * per_device + torch.randperm(per_device, generator=torch.Generator().manual_seed(seed + d)) for d in range(devices)]
    ).flatten()
    limited = replace(config, device_limit=max(devices - 1, 1))
    permuted = route(logits[:, shuffle], limited).expert_ids_MK
    assert torch.equal(shuffle[permuted], route(logits, limited).expert_ids_MK)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"second_expert": "by_chance", "num_experts_per_tok": 3}, "second_expert=by_chance needs num_experts_per_tok=2"),
        ({"selection": "hash", "expert_devices": 2, "device_limit": 1}, "hashed experts have no affinity"),
        ({"moe_layer_freq": 0}, "moe_layer_freq=0 must be > 0"),
    ],
)
def test_impossible_routers_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        MoEConfig(**{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 1, **changes})
