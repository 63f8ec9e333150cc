"""AdamW and the schedule of V2 section 3.1.2."""

import torch

from research.config import OptimizerConfig
from research.model.transformer import Transformer


def build_optimizer(model: Transformer, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; RMSNorm gains are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (from 1) of `steps`: linear warm-up, then x decay_factor after each share in decay_at."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    passed = sum((step - 1) >= share * steps for share in config.decay_at)
    return config.learning_rate * config.decay_factor**passed
