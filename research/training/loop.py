"""The training loop: one page, two seams (`Recorder`, `should_stop`).

Everything random is a function of (seed, step), so a run that goes on from a checkpoint repeats the
undisturbed run to the bit on the same machine.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from research import accounting
from research.config import RunConfig
from research.data.batches import batch
from research.data.packing import documents
from research.data.prefetch import Prefetcher
from research.data.prepare import PreparedData, prepare
from research.devices import choose_device
from research.evaluation.bits_per_byte import evaluate_domains, score_metrics
from research.evaluation.ngram import reference_bits_per_byte
from research.model.balance import BalanceLosses, balance_losses
from research.model.loss import chunked_language_loss
from research.model.router import Decided, Routing
from research.model.transformer import Transformer
from research.parallel.exchange import spread_experts
from research.parallel.sharding import ShardedAdamW
from research.parallel.traffic import TrafficFile, traffic_metrics, write_routed
from research.parallel.world import ALONE, World
from research.routing_trace import RoutingTrace
from research.training import checkpoint, records
from research.training.allocator import keep_freed_memory
from research.training.checkpoint import Resumed
from research.training.health import Diverged, Health, expert_loads, naming_out_of_memory
from research.training.optimizer import build_optimizer, clip_gradient, gradient_norm, set_learning_rate
from research.training.records import Meter, Record, Recorder
from research.training.statistics import routing_metrics
from research.training.trace import routing_trace, snapshot

State = Literal["finished", "stopped", "diverged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """How a run ended, after `steps` whole steps.  `metrics` holds the last value of each metric and the model's closed forms."""

    state: State
    reason: str | None
    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    trace: RoutingTrace | None
    warnings: tuple[str, ...] = ()
    """What was announced as not well on the way, such as dead experts."""


def train(
    config: RunConfig,
    directory: Path,
    recorder: Recorder,
    should_stop: Callable[[Record], bool],
    *,
    device: str = "auto",
    announce: Callable[[str], None] = lambda line: None,
    micro_batch_size: int | None = None,
    world: World = ALONE,
) -> TrainingResult:
    """Train to the end, to a stop, or to divergence; goes on from `directory`/checkpoint if there is one.

    `micro_batch_size`: sequences per pass where this machine has less memory than `config` thinks.  It is no part of the run's
    identity, checkpoints stay valid: the global batch is the same, what is dropped of it too, and its gradient is, up to rounding
    (see `RunConfig.micro_batches_add_up` for the configurations of which this does not hold).

    With several workers each calls this with its `world` and the same `directory`, and all get the same result.  Rank 0 alone
    writes and is asked whether to stop; the recorders of the others (`NoRecorder`) get what its recorder gets.

    Raises CheckpointError if that is of another configuration, DataError if the corpus cannot be had, OutOfMemory and
    DiskFull with what is missing; the checkpoint before stands in each case, and when the run diverges.
    """
    _settle(config, world)
    place, training, folder = choose_device(device), config.training, directory / "checkpoint"
    data = prepare(config.data, announce)
    with naming_out_of_memory(place, "when the model was built"):
        model = Transformer(config.model).to(place, _master_dtype(config)).initialise(config.seed)
        spread_experts(model, world)
        optimizer = build_optimizer(model, training.optimizer, world)
        at = _resumed(folder, model, optimizer, config, announce)
    state: State = "finished"
    reason = None
    meter = Meter(at.seconds, config.schedule.tokens(at.step))
    for step, ids in Prefetcher(_make_batch(data, config, place), range(at.step + 1, config.steps + 1), place):
        rate = set_learning_rate(optimizer, config, step)
        last = step == config.steps
        validated = last or step % training.validate_every == 0
        recorded = validated or step % training.record_every == 0
        try:
            with naming_out_of_memory(place, f"in step {step}"):
                found, loads = _optimizer_step(
                    model, optimizer, config, data, step, ids, at.health, routing=recorded, size=micro_batch_size, world=world
                )
        except Diverged as error:
            state, reason = "diverged", str(error)
            break
        at.step, stop, best, due = step, False, False, False
        with meter.paused():
            if last or step % training.trace_every == 0:
                at.snapshots[step] = snapshot(model, config, data, world)
            if validated:
                with naming_out_of_memory(place, f"in the validation after step {step}"):
                    found |= _validate(model, config, data, world)
                best = at.is_best(found[records.BITS_PER_BYTE]) and training.keep_best
            if recorded:
                tokens = config.schedule.tokens(step)
                found |= {records.LEARNING_RATE: rate, records.TOKENS_PER_SECOND: meter.tokens_per_second(tokens)}
                found |= _dead_experts(at.health, loads, step, announce) | _traffic(world, directory)
                at.metrics |= found
                record = Record(step=step, tokens=tokens, metrics=found)
                recorder.record(record)
                stop = world.agree(world.rank == 0 and should_stop(record)) and not last
                due = world.agree(meter.seconds - at.seconds >= (training.checkpoint_seconds or math.inf))
            if stop or last or best or due or step % training.checkpoint_every == 0:
                at.seconds = meter.seconds
                checkpoint.save(folder, model, optimizer, config, at, is_best=best, world=world)
        if stop:
            state, reason = "stopped", f"asked to stop at step {step}"
            break
    trace = routing_trace(model, config, data, at.snapshots, world) if state == "finished" and config.model.moe_layers else None
    if state == "finished":
        at.metrics |= _yardstick(data, config, at.step, announce) | _narrow_caches(model, config, data, world)
    return TrainingResult(
        state=state,
        reason=reason,
        steps=at.step,
        tokens=config.schedule.tokens(at.step),
        seconds=meter.seconds,
        metrics=at.metrics | closed_forms(config),
        trace=trace,
        warnings=tuple(at.health.warnings),
    )


