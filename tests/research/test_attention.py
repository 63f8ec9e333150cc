"""Attention against the equations written out, and its forms against each other."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from research.config import AttentionConfig, ModelConfig, YarnConfig
from research.model.attention import GroupedAttention, MultiHeadLatentAttention
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


def turned(v, position, a):
    """RoPE on one vector, pair by pair; with YaRN slow pairs turn `factor` times slower (V2 section 3.1.4)."""
    out = v.clone()
    for i in range(len(v) // 2):
        angle = position * a.rope_theta ** (-2 * i / len(v))
        length = 1.0
        if a.yarn is not None:
            angle *= 1 - stretched(i, len(v), a) * (1 - 1 / a.yarn.factor)
            length = (0.1 * a.yarn.mscale * math.log(a.yarn.factor) + 1) / (0.1 * a.yarn.mscale_all_dim * math.log(a.yarn.factor) + 1)
        re, im = v[2 * i], v[2 * i + 1]
        out[2 * i] = length * (re * math.cos(angle) - im * math.sin(angle))
        out[2 * i + 1] = length * (re * math.sin(angle) + im * math.cos(angle))
    return out


def stretched(i, width, a):
    """0 for pairs that turn beta_fast times over the original length, 1 for those that turn beta_slow times, straight between."""
    ends = [
        width * math.log(a.yarn.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(a.rope_theta))
        for turns in (a.yarn.beta_fast, a.yarn.beta_slow)
    ]
    low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
    return min(max((i - low) / ((high - low) or 0.001), 0.0), 1.0)


def one_head(queries, keys, values, a):
    """softmax_j<=t(q_t . k_j / sqrt(N + R)) v_j, one pair of positions at a time; YaRN lengthens the logits by t."""
    scale = (0.1 * a.yarn.mscale_all_dim * math.log(a.yarn.factor) + 1) ** 2 if a.yarn is not None else 1.0
    rows = []
    for t in range(len(queries)):
        weights = [math.exp(scale * float(queries[t] @ keys[j]) / math.sqrt(a.qk_head_dim)) for j in range(t + 1)]
        rows.append(sum(w / sum(weights) * values[j] for j, w in enumerate(weights)))
    return rows


def literal_mla(layer, x):
    """V2 appendix C, equations 37 to 47, one position and one head at a time."""
    a, weights = layer.config, dict(layer.named_parameters())

    def norm(v, gain):
        return v / torch.sqrt((v * v).mean() + 1e-6) * gain

    def with_rope(v, position):
        return torch.cat((v[: a.qk_nope_head_dim], turned(v[a.qk_nope_head_dim :], position, a)))

    latents, rotary, queries = [], [], []
    for t in range(len(x)):
        compressed = weights["kv_a_proj_with_mqa.weight"] @ x[t]
        latents.append(norm(compressed[: a.kv_lora_rank], weights["kv_a_layernorm.weight"]))
        rotary.append(turned(compressed[a.kv_lora_rank :], t, a))
        if a.q_lora_rank is None:
            queries.append(weights["q_proj.weight"] @ x[t])
        else:
            queries.append(weights["q_b_proj.weight"] @ norm(weights["q_a_proj.weight"] @ x[t], weights["q_a_layernorm.weight"]))
    heads, width, up_rows = [], a.qk_head_dim, a.qk_nope_head_dim + a.v_head_dim
    for h in range(a.num_attention_heads):
        up = weights["kv_b_proj.weight"][h * up_rows : (h + 1) * up_rows]
        query = [with_rope(q[h * width : (h + 1) * width], t) for t, q in enumerate(queries)]
        key = [torch.cat((up[: a.qk_nope_head_dim] @ c, r)) for c, r in zip(latents, rotary, strict=True)]
        heads.append(one_head(query, key, [up[a.qk_nope_head_dim :] @ c for c in latents], a))
    return torch.stack([weights["o_proj.weight"] @ torch.cat([head[t] for head in heads]) for t in range(len(x))])


def literal_grouped(layer, x):
    """Multi-head, grouped-query and multi-query attention: head h reads the keys and values of group h groups / H."""
    a, weights = layer.config, dict(layer.named_parameters())
    groups = {"mha": a.num_attention_heads, "gqa": a.num_key_value_heads, "mqa": 1}[a.kind]

    def rows(name, head, width):
        return [weights[f"{name}.weight"][head * width : (head + 1) * width] @ v for v in x]

    def with_rope(vectors):
        return [torch.cat((v[: a.qk_nope_head_dim], turned(v[a.qk_nope_head_dim :], t, a))) for t, v in enumerate(vectors)]

    heads = []
    for h in range(a.num_attention_heads):
        group = h * groups // a.num_attention_heads
        query, key = with_rope(rows("q_proj", h, a.qk_head_dim)), with_rope(rows("k_proj", group, a.qk_head_dim))
        heads.append(one_head(query, key, rows("v_proj", group, a.v_head_dim), a))
    return torch.stack([weights["o_proj.weight"] @ torch.cat([head[t] for head in heads]) for t in range(len(x))])


@st.composite
def attentions(draw):
    groups = draw(st.integers(1, 3))
    yarn = st.builds(
        YarnConfig,
        factor=st.sampled_from([1.0, 2.5, 40.0]),
        original_max_position_embeddings=st.sampled_from([4, 31]),
        beta_fast=st.sampled_from([2.0, 32.0]),
        beta_slow=st.sampled_from([0.2, 1.0]),
        mscale=st.sampled_from([0.707, 1.0]),
        mscale_all_dim=st.sampled_from([0.3, 0.707]),
    )
    return AttentionConfig(
        kind=draw(st.sampled_from(["mla", "mha", "gqa", "mqa"])),
        num_attention_heads=groups * draw(st.integers(1, 2)),
        num_key_value_heads=groups,
        q_lora_rank=draw(st.sampled_from([None, 3, 5])),
        kv_lora_rank=draw(st.integers(1, 7)),
        qk_nope_head_dim=draw(st.integers(0, 5)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 7)),
        rope_theta=draw(st.sampled_from([10.0, 10000.0])),
        yarn=draw(st.one_of(st.none(), yarn)),
    )


@settings(max_examples=60, deadline=None)
@given(attentions(), st.integers(1, 7), st.integers(0, 10**6))
def test_attention_is_the_equations_at_odd_sizes(attention, positions, seed):
    config = replace(small(), attention=attention)
    layer = (MultiHeadLatentAttention if attention.kind == "mla" else GroupedAttention)(config).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(positions, config.hidden_size, generator=generator, dtype=torch.float64)
    table = rotary_table(torch.arange(positions), attention.qk_rope_head_dim, attention.rope_theta, torch.float64, attention.yarn)
    expected = (literal_mla if attention.kind == "mla" else literal_grouped)(layer, x)
    torch.testing.assert_close(layer(x[None], table)[0], expected, atol=1e-11, rtol=1e-11)


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


@pytest.mark.parametrize("q_lora_rank", [None, 5])
@pytest.mark.parametrize("pieces", [(30,), (12, 18), (9, 1, 20), (1, 29)])
def test_a_narrow_latent_in_pieces_is_the_equations(q_lora_rank, pieces):
    """2 C <= N + V: with the kernels W^UK and W^UV are multiplied into the projections, in training and behind a cache; float64 takes neither."""
    config = small(q_lora_rank=q_lora_rank)
    config = replace(config, attention=replace(config.attention, kv_lora_rank=4))
    model, ids = Transformer(config).initialise(0), torch.randint(0, 37, (2, 30), generator=torch.Generator().manual_seed(1))
    wanted = Transformer(config).initialise(0).double()(ids).logits
    torch.testing.assert_close(model(ids).logits.double(), wanted, atol=1e-5, rtol=0)
    with torch.no_grad():
        cache = Cache.allocate(config, 2, 40, dtype=torch.float32, device="cpu")
        said = torch.cat([model(piece, cache).logits for piece in ids.split(pieces, 1)], 1)
    torch.testing.assert_close(said.double(), wanted, atol=1e-5, rtol=0)


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
