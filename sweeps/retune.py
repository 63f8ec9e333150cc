"""The learning rate chosen anew for every variant: a few short runs, of which the one that validates best says the rate.

They are runs of their own (role `retune`): no replicates, no trials, and in no statistic of a report.  The choice is a
function of how they ended, so a study that goes on needs no memory of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from research.config import RunConfig
from sweeps import schema

ROLE = "retune"
RATE = "training.optimizer.learning_rate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Retune:
    """Rates to try, as they are or as factors of each variant's own; `tokens_share` of its training tokens each."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    learning_rates: list[float] | None = None
    factors: list[float] | None = None
    tokens_share: float = 0.2
    seed: int | None = None
    """Of the short runs; null: the first of the study's seeds."""

    def __post_init__(self) -> None:
        if (self.learning_rates is None) == (self.factors is None):
            raise ValueError(f"learning_rates={self.learning_rates} and factors={self.factors}: give one of the two")
        for name in ("learning_rates", "factors"):
            values = getattr(self, name)
            if values is not None and (len(values) < 2 or len(set(values)) < len(values) or min(values) <= 0):
                raise ValueError(f"{name}={values} must be at least two different numbers > 0")
        if not 0 < self.tokens_share <= 1:
            raise ValueError(f"tokens_share={self.tokens_share} must lie in 0..1, 0 excluded")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in 0..{2**32 - 1}")

    @property
    def points(self) -> int:
        return len(self.learning_rates or self.factors or ())

    def rates(self, own: float) -> list[float]:
        """Ascending; `own` is the variant's configured rate."""
        return sorted(self.learning_rates or [factor * own for factor in self.factors or ()])


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    return replace(config, training=replace(config.training, optimizer=replace(config.training.optimizer, learning_rate=rate)))


def short_config(config: RunConfig, retune: Retune, rate: float) -> RunConfig:
    """The run that tries `rate`: fewer tokens, and a warm-up that is the same share of them."""
    training, share = config.training, retune.tokens_share
    optimizer = replace(training.optimizer, learning_rate=rate, warmup_steps=round(training.optimizer.warmup_steps * share))
    ramp = None if training.batch_ramp_tokens is None else max(round(training.batch_ramp_tokens * share), 1)
    tokens = max(round(training.train_tokens * share), 1)
    return replace(config, training=replace(training, train_tokens=tokens, optimizer=optimizer, batch_ramp_tokens=ramp))


def choose(rates: Sequence[float], summaries: Sequence[Mapping[str, Any]], own: float) -> dict[str, Any]:
    """The rate of the lowest held-out bits per byte, as run.json keeps it: all that were tried with what they reached, the
    chosen one, and `edge`: whether it is the lowest or highest tried, so that a better one may lie outside.

    `own`, the rate as configured, is kept if no short run finished; `chosen_by` says so.
    """
    reached = [s["metrics"].get(schema.BITS_PER_BYTE) if s["state"] == schema.FINISHED else None for s in summaries]
    tried = [
        {"learning_rate": rate, "state": s["state"], schema.BITS_PER_BYTE: value} for rate, s, value in zip(rates, summaries, reached, strict=True)
    ]
    possible = [(value, rate) for value, rate in zip(reached, rates, strict=True) if value is not None]
    if not possible:
        return {"learning_rate": own, "edge": False, "chosen_by": "default: no short run finished", "tried": tried}
    chosen = min(possible)[1]
    return {"learning_rate": chosen, "edge": chosen in (rates[0], rates[-1]), "chosen_by": f"lowest {schema.BITS_PER_BYTE}", "tried": tried}