def _settle(config: RunConfig, world: World) -> None:
    keep_freed_memory()
    torch.set_flush_denormal(True)  # peaked attention makes denormals, which are several times slower on a CPU
    world.check(config)


def _resumed(folder: Path, model: Transformer, optimizer: torch.optim.AdamW, config: RunConfig, announce: Callable[[str], None]) -> Resumed:
    at = checkpoint.load(folder, model, optimizer, config) or Resumed(step=0, seconds=0.0, metrics={}, snapshots={})
    if at.step:
        announce(f"resumed after step {at.step} of {config.steps}")
    return at


def _make_batch(data: PreparedData, config: RunConfig, place: torch.device) -> Callable[[int], np.ndarray]:
    def make(step: int) -> np.ndarray:
        with naming_out_of_memory(place, f"in step {step}"):
            return batch(data, config.data, seed=config.seed, step=step, batch_size=config.schedule.batch_size(step))

    return make


def closed_forms(config: RunConfig) -> dict[str, float]:
    """What is known of a model before it is trained, as metrics (cache at 16 bits)."""
    return {
        records.KV_BYTES_PER_TOKEN: accounting.kv_cache_bytes_per_token(config.model),
        records.TOTAL_PARAMETERS: float(accounting.total_parameters(config.model)),
        records.ACTIVATED_PARAMETERS: float(accounting.activated_parameters(config.model)),
        records.TRAIN_FLOPS_PER_TOKEN: accounting.train_flops_per_token(config.model, config.data.sequence_length),
    }


