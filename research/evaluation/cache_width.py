"""What a narrower cache costs in quality: the same held-out text, predicted out of caches of several widths."""

from collections.abc import Sequence
from dataclasses import dataclass

from research.accounting import KV_BITS, kv_cache_bytes_per_token_stored
from research.config import RunConfig
from research.data.prepare import PreparedData
from research.errors import UserError
from research.evaluation.bits_per_byte import DomainScore, domain_intervals, evaluate_domains, score_metrics
from research.model.transformer import Transformer
from research.training import records

Interval = tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthScore:
    """Bits per byte by domain name, and of `all` by bytes, with a cache of `bits` (None: the model's own precision).

    `difference` is to the model's own precision on the same text; `bytes_per_token` is the cache as it is allocated.
    The intervals are of 95 %, by a bootstrap over `resampled` (per domain: how many of which unit), the differences' paired.
    """

    bits: int | None
    bytes_per_token: int
    bits_per_byte: dict[str, float]
    interval_95: dict[str, Interval]
    difference: dict[str, float]
    difference_interval_95: dict[str, Interval]
    resampled: dict[str, str]


def check_bits(bits: int | None, option: str = "--kv-bits") -> None:
    """UserError for a width that no cache has."""
    if bits is not None and bits not in KV_BITS:
        raise UserError(f"{option} = {bits}: no cache has this width; valid: {', '.join(map(str, KV_BITS))}")


def evaluate_widths(model: Transformer, data: PreparedData, config: RunConfig, widths: Sequence[int], max_tokens: int) -> list[WidthScore]:
    """One score for the model's own precision, then one for each of `widths`; about `max_tokens` tokens of each domain."""
    for bits in widths:
        check_bits(bits)
    # 8 bytes in float64, 4 in float32: 16-bit elements times that.
    own = kv_cache_bytes_per_token_stored(model.config, 16) * model.lm_head.weight.element_size() // 2
    full = evaluate_domains(model, data, config.data, max_tokens)
    narrow = [(bits, evaluate_domains(model, data, config.data, max_tokens, bits)) for bits in widths]
    stored = [(bits, kv_cache_bytes_per_token_stored(model.config, bits), found) for bits, found in narrow]
    return [_width_score(bits, size, found, full) for bits, size, found in [(None, own, full), *stored]]


def _width_score(bits: int | None, bytes_per_token: int, found: dict[str, DomainScore], full: dict[str, DomainScore]) -> WidthScore:
    value, own = _by_name(found), _by_name(full)
    return WidthScore(
        bits=bits,
        bytes_per_token=bytes_per_token,
        bits_per_byte=value,
        interval_95=domain_intervals(found),
        difference={name: value[name] - own[name] for name in value},
        difference_interval_95=domain_intervals(found, full),
        resampled={domain: f"{len(score.parts)} {score.unit}" for domain, score in found.items()},
    )


def _by_name(scores: dict[str, DomainScore]) -> dict[str, float]:
    return {domain: score.bits_per_byte for domain, score in scores.items()} | {"all": score_metrics(scores)[records.BITS_PER_BYTE]}
