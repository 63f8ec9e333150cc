"""One training step as `research.training.loop` takes it, on tokens drawn at random, without data, records or checks."""

import torch
from torch import Tensor

from research.config import ModelConfig, OptimizerConfig
from research.model.balance import balance_losses
from research.model.loss import chunked_language_loss
from research.model.transformer import Transformer
from research.training.optimizer import build_optimizer

OPTIMIZER = OptimizerConfig(learning_rate=1e-4)


def random_tokens(config: ModelConfig, shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Tensor:
    """int64: uniform over the vocabulary, the same on every device."""
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """A model with N(0, initializer_range) drawn where it lies: initialising on the CPU takes minutes for billions of parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Transformer(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
            else:
                parameter.fill_(1.0)
    return model


class Trainer:
    """Model, AdamW and the step."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, OPTIMIZER)

    def loss(self, ids: Tensor) -> Tensor:
        """Cross-entropy and balance losses of ids (B, T + 1), as in training: bfloat16 autocast on CUDA, dropping where configured."""
        model, moe, place = self.model, self.model.config.moe, ids.device
        spared = torch.zeros(ids.shape[0], dtype=torch.bool, device=place)
        chance = torch.Generator(place).manual_seed(0)
        with torch.autocast(place.type, dtype=torch.bfloat16, enabled=place.type == "cuda"):
            hidden, routings = model.hidden(ids[:, :-1], protected_B=spared, chance=chance)
            loss = chunked_language_loss(hidden, model.lm_head.weight, ids[:, 1:])
        if moe is not None:
            for routing in routings.values():
                loss = loss + balance_losses(routing, moe, ids.shape[0]).weighted(moe.balance)
        return loss

    def step(self, ids: Tensor) -> Tensor:
        """The loss before the step, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.gradient_clip)
        self.optimizer.step()
        return loss.detach()
