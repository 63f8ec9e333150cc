"""Published sizes, and the closed forms against the module itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research import accounting
from research.config import AttentionConfig, ModelConfig, MoEConfig
from research.model.cache import Cache
from research.model.transformer import Transformer
from research.presets import PRESETS, preset


def test_deepseek_v2_is_what_the_paper_prints():
    model = preset("deepseek-v2")
    assert round(accounting.total_parameters(model) / 1e9, 3) == 235.741
    assert round(accounting.activated_parameters(model) / 1e9, 3) == 20.852
    assert accounting.kv_cache_elements_per_token(model) == 34_560
    assert accounting.kv_cache_bytes_per_token(model, bits=6) == 25_920
    assert round(accounting.train_flops_per_token(model, 4096) / 1e9, 1) == 155.3


def test_deepseek_v2_lite_is_what_the_paper_prints():
    model = preset("deepseek-v2-lite")
    assert round(accounting.total_parameters(model) / 1e9, 3) == 15.706
    assert round(accounting.activated_parameters(model) / 1e9, 3) == 2.451
    assert accounting.kv_cache_elements_per_token(model) == 15_552


def test_the_models_that_it_stands_against_are_what_is_published():
    expected = {  # billions of parameters, cached elements per token
        "deepseek-67b": (67.43, 194_560),
        "llama3-70b": (70.55, 163_840),
        "mixtral-8x22b": (140.62, 114_688),
        "qwen1.5-72b": (72.29, 1_310_720),
        "switch-base-128": (7.39, 36_864),
        "deepseekmoe-16b": (16.38, 114_688),
        "ablation-small-mha": (15.79, 110_592),
        "ablation-small-mla": (15.71, 15_552),
    }
    for name, (billions, elements) in expected.items():
        model = preset(name)
        assert round(accounting.total_parameters(model) / 1e9, 2) == billions, name
        assert accounting.kv_cache_elements_per_token(model) == elements, name
    assert accounting.kv_cache_bytes_per_token(preset("deepseek-67b")) == 389_120
    assert round(accounting.train_flops_per_token(preset("deepseek-67b"), 4096) / 1e9, 1) == 418.6
    # Mixtral's published 39B activated counts the input embedding.
    mixtral = preset("mixtral-8x22b")
    assert round((accounting.activated_parameters(mixtral) + mixtral.vocab_size * mixtral.hidden_size) / 1e9, 2) == 39.15
    small_mha = accounting.activated_parameters(preset("ablation-small-mha"))
    assert round(small_mha / 1e9, 1) == 2.5


def test_the_scaled_family_keeps_the_ratios_that_it_says_it_keeps():
    def ratios(model):
        a, moe = model.attention, model.moe
        width = a.num_attention_heads * a.v_head_dim
        sizes = (width / model.hidden_size, a.kv_lora_rank / width, a.q_lora_rank / a.kv_lora_rank, a.qk_rope_head_dim / a.v_head_dim)
        experts = (moe.expert_devices, moe.device_limit, moe.experts_per_device, moe.num_experts_per_tok, moe.n_shared_experts)
        return (*sizes, *experts, moe.first_k_dense_replace, moe.routed_scaling_factor)

    for name in ("micro", "mini", "small"):
        assert ratios(preset(f"deepseek-v2-{name}")) == ratios(preset("deepseek-v2")), name


def test_the_scaled_family_has_the_stated_sizes():
    for name, millions in (("nano", 1), ("micro", 5), ("mini", 25), ("small", 120)):
        total = accounting.total_parameters(preset(f"deepseek-v2-{name}"))
        assert total == pytest.approx(millions * 1e6, rel=0.06), name


@pytest.mark.parametrize("name", PRESETS)
def test_closed_form_counts_every_parameter_of_the_module(name):
    model = preset(name)
    with torch.device("meta"):
        built = sum(p.numel() for p in Transformer(model).parameters())
    assert built == accounting.total_parameters(model)


@st.composite
def models(draw):
    devices = draw(st.sampled_from([1, 2, 3]))
    heads = draw(st.sampled_from([2, 4, 6]))
    attention = AttentionConfig(
        kind=draw(st.sampled_from(["mla", "mha", "gqa", "mqa"])),
        num_attention_heads=heads,
        num_key_value_heads=2,
        q_lora_rank=draw(st.sampled_from([None, 7])),
        kv_lora_rank=draw(st.integers(1, 9)),
        qk_nope_head_dim=draw(st.integers(1, 5)),
        qk_rope_head_dim=2 * draw(st.integers(1, 3)),
        v_head_dim=draw(st.integers(1, 7)),
    )
    moe = MoEConfig(
        n_routed_experts=devices * 4,
        num_experts_per_tok=draw(st.integers(1, 4)),
        moe_intermediate_size=draw(st.integers(1, 5)),
        n_shared_experts=draw(st.integers(0, 2)),
        first_k_dense_replace=draw(st.integers(0, 2)),
        moe_layer_freq=draw(st.integers(1, 3)),
        selection=draw(st.sampled_from(["affinity", "hash"])),
        gated_experts=draw(st.booleans()),
        expert_devices=devices,
    )
    return ModelConfig(
        vocab_size=11,
        hidden_size=draw(st.integers(3, 9)),
        num_hidden_layers=3,
        intermediate_size=5,
        attention=attention,
        moe=draw(st.sampled_from([None, moe])),
        tie_word_embeddings=draw(st.booleans()),
        gated_ffn=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(models(), st.sampled_from(accounting.KV_BITS))
def test_closed_forms_of_random_models(model, bits):
    with torch.device("meta"):
        built = Transformer(model)
    assert sum(p.numel() for p in built.parameters()) == accounting.total_parameters(model)
    cache = Cache.allocate(model, 2, 5, dtype=torch.bfloat16, device="meta")
    assert cache.allocated_bytes == 2 * 5 * accounting.kv_cache_bytes_per_token(model, bits=16)
    cache = Cache.allocate(model, 2, 5, dtype=torch.float32, device="cpu", bits=bits)
    assert cache.allocated_bytes == 2 * 5 * accounting.kv_cache_bytes_per_token_stored(model, bits)
    assert accounting.kv_cache_bytes_per_token_stored(model, bits) >= accounting.kv_cache_bytes_per_token(model, bits)


def test_the_cache_of_deepseek_v2_in_bits():
    """60 layers of 512 + 64 elements, and 8 bytes of steps and offsets per layer below 16 bits."""
    model = preset("deepseek-v2")
    stored = {bits: accounting.kv_cache_bytes_per_token_stored(model, bits) for bits in accounting.KV_BITS}
    assert stored == {16: 69_120, 8: 35_040, 6: 26_400, 4: 17_760}
