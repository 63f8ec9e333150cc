"""The fast paths against their slow twins, on the device."""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from research.benchmark.step import OPTIMIZER, Trainer, random_tokens
from research.config import ModelConfig, RunConfig, TrainingConfig
from research.model.attention import MultiHeadLatentAttention
from research.model.cache import Cache
from research.model.experts import grouped_experts, looped_experts
from research.model.router import route
from research.model.transformer import Transformer, language_loss
from research.presets import preset
from research.training import checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """`difference` is |a - b| / |b| in the Euclidean norm, the largest over the tensors compared; `error` instead where the check broke."""

    name: str
    bound: float
    difference: float | None
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.difference is not None and self.difference <= self.bound


def run_checks(device: torch.device) -> list[Check]:
    """Every check of CHECKS; one that raises is a failed check, and the others go on."""
    return [_run(name, bound, check, device) for name, (bound, check) in CHECKS.items() if device.type == "cuda" or name not in ON_CARDS]


def _run(name: str, bound: float, check: Callable[[torch.device], float], device: torch.device) -> Check:
    try:
        return Check(name=name, bound=bound, difference=check(device))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return Check(name=name, bound=bound, difference=None, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in float64; infinite where `found` is not finite."""
    a, b = found.detach().double().cpu(), wanted.detach().double().cpu()
    if not bool(a.isfinite().all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def _model() -> ModelConfig:
    """Two layers, the second of experts, without dropping, so that every path computes the same."""
    config = preset("deepseek-v2-nano")
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, capacity_factor=None))


def _experts(device: torch.device, dtype: torch.dtype) -> float:
    """Outputs and gradients of 48 tokens; the twin always computes in float32, on values that both can hold."""
    moe, d = _model().moe, 128
    assert moe is not None
    width, experts = moe.moe_intermediate_size, moe.n_routed_experts
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype).float().to(device)

    routing = route(draw(48, experts), moe)
    leaves = draw(48, d), draw(experts, 2 * width, d, scale=d**-0.5), draw(experts, d, width, scale=width**-0.5)
    along = draw(48, d)
    results = []
    for form, kind in ((grouped_experts, dtype), (looped_experts, torch.float32)):
        x, gate_up, down = (leaf.clone().requires_grad_() for leaf in leaves)
        out = form(x.to(kind), routing, gate_up, down)
        results.append((out, *torch.autograd.grad((out.float() * along).sum(), (x, gate_up, down))))
    return max(relative_difference(a, b) for a, b in zip(*results, strict=True))


def _absorbed(device: torch.device) -> float:
    """Both forms of latent attention on the same queries, latents and rotary keys, causal."""
    config = _model()
    a, shape = config.attention, (2, 33)
    attention = MultiHeadLatentAttention(config).to(device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim > 1 else 0.0) + (parameter.ndim == 1))
        sizes = [(2, a.num_attention_heads, 33, a.qk_nope_head_dim), (2, a.num_attention_heads, 33, a.qk_rope_head_dim)]
        parts = [torch.randn(s, generator=generator).to(device) for s in [*sizes, (*shape, a.kv_lora_rank), (*shape, a.qk_rope_head_dim)]]
        return relative_difference(attention.absorbed(*parts), attention.expanded(*parts))


@torch.no_grad()
def _decode(device: torch.device) -> float:
    """Logits of a prefill and of steps of one token, against one pass over the whole."""
    config = _model()
    model = Transformer(config).initialise(0).to(device).eval()
    ids = random_tokens(config, (2, 40), device)
    cache = Cache.allocate(config, 2, 40, dtype=torch.float32, device=device)
    steps = [model(ids[:, :24], cache).logits, *(model(ids[:, i : i + 1], cache).logits for i in range(24, 40))]
    return relative_difference(torch.cat(steps, 1), model(ids).logits)


@torch.no_grad()
def _against_cpu(device: torch.device) -> float:
    config = _model()
    model = Transformer(config).initialise(0).eval()
    ids = random_tokens(config, (2, 64), torch.device("cpu"))
    wanted = model(ids).logits
    return relative_difference(model.to(device)(ids.to(device)).logits, wanted)


def _autocast(device: torch.device) -> float:
    """The loss of a training step in bfloat16 autocast, forward and backward, against float32; the gradient must be finite."""
    config = _model()
    ids = random_tokens(config, (4, 65), device)
    losses = []
    for enabled in (True, False):
        model = Transformer(config).initialise(0).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            out = model(ids[:, :-1])
        loss = language_loss(out.logits, ids[:, 1:])
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        losses.append(loss.detach() if bool(norm.isfinite()) else torch.full_like(loss, torch.nan))
    return relative_difference(*losses)


def _resume(device: torch.device) -> float:
    """Two steps, a checkpoint read back into a new model and optimizer, and two more losses of both.

    Infinite unless weights and moments come back to the bit.  The last loss has gone through the moments.
    """
    config = RunConfig(model=_model(), training=TrainingConfig(train_tokens=1, optimizer=OPTIMIZER))
    batches = [random_tokens(config.model, (4, 33), device, seed=i) for i in range(4)]
    first = Trainer(Transformer(config.model).initialise(0).to(device))
    for ids in batches[:2]:
        first.step(ids)
    again = Trainer(Transformer(config.model).initialise(1).to(device))
    with tempfile.TemporaryDirectory() as folder:
        state = checkpoint.Resumed(step=2, seconds=0.0, metrics={}, snapshots={})
        checkpoint.save(Path(folder) / "checkpoint", first.model, first.optimizer, config, state)
        checkpoint.load(Path(folder) / "checkpoint", again.model, again.optimizer, config)
    if not all(torch.equal(a, b) for a, b in zip(_state(first), _state(again), strict=True)):
        return float("inf")
    wanted, found = ([trainer.step(ids) for ids in batches[2:]] for trainer in (first, again))
    return relative_difference(torch.stack(found), torch.stack(wanted))


def _state(trainer: Trainer) -> list[Tensor]:
    """Every weight with its step and moments, in the model's order."""
    states = trainer.optimizer.state
    return [x.cpu() for p in trainer.model.parameters() for x in (p.detach(), *(states[p][k] for k in ("step", "exp_avg", "exp_avg_sq")))]


CHECKS: dict[str, tuple[float, Callable[[torch.device], float]]] = {
    "grouped experts against a loop, float32, with gradients": (1e-5, lambda device: _experts(device, torch.float32)),
    # bfloat16 keeps 8 bits: each of the three rounded products costs about 0.002.
    "grouped experts against a loop, bfloat16, with gradients": (2e-2, lambda device: _experts(device, torch.bfloat16)),
    "absorbed against expanded attention, float32": (1e-5, _absorbed),
    "prefill and decode against one pass, float32": (1e-4, _decode),
    "forward pass against the CPU's, float32": (1e-4, _against_cpu),
    "loss under bfloat16 autocast against float32": (1e-2, _autocast),
    # On a card two runs of one step differ already: sums by atomic additions, rounded to bfloat16 afterwards.
    "losses after a resumed checkpoint": (1e-3, _resume),
}
"""Name -> bound and check.  Sums in another order differ by some 1e-7 in float32."""
ON_CARDS = ("forward pass against the CPU's, float32",)
