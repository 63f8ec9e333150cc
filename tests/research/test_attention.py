"""Attention against the equations written out, and its forms against each other."""

import math

import pytest
import torch

from research.config import AttentionConfig, ModelConfig
from research.model.attention import MultiHeadLatentAttention
from research.model.cache import Cache
from research.model.generation import generate
from research.model.layers import rotary_table
from research.model.transformer import Transformer
from research.presets import preset


def small(kind="mla", q_lora_rank=5):
    return ModelConfig(
        vocab_size=37,
        hidden_size=11,
        num_hidden_layers=2,
        intermediate_size=13,
        initializer_range=0.3,
        attention=AttentionConfig(
            kind=kind,
            num_attention_heads=4,
            num_key_value_heads=2,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=7,
            qk_nope_head_dim=3,
            qk_rope_head_dim=4,
            v_head_dim=5,
        ),
    )


def literal_mla(layer, x):
    """V2 appendix C, equations 37 to 47, one position and one head at a time."""
    a = layer.config
    weights = dict(layer.named_parameters())

    def norm(v, gain):
        return v / torch.sqrt((v * v).mean() + 1e-6) * gain

    def rope(v, position):
        out = v.clone()
        for i in range(len(v) // 2):
            angle = position * a.rope_theta ** (-2 * i / len(v))
            re, im = v[2 * i], v[2 * i + 1]
            out[2 * i] = re * math.cos(angle) - im * math.sin(angle)
            out[2 * i + 1] = re * math.sin(angle) + im * math.cos(angle)
        return out

    query_width, value_rows = a.qk_head_dim, a.qk_nope_head_dim + a.v_head_dim
    latents, rotary_keys, rows = [], [], []
    for t in range(x.shape[0]):
        compressed = weights["kv_a_proj_with_mqa.weight"] @ x[t]
        latents.append(norm(compressed[: a.kv_lora_rank], weights["kv_a_layernorm.weight"]))
        rotary_keys.append(rope(compressed[a.kv_lora_rank :], t))
        if a.q_lora_rank is None:
            query = weights["q_proj.weight"] @ x[t]
        else:
            query = weights["q_b_proj.weight"] @ norm(weights["q_a_proj.weight"] @ x[t], weights["q_a_layernorm.weight"])
        heads = []
        for h in range(a.num_attention_heads):
            q = query[h * query_width : (h + 1) * query_width]
            q = torch.cat((q[: a.qk_nope_head_dim], rope(q[a.qk_nope_head_dim :], t)))
            up = weights["kv_b_proj.weight"][h * value_rows : (h + 1) * value_rows]
            scores, values = [], []
            for j in range(t + 1):
                key = torch.cat((up[: a.qk_nope_head_dim] @ latents[j], rotary_keys[j]))
                scores.append(q @ key / math.sqrt(query_width))
                values.append(up[a.qk_nope_head_dim :] @ latents[j])
            probability = torch.stack(scores).softmax(0)
            heads.append(sum(p * v for p, v in zip(probability, values, strict=True)))
        rows.append(weights["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("q_lora_rank", [None, 5])
def test_mla_is_the_equations(q_lora_rank):
    config = small(q_lora_rank=q_lora_rank)
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(config).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(6, config.hidden_size, dtype=torch.float64)
    table = rotary_table(torch.arange(6), 4, 10000.0, torch.float64)
    torch.testing.assert_close(layer(x[None], table)[0], literal_mla(layer, x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("q_lora_rank", [None, 5])
def test_absorbed_and_expanded_are_one_function(q_lora_rank):
    """Causal, and with fewer queries than positions that see a ragged part of them."""
    layer = MultiHeadLatentAttention(small(q_lora_rank=q_lora_rank)).double()
    torch.manual_seed(1)
    nope, rope, latent, key = (torch.randn(size, dtype=torch.float64) for size in ((3, 4, 6, 3), (3, 4, 6, 4), (3, 6, 7), (3, 6, 4)))
    torch.testing.assert_close(layer.absorbed(nope, rope, latent, key), layer.expanded(nope, rope, latent, key), atol=1e-12, rtol=0)
    visible = torch.rand(3, 1, 2, 6) < 0.5
    visible[..., 0] = True
    few = nope[:, :, :2], rope[:, :, :2], latent, key, visible
    torch.testing.assert_close(layer.absorbed(*few), layer.expanded(*few), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["mla", "mha", "gqa", "mqa"])
def test_prefill_then_decode_is_the_full_pass(kind):
    model = Transformer(small(kind)).initialise(0)
    ids = torch.randint(0, 37, (3, 17), generator=torch.Generator().manual_seed(1))
    cache = Cache.allocate(model.config, 3, 17, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        full = model(ids).logits
        pieces = [model(piece, cache).logits for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:9], ids[:, 9:17])]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-5, rtol=0)


def test_later_tokens_never_change_earlier_logits():
    model = Transformer(preset("deepseek-v2-nano")).initialise(0)
    ids = torch.randint(0, 1024, (1, 12), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 1024
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :7].argmax(-1), after[:, :7].argmax(-1))
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-5, rtol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


def test_greedy_generation_is_the_argmax_of_the_full_pass():
    model = Transformer(preset("deepseek-v2-nano")).initialise(3)
    prompt = torch.randint(0, 1024, (2, 5), generator=torch.Generator().manual_seed(4))
    produced = torch.stack(list(generate(model, prompt, 6)), 1)
    ids = prompt
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(ids[:, 5:], produced)
    sampled = [torch.stack(list(generate(model, prompt, 6, temperature=1.0, top_p=0.9, seed=7)), 1) for _ in range(2)]
    assert torch.equal(*sampled)
