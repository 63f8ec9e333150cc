"""What every measurement needs: one pinned thread, the same allocator for both sides, interleaved rounds, the reference."""

import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import torch

from research.config import ModelConfig
from research.model.huggingface import config_to_hf, to_hf_state_dict
from research.model.transformer import Transformer
from research.training.allocator import keep_freed_memory


def pin(core: int = -1, *, keep: bool = True) -> int:
    """One thread on one core (the last one there is), as a worker of a study has it; the core.  Without `keep` freed memory goes
    back to the system, as where a peak is measured."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # a child inherits its parent's one core
    there = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {there[core]})
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if keep:
        keep_freed_memory()
    return there[core]


class Seconds(float):
    """What a form returns that knows better than the clock around it what it took."""


def interleaved(forms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median wall seconds of each form, one after the other in every round, after a warm-up."""
    for form in forms.values():
        form()
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            began = time.perf_counter()
            said = form()
            taken[name].append(said if isinstance(said, Seconds) else time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def reference(model: Transformer, experts: str, positions: int = 4096) -> torch.nn.Module:
    """transformers' model with the same weights and its `experts` backend (grouped_mm or eager)."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = DeepseekV2ForCausalLM(DeepseekV2Config(**config_to_hf(model.config, positions), experts_implementation=experts))
    twin.load_state_dict(to_hf_state_dict(model), strict=True)
    return twin


def spread_out(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model as it is initialised, whose gates are wide enough that rounding does not decide who is chosen."""
    model = Transformer(config).initialise(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.mul_(10)
    return model