def _optimizer_step(
    model: Transformer,
    optimizer: torch.optim.AdamW,
    config: RunConfig,
    data: PreparedData,
    step: int,
    ids: Tensor,
    health: Health,
    *,
    routing: bool,
    size: int | None = None,
    world: World = ALONE,
) -> tuple[dict[str, float], dict[int, list[int]]]:
    """One step over the global batch `ids`, with at most `size` sequences in a pass; its loss and, with `routing`, its statistics and
    the tokens of each expert by layer come back.  Diverged, with weights as they were, if the step is not worth taking."""
    training, place, moe, precision = config.training, model.lm_head.weight.device, config.model.moe, _precision(config, model.lm_head.weight.device)
    batch_size = len(ids)
    protected = _protected(config, step, batch_size).to(place)
    chance = torch.Generator(place).manual_seed(int(np.random.default_rng((config.seed, step, 2)).integers(2**62)))
    whole_pass = training.micro_batch_size or batch_size
    loss_of_all = 0.0
    seen: dict[int, list[Routing]] = {}
    world.begin_step(step)
    optimizer.zero_grad(set_to_none=True)

    def run(rows: Tensor, spared: Tensor | Decided) -> tuple[Tensor, dict[int, Routing]]:
        return model.hidden(
            rows[:, :-1],
            protected_B=spared,
            chance=chance,
            documents=documents(data, config.data, rows[:, :-1]),
            checkpointed=training.activation_checkpointing == "blocks",
        )

    for rows, spared, last in _passes(ids, protected, whole_pass, size or whole_pass, run, config, world):
        if last and isinstance(optimizer, ShardedAdamW):
            optimizer.last_pass()
        with torch.autocast(place.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            hidden, routings = run(rows, spared)
            language = chunked_language_loss(hidden, model.lm_head.weight, rows[:, 1:])
        balance = _balance(routings, config, rows.shape[0], world)
        loss = language
        if moe is not None:
            for losses in balance.values():
                loss = loss + losses.weighted(moe.balance)
        share = len(rows) / batch_size  # the last pass may be a smaller one; with several workers the shares of all add up to 1
        (loss * share).backward()
        loss_of_all += share * float(language.detach())
        if routing:
            for layer, found_there in routings.items():
                seen.setdefault(layer, []).append(Routing(*(part.detach() for part in found_there)))
    found = {records.LOSS: loss_of_all * world.size}
    # Of the whole batch, since the largest load of a part is not that of the whole.
    whole = {layer: Routing(*(torch.cat(parts) for parts in zip(*of_layer, strict=True))) for layer, of_layer in seen.items()}
    everyones = {layer: _of_all(world, routing) for layer, routing in whole.items()}
    if whole and moe is not None:
        with torch.no_grad():
            found |= routing_metrics(everyones, _balance(whole, config, batch_size // world.size, world), moe)
    found, loads = world.mean_of(found), expert_loads(everyones)
    # The norm comes first and the clipping after the check: clipping by a norm that is not finite spoils every layer's gradient.
    norm = gradient_norm(model, optimizer)
    found[records.GRADIENT_NORM] = float(norm)
    health.check_step(model, step, found[records.LOSS], found[records.GRADIENT_NORM], config.model.vocab_size)
    clip_gradient(model, optimizer, training.optimizer.gradient_clip, norm)
    optimizer.step()
    world.end_step()
    return found, loads


def _passes(
    ids: Tensor,
    protected: Tensor,
    whole: int,
    size: int,
    run: Callable[[Tensor, Tensor | Decided], tuple[Tensor, dict[int, Routing]]],
    config: RunConfig,
    world: World,
) -> Iterator[tuple[Tensor, Tensor | Decided, bool]]:
    """This worker's sequences of each pass, what its dropping goes by, and whether it is the last: micro-batches of `whole`, cut into
    `size` where memory is short.

    What is dropped depends on all of a micro-batch, so where it is cut one pass without gradients decides that for its parts."""
    moe, place = config.model.moe, ids.device
    drops = moe is not None and (moe.capacity_factor is not None or moe.second_expert == "by_chance")
    size = max(size // world.size, 1)
    for index in range(0, len(ids), whole):
        rows, spared = world.share(ids[index : index + whole]), world.share(protected[index : index + whole])
        last = index + whole >= len(ids)
        if size >= len(rows):
            yield rows, spared, last
            continue
        decided = None
        if drops:
            precision = _precision(config, place)
            with torch.no_grad(), torch.autocast(place.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
                decided = Decided({layer: found.kept_MK for layer, found in run(rows, spared)[1].items()})
        length = rows.shape[1] - 1
        for start in range(0, len(rows), size):
            stop = min(start + size, len(rows))
            part = spared[start:stop] if decided is None else decided.part(start * length, stop * length)
            yield rows[start:stop], part, last and stop == len(rows)


def _precision(config: RunConfig, place: torch.device) -> torch.dtype:
    """In which the products of a training step are; master weights, gate, softmax, norms and the loss are float32 in any case."""
    if config.training.precision == "float64":
        return torch.float64
    if config.training.precision == "auto":
        return torch.bfloat16 if place.type == "cuda" else torch.float32
    return torch.bfloat16 if config.training.precision == "bfloat16" else torch.float32


def _master_dtype(config: RunConfig) -> torch.dtype:
    return torch.float64 if config.training.precision == "float64" else torch.float32


def _of_all(world: World, routing: Routing) -> Routing:
    """The choices of all workers' tokens; affinities and gates are left to each."""
    if world.size == 1:
        return routing
    return routing._replace(expert_ids_MK=world.gather(routing.expert_ids_MK), kept_MK=world.gather(routing.kept_MK))


def _traffic(world: World, directory: Path) -> dict[str, float]:
    """With several workers: write down what all of them have sent since the last record, and what it amounts to."""
    if world.size == 1:
        return {}
    seconds = world.seconds_per_step()
    ledgers = world.gather_objects(world.ledger.take())
    if world.rank == 0:
        TrafficFile(directory / "traffic.jsonl").append(ledgers)
    if world.ledger.witness:
        routed = world.gather_objects(world.ledger.take_routed())
        if world.rank == 0:
            write_routed(directory / "routed", routed)
    return traffic_metrics(ledgers) | world.mean_of({records.PARALLEL_SECONDS: seconds})


def _dead_experts(health: Health, loads: Mapping[int, list[int]], step: int, announce: Callable[[str], None]) -> dict[str, float]:
    if not loads:
        return {}
    dead, warnings = health.check_experts(loads, step)
    for line in warnings:
        announce(line)
    return {records.DEAD_EXPERTS: float(dead)}


def _balance(routings: Mapping[int, Routing], config: RunConfig, sequences: int, world: World) -> dict[int, BalanceLosses]:
    """The paper does not print how layers are summed; as in the released code, every layer adds its own loss."""
    if config.model.moe is None:
        return {}
    return {layer: balance_losses(routing, config.model.moe, sequences, world) for layer, routing in routings.items()}


def _protected(config: RunConfig, step: int, batch_size: int) -> Tensor:
    """bool (batch,): which sequences of this step are spared by token dropping, about `undropped_sequences` of all."""
    share = config.model.moe.undropped_sequences if config.model.moe is not None else 0.0
    draws = np.random.default_rng((config.seed, step, 1)).random(batch_size)
    return torch.from_numpy(draws < share)


def _validate(model: Transformer, config: RunConfig, data: PreparedData, world: World) -> dict[str, float]:
    return score_metrics(evaluate_domains(model, data, config.data, config.training.validation_tokens, world=world))


def _narrow_caches(model: Transformer, config: RunConfig, data: PreparedData, world: World) -> dict[str, float]:
    """The validation again, out of a cache of each width that is asked for, and what that cache takes."""
    found = {}
    for bits in config.training.cache_bits:
        scores = evaluate_domains(model, data, config.data, config.training.validation_tokens, bits, world)
        found[records.CACHE_BITS_PER_BYTE.format(bits)] = score_metrics(scores)[records.BITS_PER_BYTE]
        found[records.CACHE_BYTES_PER_TOKEN.format(bits)] = float(accounting.kv_cache_bytes_per_token_stored(config.model, bits))
    return found


def _yardstick(data: PreparedData, config: RunConfig, steps: int, announce: Callable[[str], None]) -> dict[str, float]:
    """Of the same tokens; absent, with the reason announced, where they are too many to count."""
    try:
        return {records.NGRAM_BITS_PER_BYTE: reference_bits_per_byte(data, config, steps)}
    except ValueError as error:
        announce(str(error))
        return {}
