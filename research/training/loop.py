"""The training loop: one page, two seams (`Recorder`, `should_stop`).

Everything random is a function of (seed, step), so a run that goes on from a checkpoint repeats the
undisturbed run to the bit on the same machine.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from research import accounting
from research.config import RunConfig
from research.data.batches import batch, heldout_batches
from research.data.prepare import PreparedData, prepare
from research.evaluation.bits_per_byte import evaluate_domains, score_metrics
from research.evaluation.ngram import reference_bits_per_byte
from research.model.balance import BalanceLosses, balance_losses
from research.model.loss import chunked_language_loss
from research.model.router import Routing
from research.model.transformer import Transformer
from research.routing_trace import RoutingTrace
from research.training import checkpoint, records
from research.training.checkpoint import Resumed
from research.training.optimizer import build_optimizer, learning_rate
from research.training.records import Record, Recorder
from research.training.statistics import routing_metrics

State = Literal["finished", "stopped", "diverged"]
TRACE_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """How a run ended.  `metrics` holds the last value of each metric and the model's closed forms."""

    state: State
    reason: str | None
    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    trace: RoutingTrace | None


def train(
    config: RunConfig,
    directory: Path,
    recorder: Recorder,
    should_stop: Callable[[Record], bool],
    *,
    device: str = "auto",
    announce: Callable[[str], None] = lambda line: None,
) -> TrainingResult:
    """Train to the end, to a stop, or to divergence; goes on from `directory`/checkpoint if there is one.

    Raises CheckpointError if that is of another configuration, DataError if the corpus cannot be had.
    """
    torch.set_flush_denormal(True)  # peaked attention makes denormals, which are several times slower on a CPU
    place = _device(device)
    data = prepare(config.data, announce)
    model = Transformer(config.model).to(place).initialise(config.seed)
    optimizer = build_optimizer(model, config.training.optimizer)
    folder = directory / "checkpoint"
    start = checkpoint.load(folder, model, optimizer, config) or Resumed(step=0, seconds=0.0, metrics={}, snapshots={})
    if start.step:
        announce(f"resumed after step {start.step} of {config.steps}")
    metrics, snapshots = dict(start.metrics), dict(start.snapshots)
    per_step = config.training.batch_size * config.data.sequence_length
    state: State = "finished"
    reason = None
    began, window_began, window_start = time.perf_counter() - start.seconds, time.perf_counter(), start.step
    step = start.step
    for step in range(start.step + 1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.training.optimizer, step, config.steps)
        last = step == config.steps
        validated = last or step % config.training.validate_every == 0
        recorded = validated or step % config.training.record_every == 0
        found = _optimizer_step(model, optimizer, config, data, step, routing=recorded)
        if not math.isfinite(found[records.LOSS] + found[records.GRADIENT_NORM]):
            state, reason = "diverged", f"loss {found[records.LOSS]} with gradient norm {found[records.GRADIENT_NORM]} at step {step}"
            break
        paused = time.perf_counter()
        if last or step % config.training.trace_every == 0:
            snapshots[step] = _expert_ids(_held_out_routings(model, config, data))
        if validated:
            found |= _validate(model, config, data)
        window_began += time.perf_counter() - paused  # tokens per second are those of training
        stop = False
        if recorded:
            now = time.perf_counter()
            found[records.LEARNING_RATE] = optimizer.param_groups[0]["lr"]
            found[records.TOKENS_PER_SECOND] = (step - window_start) * per_step / max(now - window_began, 1e-9)
            window_began, window_start = now, step
            metrics |= found
            record = Record(step=step, tokens=step * per_step, metrics=found)
            recorder.record(record)
            stop = not last and should_stop(record)
        if stop or last or step % config.training.checkpoint_every == 0:
            so_far = Resumed(step=step, seconds=time.perf_counter() - began, metrics=metrics, snapshots=snapshots)
            checkpoint.save(folder, model, optimizer, config, so_far)
        if stop:
            state, reason = "stopped", f"asked to stop at step {step}"
            break
    trace = _trace(model, config, data, snapshots) if state == "finished" and config.model.moe_layers else None
    if state == "finished":
        metrics |= _yardstick(data, config, step, announce)
    return TrainingResult(
        state=state,
        reason=reason,
        steps=step,
        tokens=step * per_step,
        seconds=time.perf_counter() - began,
        metrics=metrics | closed_forms(config),
        trace=trace,
    )


def closed_forms(config: RunConfig) -> dict[str, float]:
    """What is known of a model before it is trained, as metrics (cache at 16 bits)."""
    return {
        records.KV_BYTES_PER_TOKEN: accounting.kv_cache_bytes_per_token(config.model),
        records.TOTAL_PARAMETERS: float(accounting.total_parameters(config.model)),
        records.ACTIVATED_PARAMETERS: float(accounting.activated_parameters(config.model)),
        records.TRAIN_FLOPS_PER_TOKEN: accounting.train_flops_per_token(config.model, config.data.sequence_length),
    }


