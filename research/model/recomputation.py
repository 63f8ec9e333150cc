"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a block keeps its input and is computed again for the backward pass."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(block: Callable[..., Any], *args: Any, chance: torch.Generator | None) -> Any:
    """block(*args, chance=chance), to the bit in value and gradients; `chance` ends as it would without.

    What is drawn from `chance` is drawn alike in the recomputation: torch saves the state of its own generators only.
    """
    contexts = (nullcontext(), _DrawsAgain(chance)) if chance is not None else (nullcontext(), nullcontext())
    return checkpoint(block, *args, chance=chance, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts)


class _DrawsAgain:
    """Within it the generator is where it was when this was made; afterwards where it was before."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.state = generator.get_state()

    def __enter__(self) -> None:
        self.outside = self.generator.get_state()
        self.generator.set_state(self.state)

    def __exit__(self, *_: object) -> None:
        self.generator.set_state(self.outside)
