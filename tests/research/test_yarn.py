"""YaRN against Hugging Face's code and against its formulas, in every kind of attention."""

import importlib
import math

import pytest
import torch
from odd_models import YARN, its_twin, random_model, small
from transformers import DeepseekV2Config, modeling_rope_utils

from research.config import AttentionConfig, ModelConfig, YarnConfig
from research.model.attention import softmax_scale
from research.model.cache import Cache
from research.model.generation import generate
from research.model.huggingface import config_to_hf
from research.model.layers import rotary_frequencies, rotary_table

reference = importlib.import_module("transformers.models.deepseek_v2.modeling_deepseek_v2")

YARNS = [
    (YarnConfig(factor=40.0), 64, 10000.0),
    (YarnConfig(factor=40.0, mscale=1.0, mscale_all_dim=1.0), 64, 10000.0),
    (YARN, 8, 100.0),
    (YarnConfig(factor=2.5, original_max_position_embeddings=7, beta_fast=3.0, beta_slow=0.1, mscale=0.3, mscale_all_dim=1.3), 6, 50.0),
    (YarnConfig(factor=1.0, original_max_position_embeddings=4, mscale=0.5), 10, 500000.0),
]


@pytest.mark.parametrize(("yarn", "width", "theta"), YARNS)
def test_yarn_is_the_reference_s(yarn, width, theta):
    config = small(yarn=yarn, rope=width)
    mapping = config_to_hf(config) | {"rope_theta": theta}
    inverse, length = modeling_rope_utils._compute_yarn_parameters(DeepseekV2Config(**mapping))
    torch.testing.assert_close(rotary_frequencies(width, theta, yarn).float(), inverse, rtol=2e-6, atol=0)
    assert float(rotary_table(torch.arange(3), width, theta, torch.float64, yarn).abs()[0, 0]) == pytest.approx(length, rel=1e-12)
    plain = config.attention.qk_head_dim**-0.5
    assert softmax_scale(config.attention) == pytest.approx(reference.yarn_apply_mscale(mapping["rope_scaling"] | {"rope_type": "yarn"}, plain))


@pytest.mark.parametrize(("yarn", "width", "theta"), YARNS)
def test_yarn_is_its_formulas(yarn, width, theta):
    """Pair by pair: how far between `beta_fast` turns over the original length and `beta_slow` turns is it?"""

    def pair(turns):  # the i of turns = L theta^(-2i / R) / (2 pi)
        return math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta) * width / 2

    first, last = max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), width - 1)
    if first == last:
        last += 0.001
    wanted = []
    for i in range(width // 2):
        ramp = min(max((i - first) / (last - first), 0.0), 1.0)
        own = theta ** (-2 * i / width)
        wanted.append((1 - ramp) * own + ramp * own / yarn.factor)
    torch.testing.assert_close(rotary_frequencies(width, theta, yarn), torch.tensor(wanted, dtype=torch.float64), rtol=1e-13, atol=0)


def test_the_paper_s_numbers_of_yarn():
    """V2 section 3.1.4: sqrt(t) = 0.0707 ln s + 1, 1.2608 at s = 40."""
    assert round(YarnConfig(factor=40.0).logit_scale, 4) == 1.5896
    frequencies, plain = rotary_frequencies(64, 10000.0, YarnConfig(factor=40.0)), rotary_frequencies(64, 10000.0)
    assert torch.equal(frequencies[:11], plain[:11])
    torch.testing.assert_close(frequencies[23:] * 40, plain[23:], rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["mla", "mha", "gqa", "mqa"])
def test_with_yarn_prefill_then_decode_is_the_full_pass_in_every_kind(kind):
    base = small(yarn=YARN)
    a = AttentionConfig(
        kind=kind, num_attention_heads=4, num_key_value_heads=2, kv_lora_rank=7, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=5, yarn=YARN
    )
    config = ModelConfig(vocab_size=41, hidden_size=12, num_hidden_layers=2, intermediate_size=9, attention=a, moe=base.moe)
    model = random_model(config, torch.float64)
    ids = torch.randint(0, 41, (2, 19), generator=torch.Generator().manual_seed(1))
    cache = Cache.allocate(config, 2, 19, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        full = model(ids).logits
        pieces = torch.cat([model(piece, cache).logits for piece in ids.split((7, 1, 3, 8), 1)], 1)
    torch.testing.assert_close(pieces, full, atol=1e-12, rtol=1e-12)
    plain = AttentionConfig(kind=kind, num_attention_heads=4, num_key_value_heads=2, qk_nope_head_dim=3, qk_rope_head_dim=4)
    assert model.layers[0].self_attn.scale == pytest.approx(softmax_scale(plain) * (0.0707 * math.log(6) + 1) ** 2)


def test_decoding_is_the_reference_s_full_pass_with_yarn():
    model = random_model(small(yarn=YARN, limit=2))
    twin, prompt = its_twin(model).eval(), torch.tensor([[5, 3, 17, 29], [1, 2, 40, 0]])
    produced = torch.stack(list(generate(model, prompt, 9)), 1)
    said = twin.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False)
    assert torch.equal(said[:, 4:], produced)