def _optimizer_step(
    model: Transformer, optimizer: torch.optim.AdamW, config: RunConfig, data: PreparedData, step: int, *, routing: bool
) -> dict[str, float]:
    """One step over the global batch, in micro-batches; their mean loss and, with `routing`, their mean statistics come back."""
    training, place, moe = config.training, model.lm_head.weight.device, config.model.moe
    ids = torch.from_numpy(batch(data, config.data, seed=config.seed, step=step, batch_size=training.batch_size)).to(place)
    protected = _protected(config, step).to(place)
    chance = torch.Generator(place).manual_seed(int(np.random.default_rng((config.seed, step, 2)).integers(2**62)))
    size = training.micro_batch_size or training.batch_size
    parts: list[dict[str, float]] = []
    optimizer.zero_grad(set_to_none=True)
    for rows, spared in zip(ids.split(size), protected.split(size), strict=True):
        with torch.autocast(place.type, dtype=torch.bfloat16, enabled=place.type == "cuda"):
            hidden, routings = model.hidden(
                rows[:, :-1], protected_B=spared, chance=chance, checkpointed=training.activation_checkpointing == "blocks"
            )
            language = chunked_language_loss(hidden, model.lm_head.weight, rows[:, 1:])
        balance = _balance(routings, config, rows.shape[0])
        loss = language
        if moe is not None:
            for losses in balance.values():
                loss = loss + losses.weighted(moe.balance)
        (loss * (size / training.batch_size)).backward()
        statistics = routing_metrics(routings, balance, moe) if routing and moe is not None and balance else {}
        parts.append({records.LOSS: float(language.detach()), **statistics})
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.optimizer.gradient_clip)
    optimizer.step()
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]} | {records.GRADIENT_NORM: float(norm)}


def _balance(routings: Mapping[int, Routing], config: RunConfig, sequences: int) -> dict[int, BalanceLosses]:
    """The paper does not print how layers are summed; as in the released code, every layer adds its own loss."""
    if config.model.moe is None:
        return {}
    return {layer: balance_losses(routing, config.model.moe, sequences) for layer, routing in routings.items()}


def _protected(config: RunConfig, step: int) -> Tensor:
    """bool (batch,): which sequences of this step are spared by token dropping, about `undropped_sequences` of all."""
    share = config.model.moe.undropped_sequences if config.model.moe is not None else 0.0
    draws = np.random.default_rng((config.seed, step, 1)).random(config.training.batch_size)
    return torch.from_numpy(draws < share)


def _validate(model: Transformer, config: RunConfig, data: PreparedData) -> dict[str, float]:
    return score_metrics(evaluate_domains(model, data, config.data, config.training.validation_tokens))


def _yardstick(data: PreparedData, config: RunConfig, steps: int, announce: Callable[[str], None]) -> dict[str, float]:
    """Of the same tokens; absent, with the reason announced, where they are too many to count."""
    try:
        return {records.NGRAM_BITS_PER_BYTE: reference_bits_per_byte(data, config, steps)}
    except ValueError as error:
        announce(str(error))
        return {}


@torch.no_grad()
def _held_out_routings(model: Transformer, config: RunConfig, data: PreparedData) -> dict[int, Routing]:
    """Routing of the same TRACE_TOKENS held-out tokens, taken from every domain alike."""
    per_domain = max(TRACE_TOKENS // len(data.domains), config.data.sequence_length)
    windows = [w for d in data.domains for w in heldout_batches(data, config.data, domain=d, max_tokens=per_domain)]
    ids = torch.from_numpy(np.concatenate(windows)[:, :-1].copy()).to(model.lm_head.weight.device)
    return model(ids).routings


def _expert_ids(routings: Mapping[int, Routing]) -> np.ndarray:
    if not routings:
        return np.zeros((0, 0, 0), np.int16)
    return np.stack([r.expert_ids_MK.cpu().numpy() for r in routings.values()]).astype(np.int16)


def _trace(model: Transformer, config: RunConfig, data: PreparedData, snapshots: Mapping[int, np.ndarray]) -> RoutingTrace:
    assert config.model.moe is not None
    scores = np.stack([r.scores_ME.cpu().numpy() for r in _held_out_routings(model, config, data).values()])
    return RoutingTrace(
        expert_ids=np.stack([snapshots[s] for s in sorted(snapshots)]),
        steps=np.array(sorted(snapshots)),
        layers=np.array(config.model.moe_layers),
        scores=scores.astype(np.float16),
        n_routed_experts=config.model.moe.n_routed_experts,
        expert_devices=config.model.moe.expert_devices,
        device_limit=config.model.moe.device_limit,
    )


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
