"""The cache: codes against a literal loop, widths against the closed form, unequal lengths against each prompt alone."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from research.accounting import KV_BITS
from research.config import AttentionConfig, ModelConfig, MoEConfig
from research.model import attention
from research.model.attention import MultiHeadLatentAttention
from research.model.cache import Cache
from research.model.generation import generate
from research.model.quantise import GROUPS, dequantise, pack, packed_bytes, quantise, unpack
from research.model.transformer import Transformer

KINDS = ["mla", "mha", "gqa", "mqa"]
NARROW = [8, 6, 4]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def small(kind="mla", **moe):
    """Two layers of odd widths, the second a MoE."""
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
            q_lora_rank=5,
            kv_lora_rank=7,
            qk_nope_head_dim=3,
            qk_rope_head_dim=4,
            v_head_dim=5,
        ),
        moe=MoEConfig(
            n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=6, n_shared_experts=1, expert_devices=4, device_limit=2, **moe
        ),
    )


def model_of(kind, dtype=torch.float32):
    return Transformer(small(kind, capacity_factor=1.0)).initialise(0).to(dtype).eval()


def tokens(*shape, seed=1):
    return torch.randint(0, 37, shape, generator=torch.Generator().manual_seed(seed))


# ---- codes and bytes


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NARROW), st.integers(1, 13), st.integers(0, 2**32))
def test_packed_codes_are_one_number_in_bits_lowest_first(bits, width, seed):
    codes = torch.randint(0, 2**bits, (3, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    for row, got in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << (bits * i) for i, code in enumerate(row))
        assert bytes(got) == number.to_bytes(packed_bytes(width, bits), "little")
    assert torch.equal(unpack(packed, bits, width), codes)


def test_groups_are_whole_bytes():
    assert {bits: values * bits == size * 8 for bits, (values, size) in GROUPS.items()} == dict.fromkeys(NARROW, True)
    assert [packed_bytes(width, 6) for width in (1, 4, 5, 512)] == [3, 3, 6, 384]


def bfloat16_towards(value: Fraction, up: bool) -> Fraction:
    """The nearest bfloat16 at or beyond `value`, by exact arithmetic: 8 significant bits, exponents down to -133."""
    if value == 0:
        return value
    exponent = math.frexp(abs(float(value)))[1] - 8
    unit = Fraction(2) ** max(exponent, -133)
    return (math.ceil(value / unit) if up else math.floor(value / unit)) * unit


def literal(vector, bits):
    """Codes, step and offset of one float64 vector in fractions."""
    exact = [Fraction(v) for v in vector]
    offset = bfloat16_towards(min(exact), up=False)
    step = bfloat16_towards((max(exact) - offset) / (2**bits - 1), up=True)
    return [round((v - offset) / step) if step else 0 for v in exact], step, offset


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NARROW), hnp.arrays("float64", st.integers(1, 11), elements=st.floats(-1000, 1000, width=16)))
def test_quantise_is_the_literal_loop(bits, vector):
    codes, grid = quantise(torch.from_numpy(vector), bits)
    want, step, offset = literal(vector.tolist(), bits)
    assert grid.double().tolist() == [float(step), float(offset)]
    # A quotient within rounding of one half may go to either side.
    for got, expected, value in zip(codes.tolist(), want, vector.tolist(), strict=True):
        assert got == expected or abs(abs((Fraction(value) - offset) / step - expected) - Fraction(1, 2)) < Fraction(1, 10**9)
    back = [float(step * code + offset) for code in codes.tolist()]
    assert dequantise(codes, grid, torch.float64).tolist() == pytest.approx(back, rel=1e-12, abs=1e-300)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(NARROW),
    st.sampled_from(["float32", "float64"]),
    st.integers(-30, 30),
    st.data(),
)
def test_every_element_comes_back_within_half_a_step(bits, dtype, magnitude, data):
    width = data.draw(st.integers(1, 19))
    vector = data.draw(hnp.arrays(dtype, (2, width), elements=st.floats(-1, 1, width=32))) * 10.0**magnitude
    x = torch.from_numpy(vector.astype(dtype))
    codes, grid = quantise(x, bits)
    back = dequantise(unpack(pack(codes, bits), bits, width), grid, x.dtype)
    step, largest = grid[:, :1].to(x.dtype), x.abs().amax(-1, keepdim=True)
    rounding = 4 * torch.finfo(x.dtype).eps * largest + 1e-37
    assert (back - x).abs().sub(step / 2 + rounding).max() <= 0
    # The step is not wider than two roundings to 8 significant bits make it.
    spread = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    assert step.le((spread + largest * 2**-7) / (2**bits - 1) * (1 + 2**-7) + 1e-37).all()


def test_a_vector_of_equal_elements_and_one_of_zeros_come_back():
    for bits in NARROW:
        codes, grid = quantise(torch.tensor([[0.0, 0.0, 0.0], [1.5, 1.5, 1.5]]), bits)
        assert dequantise(codes, grid, torch.float32).tolist() == [[0.0] * 3, [1.5] * 3]


# ---- what the cache holds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, *KV_BITS])
def test_rows_come_back_as_their_width_keeps_them_whatever_the_pieces(kind, bits):
    config = small(kind)
    cache = Cache.allocate(config, 2, 6, dtype=torch.float32, device="cpu", bits=bits)
    shapes = [(2, 6, 7), (2, 6, 4)] if kind == "mla" else [(2, config.attention.key_value_heads, 6, width) for width in (7, 5)]
    given_ = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in shapes]
    for piece in (slice(0, 3), slice(3, 4), slice(4, 6)):
        place = cache.place(piece.stop - piece.start, None, torch.device("cpu"))
        got = cache.layers[0].append(place, *(x[..., piece, :] for x in given_))
        cache.advance(piece.stop - piece.start, None)
    for x, kept in zip(given_, got, strict=True):
        if bits is None:
            want = x
        elif bits == 16:
            want = x.bfloat16().float()
        else:
            want = dequantise(*quantise(x, bits), torch.float32)
        assert torch.equal(kept, want)
    assert cache.lengths.tolist() == [6, 6]


def test_storage_is_allocated_once():
    model = model_of("mla")
    cache = Cache.allocate(model.config, 1, 9, dtype=torch.float32, device="cpu", bits=6)
    before = [layer.first.packed.data_ptr() for layer in cache.layers]
    with torch.no_grad():
        for piece in tokens(1, 9).split(3, 1):
            model(piece, cache)
    assert [layer.first.packed.data_ptr() for layer in cache.layers] == before
    with pytest.raises(ValueError, match="cache of 9 positions cannot take 10"):
        model(tokens(1, 1), cache)


def test_a_width_that_no_cache_has_is_named():
    with pytest.raises(ValueError, match="bits=5: a cache has 16, 8, 6, 4 bits"):
        Cache.allocate(small(), 1, 1, dtype=torch.float32, device="cpu", bits=5)


# ---- decoding out of a narrow cache


def fake_quantised(monkeypatch, bits):
    """Let attention without a cache see keys and values (latents and rotary keys) that were quantised and dequantised."""

    def through(x):
        return x.bfloat16().to(x.dtype) if bits == 16 else dequantise(*quantise(x, bits), x.dtype)

    latent, softmax = MultiHeadLatentAttention._latent, attention.softmax_attention

    def grouped(query, key, value, visible=None, *, scale):
        return softmax(query, through(key), through(value), visible, scale=scale)

    monkeypatch.setattr(MultiHeadLatentAttention, "_latent", lambda *a: tuple(through(x) for x in latent(*a)))
    return grouped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", KV_BITS)
def test_one_pass_through_a_packed_cache_is_decoding_token_by_token(kind, bits, monkeypatch):
    """In float64, where no rounding decides to which side a code falls.  Also equal: a pass without a cache over quantised values."""
    model, ids = model_of(kind, torch.float64), tokens(2, 9)

    def cache():
        return Cache.allocate(model.config, 2, 9, dtype=torch.float64, device="cpu", bits=bits)

    with torch.no_grad():
        full, at_once, packed = model(ids).logits, model(ids, cache()).logits, cache()
        decoded = torch.cat([model(ids[:, t : t + 1], packed).logits for t in range(9)], 1)
        grouped = fake_quantised(monkeypatch, bits)
        if kind != "mla":
            monkeypatch.setattr(attention, "softmax_attention", grouped)
        faked = model(ids).logits
    torch.testing.assert_close(decoded, at_once, atol=1e-10, rtol=0)
    torch.testing.assert_close(faked, at_once, atol=1e-10, rtol=0)
    assert 1e-6 < (at_once - full).abs().max() < 3


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bits_are_further_from_full_precision(kind):
    """About four times as far for two bits less, as the steps are: without experts, whose choice may jump at any width."""
    model, ids = Transformer(replace(small(kind), moe=None)).initialise(0).eval(), tokens(4, 24)
    with torch.no_grad():
        full = model(ids).logits
        error = [
            float((model(ids, Cache.allocate(model.config, 4, 24, dtype=torch.float32, device="cpu", bits=b)).logits - full).square().mean().sqrt())
            for b in NARROW
        ]
    assert error[0] * 2 < error[1] < error[0] * 6
    assert error[1] * 2 < error[2] < error[1] * 6


# ---- prompts of unequal length


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 6])
def test_each_prompt_of_an_uneven_batch_has_the_logits_that_it_has_alone(kind, bits):
    """Three steps whose real tokens differ by row (none at all, too), in float64 so that no code falls to the other side."""
    model = model_of(kind, torch.float64)
    counts = torch.tensor([[5, 1, 3], [2, 3, 0], [0, 2, 4]])
    rows = [tokens(int(n), seed=i) for i, n in enumerate(counts.sum(0))]
    cache = Cache.allocate(model.config, 3, 9, dtype=torch.float64, device="cpu", bits=bits)
    got, start = [[], [], []], torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        for new in counts:
            padded = torch.full((3, int(new.max())), 36)
            for b, (s, n) in enumerate(zip(start.tolist(), new.tolist(), strict=True)):
                padded[b, :n] = rows[b][s : s + n]
            logits = model(padded, cache, new_B=new).logits
            for b, n in enumerate(new.tolist()):
                got[b].append(logits[b, :n])
            start = start + new
            assert cache.lengths.tolist() == start.tolist()
        for row, pieces in zip(rows, got, strict=True):
            alone = Cache.allocate(model.config, 1, len(row), dtype=torch.float64, device="cpu", bits=bits)
            torch.testing.assert_close(torch.cat(pieces), model(row[None], alone).logits[0], atol=1e-10, rtol=0)
            if bits is None:
                torch.testing.assert_close(torch.cat(pieces), model(row[None]).logits[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 0.9)])
def test_a_prompts_text_does_not_depend_on_the_other_prompts(kind, temperature, top_p):
    model = model_of(kind)
    prompts = [tokens(n, seed=n) for n in (6, 1, 11, 6)]
    together = torch.stack(list(generate(model, prompts, 12, temperature=temperature, top_p=top_p, seed=5)), 1)
    for prompt, row in zip(prompts, together, strict=True):
        alone = torch.stack(list(generate(model, [prompt], 12, temperature=temperature, top_p=top_p, seed=5)), 1)
        assert torch.equal(alone[0], row)
    assert torch.equal(together[0], together[3])
    if temperature:
        other = torch.stack(list(generate(model, prompts, 12, temperature=temperature, top_p=top_p, seed=6)), 1)
        assert not torch.equal(other, together)


def test_prefill_and_decoding_of_an_uneven_batch_in_float32_is_within_1e_5():
    model = model_of("mla")
    rows, lengths = [tokens(n, seed=n) for n in (3, 10)], torch.tensor([3, 10])
    cache = Cache.allocate(model.config, 2, 13, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        first = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), cache, new_B=lengths).logits
        then = model(tokens(2, 3, seed=9), cache).logits
        for b, row in enumerate(rows):
            whole = model(torch.cat((row, tokens(2, 3, seed=9)[b]))[None]).logits[0]
            torch.testing.assert_close(torch.cat((first[b, : len(row)], then[b])), whole, atol=1e-5, rtol=0)


def test_generate_takes_no_empty_prompt():
    with pytest.raises(ValueError, match="each must hold a token"):
        list(generate(model_of("mla"), [tokens(3), tokens(0)], 2))


def test_draws_have_the_model_s_frequencies_and_stay_in_the_nucleus():
    """Chi-square of 4000 draws from known probabilities; with top_p the tail is never drawn."""
    from research.model.generation import _choose

    probability = torch.tensor([0.5, 0.02, 0.2, 0.25, 0.03])
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    logits = probability.log().expand(4000, -1)
    counts = torch.bincount(_choose(logits, 1.0, 1.0, generators), minlength=5)
    assert float(((counts - 4000 * probability) ** 2 / (4000 * probability)).sum()) < 18.5  # 99.9 % quantile, 4 degrees of freedom
    inside = torch.bincount(_choose(logits, 1.0, 0.7, generators), minlength=5)
    assert (inside > 0).tolist() == [True, False, False, True, False]
    assert _choose(logits[:1], 1.0, 0.0, generators[:1]).tolist() == [0]
