"""When a kernel says the same as its plain form: shared by the tests of all of them."""

import math

import torch

from research.model.kernels import native


def agree(fast, exact, inputs, seed=0):
    """`fast` of float32 inputs and `exact` of the same in float64: values and gradients within float32's rounding.

    A gradient that vanishes by cancellation (one position attends to itself) is all rounding, and is measured against the whole.  What
    `exact` itself loses in float32, as with scores so large that their exponentials have few digits left, `fast` may lose twice.
    """
    assert native.usable(*inputs)
    wanted, wide = _with_gradients(exact, [x.double() for x in inputs], seed)
    said, ours = _with_gradients(fast, inputs, seed)
    _, plain = _with_gradients(exact, inputs, seed)
    torch.testing.assert_close(said.double(), wanted, atol=2e-6 * float(wanted.abs().max() + 1e-30), rtol=2e-5)
    floor = 3e-7 * math.hypot(*(float(x.norm()) for x in wide))
    for mine, theirs, same in zip(ours, wide, plain, strict=True):
        assert float((mine - theirs).norm()) <= 3e-6 * float(theirs.norm()) + floor + 2 * float((same - theirs).norm())


def _with_gradients(function, inputs, seed):
    """What it says, and the gradients of a weighted sum of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    said = function(*leaves)
    (said * torch.randn(said.shape, generator=torch.Generator().manual_seed(seed + 1))).sum().backward()
    return said.detach(), [x.grad for x in leaves]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
