"""AdamW and the schedule of V2 section 3.1.2."""

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from research.config import OptimizerConfig, RunConfig
from research.model.transformer import Transformer
from research.parallel.sharding import ShardedAdamW
from research.parallel.world import ALONE, World


def build_optimizer(model: Transformer, config: OptimizerConfig, world: World = ALONE) -> torch.optim.AdamW:
    """Fused AdamW on float32 weights; RMSNorm gains are not decayed.  With several workers, its state is shared out among them.

    Each group has a `rate_scale` for `set_learning_rate`: with `base_width`, base_width / hidden_size for every matrix that the
    width of the model is summed over, 1 for the embedding (of which a token reads one row) and the gains.
    """
    scale = 1.0 if config.base_width is None else config.base_width / model.config.hidden_size
    embedding = model.embed_tokens.weight
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1 and p is not embedding], "weight_decay": config.weight_decay, "rate_scale": scale},
        {"params": [embedding], "weight_decay": config.weight_decay, "rate_scale": 1.0},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0, "rate_scale": 1.0},
    ]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon, "fused": True}
    return torch.optim.AdamW(groups, **settings) if world.size == 1 else ShardedAdamW(model, groups, world, **settings)


def gradient_norm(model: Transformer, optimizer: torch.optim.AdamW) -> Tensor:
    """Euclidean norm of the whole gradient; with several workers it is reduced first."""
    if isinstance(optimizer, ShardedAdamW):
        optimizer.reduce()
        return optimizer.norm()
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


def clip_gradient(model: Transformer, optimizer: torch.optim.AdamW, bound: float, norm: Tensor) -> None:
    """Scale the gradient, of norm `norm`, down to `bound`."""
    if isinstance(optimizer, ShardedAdamW):
        optimizer.clip(bound, norm)
    else:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), bound, norm)


def learning_rate(config: OptimizerConfig, step: int, seen: int, total: int) -> float:
    """Rate of optimizer step `step` (from 1), which begins when `seen` of `total` tokens have been: linear warm-up over
    `warmup_steps` steps, then x decay_factor after each share of the tokens in decay_at."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    # 0.9 is nine tenths here, not the nearest binary number, so that the drop comes at the very step.
    passed = sum(seen >= Fraction(str(share)) * total for share in config.decay_at)
    return config.learning_rate * config.decay_factor**passed


def set_learning_rate(optimizer: torch.optim.AdamW, config: RunConfig, step: int) -> float:
    """Give every group its rate for `step`; the unscaled one comes back."""
    rate = learning_rate(config.training.optimizer, step, config.schedule.tokens(step - 1), config.tokens)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
    return rate
