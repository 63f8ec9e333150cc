"""At initialisation (N(0, 0.006 sqrt(5120 / d))) nothing grows or fades with depth, at any width of the family."""

import math
from dataclasses import replace

import pytest
import torch

from research.configfile import load_run_config
from research.model.transformer import Transformer, language_loss
from research.presets import preset


def rms(x):
    return float(x.detach().square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "layers"),
    [("deepseek-v2-nano", 2), ("deepseek-v2-nano", 40), ("deepseek-v2-micro", 4), ("deepseek-v2-mini", 5), ("deepseek-v2-small", 8)],
)
def test_activations_and_gradients_keep_their_size_through_depth(name, layers):
    config = replace(preset(name), num_hidden_layers=layers)
    model = Transformer(config).initialise(0)
    branches, stream = [], []

    def watch(_, inputs):
        inputs[0].retain_grad()
        stream.append(inputs[0])

    for block in model.layers:
        block.register_forward_pre_hook(watch)
        block.self_attn.register_forward_hook(lambda _, __, given, out: branches.append(rms(out - given["onto"])), with_kwargs=True)
    model.norm.register_forward_pre_hook(watch)
    ids = torch.randint(0, config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(1))
    loss = language_loss(model(ids[:, :-1]).logits, ids[:, 1:])
    loss.backward()
    assert float(loss) == pytest.approx(math.log(config.vocab_size), abs=0.25), "no token is preferred yet"
    sizes = [rms(x) for x in stream]
    assert sizes[0] == pytest.approx(config.initializer_range, rel=0.1), "the embedding alone"
    # Branches add up like a random walk: behind the first layer the stream grows with the square root of depth, not exponentially.
    assert max(sizes[1:]) / min(sizes[1:]) < 2 * math.sqrt(layers)
    assert max(branches) / min(branches) < 5
    # Every branch sees the stream divided by its size, so what a layer does to the loss is a matter of relative changes:
    # |dL/dx| |x| has to be of one order at every depth, the embedding and the last layer included.
    felt = [rms(x.grad.norm(dim=-1) * x.detach().norm(dim=-1)) for x in stream]
    assert max(felt) / min(felt) < 4, felt
    for parameter in ("self_attn.o_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"):
        norms = [float(block.get_parameter(parameter).grad.norm()) for block in model.layers]
        # So a parameter's own gradient fades as the stream grows, which the first layer sees most of: it begins with
        # an embedding that the published spread makes much smaller than what one layer adds.
        assert norms[0] < 3 * norms[-1] * sizes[-1] / sizes[0], parameter
        assert max(norms[1:]) / min(norms[1:]) < 2 * math.sqrt(layers), parameter


def test_the_rule_gives_the_published_value_at_full_width():
    assert preset("deepseek-v2").initializer_range == 0.006
    for name in ("deepseek-v2-nano", "deepseek-v2-micro", "deepseek-v2-mini", "deepseek-v2-small"):
        config = preset(name)
        assert config.initializer_range == pytest.approx(0.006 * math.sqrt(5120 / config.hidden_size), abs=1e-4)


def test_all_matrices_have_the_stated_spread_and_all_gains_are_one():
    config = preset("deepseek-v2-micro")
    for name, parameter in Transformer(config).initialise(3).named_parameters():
        if parameter.ndim > 1:
            assert rms(parameter) == pytest.approx(config.initializer_range, rel=0.05), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_the_same_seed_is_the_same_model():
    config = preset("deepseek-v2-nano")
    one, two, other = (Transformer(config).initialise(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"moe": {"n_routed_experts": 16}}, ("experts", "gate")),
        ({"attention": {"kv_lora_rank": 24}}, ("kv_a", "kv_b")),
        ({"moe": {"num_experts_per_tok": 2, "device_limit": 1}}, ()),
        ({"attention": {"kind": "mha", "q_lora_rank": None}}, ("self_attn",)),
    ],
)
def test_models_that_differ_in_one_part_begin_alike_in_all_others(change, free):
    """Common random numbers: a variant of an ablation is compared with its baseline on the same seed."""
    one, two = (
        Transformer(load_run_config({"model": {"preset": "deepseek-v2-nano", **over}, "training": {"train_tokens": 512}}).model)
        .initialise(4)
        .state_dict()
        for over in ({}, change)
    )
    alike = [name for name in one if name in two and one[name].shape == two[name].shape]
    assert len(alike) > 5
    assert all(torch.equal(one[name], two[name]) for name in alike if not any(part in name for part in free))
    assert all(any(part in name for part in free) for name in {*one, *two} - set(alike))
    matrices = [one[name].flatten()[:64] for name in one if one[name].ndim > 1]
    assert len({tuple(m.tolist()) for m in matrices}) == len(matrices)  # no two share their numbers
