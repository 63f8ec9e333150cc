"""The loss in chunks against the loss of whole logits: value, both gradients, and what is never allocated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_models import random_model, small
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from research.memory import loss_chunk_tokens
from research.model.loss import chunked_language_loss, token_nats
from research.model.transformer import language_loss


def case(batch, length, width, vocab, dtype=torch.float64, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator, dtype=torch.float64) * spread
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (batch, length), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def whole(hidden, weight, targets):
    return language_loss(F.linear(hidden, weight), targets)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def near(found, expected, tolerance):
    """Every element within `tolerance` of the largest one."""
    return (found - expected).abs().max() <= tolerance * expected.abs().max()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 23),
    width=st.integers(1, 19),
    vocab=st.integers(1, 67),
    chunk=st.one_of(st.none(), st.integers(1, 120)),
    seed=st.integers(0, 2**20),
)
def test_value_and_gradients_are_those_of_whole_logits(batch, length, width, vocab, chunk, seed):
    inputs = case(batch, length, width, vocab, seed=seed)
    expected, found = whole(*inputs), chunked_language_loss(*inputs, chunk)
    assert abs(found - expected) <= 1e-12 * max(1, expected)
    for mine, theirs in zip(gradients(found * 0.25, *inputs[:2]), gradients(expected * 0.25, *inputs[:2]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    each = F.cross_entropy(F.linear(*inputs[:2]).flatten(0, 1), inputs[2].flatten(), reduction="none").view(batch, length)
    torch.testing.assert_close(token_nats(*inputs, chunk), each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 100])
def test_float32_is_as_near_to_float64_as_whole_logits(chunk):
    inputs = case(3, 111, 48, 1003, torch.float32, spread=0.5)
    exact = [x.detach().double().requires_grad_() for x in inputs[:2]]
    expected, found = whole(*exact, inputs[2]), chunked_language_loss(*inputs, chunk)
    assert abs(found.item() - expected.item()) <= 1e-6 * expected.item()
    for mine, theirs in zip(gradients(found, *inputs[:2]), gradients(expected, *exact), strict=True):
        assert near(mine.double(), theirs, 2e-6)


def test_logits_far_apart_neither_overflow_nor_vanish():
    hidden, weight, targets = case(2, 9, 4, 11, torch.float32, spread=300.0)
    found, exact = chunked_language_loss(hidden, weight, targets, 5), whole(hidden.double(), weight.double(), targets)
    assert found.item() > 500
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_under_autocast_products_are_bfloat16_and_sums_are_not():
    hidden, weight, targets = case(2, 80, 32, 301, torch.float32, spread=0.5)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = gradients(whole(*exact, targets), *exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = chunked_language_loss(hidden, weight, targets, 33), language_loss(F.linear(hidden, weight), targets)
    assert found.dtype == torch.float32
    assert abs(found.item() - plain.item()) <= 1e-6 * plain.item()  # the same bfloat16 logits
    for mine, theirs, true in zip(gradients(found, hidden, weight), gradients(plain, hidden, weight), expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - true).norm() <= 1.1 * (theirs.double() - true).norm()  # no worse than autocast's own gradients
    assert token_nats(hidden, weight, targets).mean() != pytest.approx(found.item(), rel=1e-7)  # it did compute in bfloat16


class _Sizes(TorchDispatchMode):
    """The largest tensor that any operation gave back, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def test_whole_logits_are_never_allocated():
    inputs = case(4, 250, 24, 2000, torch.float32)
    with _Sizes() as chunked:
        chunked_language_loss(*inputs, 64).backward()
        token_nats(*inputs, 64)
    with _Sizes() as by_default:
        chunked_language_loss(*inputs).backward()
    with _Sizes() as unchunked:
        whole(*inputs).backward()
    assert chunked.largest == 64 * 2000
    assert by_default.largest == loss_chunk_tokens(2000) * 2000 < 4 * 250 * 2000
    assert unchunked.largest == 4 * 250 * 2000


def test_gradients_add_up_over_micro_batches_and_uses():
    hidden, weight, targets = case(4, 31, 13, 53)
    whole(hidden, weight, targets).backward()
    expected = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    for rows in ([0, 1], [2, 3]):
        (chunked_language_loss(hidden[rows], weight, targets[rows], 17) * 0.5).backward()
    torch.testing.assert_close([hidden.grad, weight.grad], expected, rtol=1e-12, atol=1e-12)
    hidden.grad = weight.grad = None
    loss = chunked_language_loss(hidden, weight, targets, 17)
    (loss + 2 * loss).backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([hidden.grad, weight.grad], [4 * x for x in expected], rtol=1e-12, atol=1e-12)


def test_only_what_asks_for_a_gradient_gets_one():
    hidden, weight, targets = case(2, 7, 5, 11)
    value = whole(hidden, weight, targets)
    for frozen, free in ((hidden, weight), (weight, hidden)):
        frozen.requires_grad_(False)
        chunked_language_loss(hidden, weight, targets).backward()
        assert frozen.grad is None
        assert free.grad is not None
        frozen.requires_grad_(True)
        free.grad = None
    with torch.no_grad():
        found = chunked_language_loss(hidden, weight, targets, 4)
    assert not found.requires_grad
    torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_learns_from_it_as_from_its_logits(tied):
    model = random_model(small(tied=tied), torch.float64)
    ids = torch.randint(41, (2, 17), generator=torch.Generator().manual_seed(1))
    found = []
    for loss in (
        lambda: language_loss(model(ids[:, :-1]).logits, ids[:, 1:]),
        lambda: chunked_language_loss(model.hidden(ids[:, :-1])[0], model.lm_head.weight, ids[:, 1:], 5),
    ):
        model.zero_grad(set_to_none=True)
        loss().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-13)
    assert ("lm_head.weight" in found[0]) != tied
