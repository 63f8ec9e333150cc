"""DeepSeek-V2's generation throughput against DeepSeek 67B's, predicted, with its two terms apart.

The paper's 5.76 times (section 3.2.3) is a ratio of two deployed systems.  Here throughput is residents over the time of a step, so the ratio is
(residents that fit in memory) x (time of a step the other way round).  Efficiencies are those of training (`sims.constants`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from research import accounting
from research.configfile import read_yaml, validate
from sims.cluster import load_cluster
from sims.quantiles import Quantiles
from sims.serving.requests import Lengths, draw_requests
from sims.serving.simulate import Server, server
from sims.serving.spec import Serving, model_config, model_name, serving
from sims.serving.steady import means, prompt_rate, residents, saturated

FILE = Path(__file__).with_name("comparison.yaml")
SAMPLE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One of the two, with one kind of requests."""

    model: str
    kv_bytes_per_token: float
    weights_bytes_per_gpu: float
    cached_tokens: int
    """That fit beside weights, activations and the runtime's share, data-parallel copies of the attention's weights counted."""
    residents: float
    step_seconds: Quantiles
    """Of a step that generates a token for each resident."""
    generated_tokens_per_second: Quantiles
    """Prompts computed elsewhere or before, which is what a maximum of generation throughput means."""
    with_prompts_tokens_per_second: Quantiles
    """The same GPUs compute the prompts, too, which a server must do in the long run."""
    prompt_tokens_per_second: Quantiles
    """Of prompts alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """For one kind of requests and one reading of FP8: ratio = residents_ratio x step_ratio."""

    lengths: Lengths
    reading: str
    ours: System
    baseline: System
    residents_ratio: float
    """Term (a): more sequences at a time, by memory."""
    step_ratio: Quantiles
    """Term (b): the baseline's seconds per step over ours."""
    ratio: Quantiles
    ratio_with_prompts: Quantiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The prediction (`at`), the same over lengths and readings, and what was published."""

    at: Ratio
    sensitivity: list[Ratio]
    ideal_cached_tokens: tuple[float, float]
    """Of the node's whole memory less one copy of the weights, ours and the baseline's: the arithmetic of the paper's figures."""
    published: dict[str, float]
    errors: dict[str, float]
    """(predicted - published) / published of `at`, medians; positive: predicted too high."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def generation_ratio(
    *, cluster: str | None = None, draws: int = 64, lengths: Lengths | None = None, constants: Mapping[str, float] | None = None
) -> Comparison:
    """Predicted from `comparison.yaml`; `lengths` in place of the file's for the point estimate, `cluster` in place of H800, `constants`
    held at a value."""
    changes = {"draws": draws, **({"cluster": cluster} if cluster else {}), **({"constants": dict(constants)} if constants else {})}
    content = _content()
    spread = [validate(Lengths, each, f"{FILE.name}: lengths") for each in content["lengths"]]
    assumed = lengths or spread[content["assumed"]]
    readings: dict[str, dict[str, Any]] = content["readings"]
    first = next(iter(readings))
    at = _ratio(assumed, first, changes)
    over = [_ratio(each, reading, changes) for reading in readings for each in spread]
    published = {name: float(figure["value"]) for name, figure in content["published"].items()}
    predicted = {
        "ours": at.ours.generated_tokens_per_second.p50,
        "baseline": at.baseline.generated_tokens_per_second.p50,
        "ratio": at.ratio.p50,
        "prompt": at.ours.prompt_tokens_per_second.p50,
    }
    return Comparison(
        at=at,
        sensitivity=over,
        ideal_cached_tokens=(_ideal(_spec("ours", assumed, first, changes)), _ideal(_spec("baseline", assumed, first, changes))),
        published=published,
        errors={name: predicted[name] / published[name] - 1 for name in predicted},
    )


@cache
def _content() -> dict[str, Any]:
    return read_yaml(FILE)


def _spec(which: str, lengths: Lengths, reading: str, changes: Mapping[str, Any]) -> Serving:
    content = _content()
    read = content["readings"][reading] if which == "ours" else {}
    return serving({**content[which], **read, **changes, "lengths": asdict(lengths)}, f"{FILE.name}: {which}")


def _ratio(lengths: Lengths, reading: str, changes: Mapping[str, Any]) -> Ratio:
    hosts = [server(_spec(which, lengths, reading, changes)) for which in ("ours", "baseline")]
    (ours, our_draws), (baseline, their_draws) = (_system(host, lengths) for host in hosts)
    steps = their_draws["step"] / our_draws["step"]
    more = ours.residents / baseline.residents
    return Ratio(
        lengths=lengths,
        reading=reading,
        ours=ours,
        baseline=baseline,
        residents_ratio=more,
        step_ratio=Quantiles.of(steps),
        ratio=Quantiles.of(more * steps),
        ratio_with_prompts=Quantiles.of(our_draws["with prompts"] / their_draws["with prompts"]),
    )


def _system(host: Server, lengths: Lengths) -> tuple[System, dict[str, np.ndarray]]:
    average = means(draw_requests(lengths, SAMPLE, rate=None, seed=host.spec.seed), host.spec.block_tokens)
    by_memory = host.room.tokens / average.resident
    alone = saturated(average, host.cost, host.spec, by_memory)
    mixed = saturated(average, host.cost, host.spec, residents(average, host.room, host.cost, host.spec)[0])
    system = System(
        model=model_name(host.spec.model),
        kv_bytes_per_token=host.room.kv_bytes_per_token,
        weights_bytes_per_gpu=host.room.weights_bytes,
        cached_tokens=host.room.tokens,
        residents=by_memory,
        step_seconds=Quantiles.of(alone.decode_seconds),
        generated_tokens_per_second=Quantiles.of(alone.generated_alone),
        with_prompts_tokens_per_second=Quantiles.of(mixed.generated),
        prompt_tokens_per_second=Quantiles.of(prompt_rate(average, host.cost, host.spec)),
    )
    return system, {"step": alone.decode_seconds, "with prompts": mixed.generated}


def _ideal(spec: Serving) -> float:
    model, cluster = model_config(spec.model), load_cluster(spec.cluster)
    free = spec.gpus * cluster.hbm_bytes.value - accounting.weights_bytes(model, spec.weight_bits)
    return free / accounting.kv_cache_bytes_per_token(model, spec.kv_bits)
