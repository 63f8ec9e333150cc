"""The compiled kernels of attention against plain PyTorch in float64: outputs and every gradient, at odd sizes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_agreement import agree, normal
from odd_models import NEEDS_COMPILER, YARN, random_model, small
from torch.nn import functional as F

from research.model.cache import Cache
from research.model.kernels import attending, functions, steps
from research.model.layers import rotary_table, rotate

pytestmark = NEEDS_COMPILER


def softmax_reference(query, key, value, first, scale):
    """(B, H, T, a), heads of keys repeated already."""
    length = query.shape[2]
    position = torch.arange(length)
    visible = position[None, :] <= position[:, None]
    if first is not None:
        visible = visible & (position[None, None, :] >= first[:, :, None])
        visible = visible[:, None]
    return (query @ key.transpose(2, 3) * scale).masked_fill(~visible, -math.inf).softmax(-1) @ value


def absorbed_attention(query, latent, key_rope, weight, table, sizes, scale, first=None, before=None):
    """W^UK before attention to latents, and W^UV behind it."""
    up_key, up_value = weight.unflatten(0, (sizes.heads, -1)).split((sizes.nope, sizes.value), 1)
    nope, rope = query.unflatten(-1, (sizes.heads, -1)).split((sizes.nope, sizes.rope), -1)
    query = torch.cat((torch.einsum("bthn,hnc->bthc", nope, up_key), rope), -1).flatten(2)
    context = attending.attention_to_latents(query, latent, key_rope, table, sizes.heads, scale, first, before)
    return torch.einsum("bthc,hvc->bthv", context.unflatten(-1, (sizes.heads, -1)), up_value).flatten(2)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 150),
    heads=st.sampled_from([1, 2, 3, 4, 40]),
    nope=st.integers(0, 7),
    rope=st.sampled_from([2, 4, 6]),
    value=st.integers(1, 9),
    documents=st.booleans(),
    yarn=st.booleans(),
    seed=st.integers(0, 99),
)
def test_latent_attention(batch, length, heads, nope, rope, value, documents, yarn, seed):
    sizes = attending.Sizes(heads, heads, nope, rope, value)
    table = rotary_table(torch.arange(length), rope, 100.0, yarn=YARN if yarn else None)
    wide = table.to(torch.complex128)  # the same angles: at position 88 those of float64 are 5e-6 away, which is the table's and not the kernel's
    first = None
    if documents:
        starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.1
        first = (starts * torch.arange(length)).cummax(1).values.to(torch.int32)

    def exact(query, key_value, key_rope):
        query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
        query = torch.cat((query[..., :nope], rotate(query[..., nope:], wide)), -1)
        rebuilt = key_value.unflatten(-1, (heads, -1)).transpose(1, 2)
        key = torch.cat((rebuilt[..., :nope], key_rope[:, None].expand(-1, heads, -1, -1)), -1)
        return softmax_reference(query, key, rebuilt[..., nope:], first, 0.7).transpose(1, 2).flatten(2)

    shapes = [(batch, length, heads * (nope + rope)), (batch, length, heads * (nope + value)), (batch, length, rope)]
    inputs = [normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    agree(lambda q, kv, kr: attending.latent_attention(q, kv, kr, table, sizes, 0.7, first), exact, inputs)

    # The absorbed form is the same function of the latent and the weight that rebuilds keys and values.
    weight = normal(heads * (nope + value), rank := 3, seed=seed + 9)
    agree(
        lambda q, c, kr, w: absorbed_attention(q, c, kr, w, table, sizes, 0.7, first),
        lambda q, c, kr, w: exact(q, c @ w.T, kr),
        [inputs[0], normal(batch, length, rank, seed=seed + 7), inputs[2], weight],
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 130), min_size=1, max_size=3),
    new=st.integers(1, 40),
    heads=st.integers(1, 4),
    nope=st.integers(0, 5),
    value=st.integers(1, 5),
    rank=st.integers(1, 9),
    chunk=st.sampled_from([1, 2**11, 2**18]),
    seed=st.integers(0, 99),
)
def test_new_positions_over_a_cache_of_unequal_lengths(lengths, new, heads, nope, value, rank, chunk, seed):
    """All three forms, against a softmax over the rows that each position may see."""
    batch, end, sizes = len(lengths), max(lengths) + new, attending.Sizes(heads, heads, nope, 2, value)
    before = torch.tensor(lengths)
    positions = before[:, None] + torch.arange(new)
    query, weight = normal(batch, new, heads * (nope + 2), seed=seed), normal(heads * (nope + value), rank, seed=seed + 1)
    room = normal(batch, end + 5, rank + 2, seed=seed + 2)  # a cache is longer than what is filled, and its rows may have other widths
    latent, key_rope = room[:, :end, :rank], room[:, :end, rank:]
    table = rotary_table(positions.flatten(), 2, 100.0).unflatten(0, positions.shape)[:, None]
    turned = query.double().unflatten(-1, (heads, -1)).transpose(1, 2)
    turned = torch.cat((turned[..., :nope], rotate(turned[..., nope:], table.to(torch.complex128))), -1)
    rebuilt = (latent.double() @ weight.double().T).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = torch.cat((rebuilt[..., :nope], key_rope.double()[:, None].expand(-1, heads, -1, -1)), -1)
    visible = (torch.arange(end) <= positions[..., None])[:, None]
    wanted = ((turned @ key.transpose(2, 3) * 0.7).masked_fill(~visible, -math.inf).softmax(-1) @ rebuilt[..., nope:]).transpose(1, 2).flatten(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "CHUNK_BYTES", chunk)
        said = {
            "decode": steps.latent_decode(query, latent, key_rope, weight, table, positions, sizes, 0.7),
            "absorbed": absorbed_attention(query, latent, key_rope, weight, table, sizes, 0.7, before=before),
            "expanded": attending.latent_attention(query, latent @ weight.T, key_rope, table, sizes, 0.7, before=before),
        }
    for form, out in said.items():
        torch.testing.assert_close(
            out.double(), wanted, atol=3e-6 * float(wanted.abs().max()), rtol=1e-5, msg=lambda text, form=form: f"{form}: {text}"
        )


def test_decoding_copies_nothing_of_the_cache():
    """What a step allocates does not grow with what is cached."""
    sizes, weight = attending.Sizes(2, 2, 4, 2, 3), normal(14, 8)
    table = rotary_table(torch.tensor([499]), 2, 100.0)
    allocated = []
    for room in (600, 6000):
        latent, key_rope = torch.zeros(2, room, 8)[:, : room - 100], torch.zeros(2, room, 2)[:, : room - 100]
        positions = torch.tensor([[room - 101]] * 2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            steps.latent_decode(normal(2, 1, 12), latent, key_rope, weight, table, positions, sizes, 1.0)
        allocated.append(sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()))
    assert allocated[1] - allocated[0] <= 4 * 32 * steps.CHUNK_BYTES // 40, allocated  # the scores of one chunk, at most


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 150),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    nope=st.integers(0, 5),
    value=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_grouped_attention(batch, length, groups, per_group, nope, value, seed):
    heads, width = groups * per_group, nope + 4
    sizes = attending.Sizes(heads, groups, nope, 4, value)
    table = rotary_table(torch.arange(length), 4, 100.0)
    wide = table.to(torch.complex128)

    def exact(query, key, value):
        def turned(x, count):
            x = x.unflatten(-1, (count, width)).transpose(1, 2)
            return torch.cat((x[..., :nope], rotate(x[..., nope:], wide)), -1)

        key = turned(key, groups).repeat_interleave(per_group, 1)
        value = value.unflatten(-1, (groups, -1)).transpose(1, 2).repeat_interleave(per_group, 1)
        return softmax_reference(turned(query, heads), key, value, None, 0.5).transpose(1, 2).flatten(2)

    inputs = [normal(batch, length, n, seed=seed + i) for i, n in enumerate((heads * width, groups * width, groups * value))]
    agree(lambda q, k, v: attending.grouped_attention(q, k, v, table, sizes, 0.5), exact, inputs)


def test_gradients_and_inputs_may_lie_in_any_order():
    """An expanded or a transposed gradient, sequences of one position, rows whose stride says nothing."""
    sizes, table = attending.Sizes(3, 3, 8, 4, 8), rotary_table(torch.arange(70), 4, 100.0)
    latent, weight = normal(2, 70, 5, seed=5), normal(48, 5, seed=6)
    forms = {
        "expanded": (
            lambda *x: attending.latent_attention(*x, table, sizes, 0.3),
            [normal(2, 70, 36), normal(2, 70, 48, seed=1), normal(2, 70, 4, seed=2)],
        ),
        "grouped": (
            lambda *x: attending.grouped_attention(*x, table, sizes, 0.3),
            [normal(2, 70, 36), normal(2, 70, 36, seed=1), normal(2, 70, 24, seed=2)],
        ),
        "absorbed": (lambda *x: absorbed_attention(*x, table, sizes, 0.3), [normal(2, 70, 36), latent, normal(2, 70, 4, seed=2), weight]),
    }
    whole = normal(2, 24, 70, seed=7).transpose(1, 2)
    for name, (form, inputs) in forms.items():
        given = [x.requires_grad_() for x in inputs]
        for gradient in (torch.ones(()).expand(2, 70, 24), whole):
            said = torch.autograd.grad(form(*given), given, gradient)
            wanted = torch.autograd.grad(form(*given), given, gradient.contiguous())
            assert all(torch.equal(a, b) for a, b in zip(said, wanted, strict=True)), name
    x = normal(1, 6, 8).transpose(0, 1)
    torch.testing.assert_close(functions.normalise(x, torch.ones(8), 1e-6), F.rms_norm(x, (8,), torch.ones(8), 1e-6))
    one = normal(1, 3, 36).transpose(0, 1)  # three sequences of one position, with the strides of one of three
    inputs = [normal(1, 3, 5, seed=5).transpose(0, 1), normal(1, 3, 4, seed=2).transpose(0, 1)]
    said = absorbed_attention(one, *inputs, weight, table[:1], sizes, 0.3)
    assert torch.equal(said, absorbed_attention(one.clone(memory_format=torch.contiguous_format), *inputs, weight, table[:1], sizes, 0.3))


def test_padding_beyond_the_cache_reads_nothing_there():
    """Positions after the last row belong to padding: what lies in memory behind the rows must not reach a real one."""
    sizes, weight = attending.Sizes(2, 2, 4, 2, 3), normal(14, 8)
    room = torch.full((2, 12, 10), math.nan)
    room[:, :8] = normal(2, 8, 10, seed=1)
    latent, key_rope = room[:, :8, :8], room[:, :8, 8:]
    positions = torch.tensor([[6, 7, 8, 9], [5, 6, 7, 8]])
    table = rotary_table(positions.flatten(), 2, 100.0).unflatten(0, positions.shape)[:, None]
    out = steps.latent_decode(normal(2, 4, 12), latent, key_rope, weight, table, positions, sizes, 1.0)
    assert not out[0, :2].isnan().any()
    assert not out[1, :3].isnan().any()


def test_behind_a_cache_gradients_are_left_to_torch():
    model = random_model(small())
    for new in (3, 12):
        cache = Cache.allocate(model.config, 1, 30, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            model(torch.zeros(1, 9, dtype=torch.int64), cache)
        model(torch.ones(1, new, dtype=torch.int64), cache).logits.sum().backward()
    assert all(p.grad is not None for p in model.layers[-1].self_attn.parameters())


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4])
def test_scores_of_any_size_give_probabilities(scale):
    """The exponential from 1 down to what float32 holds; the largest score of a row may lie anywhere."""
    sizes = attending.Sizes(1, 1, 4, 2, 3)
    table = rotary_table(torch.arange(90), 2, 100.0)
    key_value = torch.cat((normal(1, 90, 4), torch.ones(1, 90, 3)), -1)
    out = attending.latent_attention(normal(1, 90, 6, seed=1) * scale, key_value, normal(1, 90, 2, seed=2), table, sizes, 1.0)
    torch.testing.assert_close(out, torch.ones(1, 90, 3), atol=1e-5, rtol=0)
