"""Ours in closed form, by `research.accounting` and by arithmetic on what is published."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from reports.claims.published import figure, published
from research import accounting as count
from research.config import AttentionConfig, ModelConfig
from research.presets import preset
from sims.cluster import load_cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
    """`low` and `high`: P10 and P90 of a simulation; `note` is said beside what the row rests on."""

    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


def _context() -> int:
    return int(figure("training_context"))


def total(name: str) -> float:
    return count.total_parameters(preset(name)) / 1e9


def activated(name: str) -> float:
    return count.activated_parameters(preset(name)) / 1e9


def kilobytes(name: str, bits: float) -> float:
    return count.kv_cache_bytes_per_token(preset(name), bits) / 1e3


def saved(ours: float, theirs: float) -> float:
    """Per cent less."""
    return 100 * (1 - ours / theirs)


def mha_of_same_heads() -> ModelConfig:
    """DeepSeek-V2 whose heads are cached whole: keys and values of d_h for each."""
    model = preset("deepseek-v2")
    heads, width = model.attention.num_attention_heads, model.attention.v_head_dim
    attention = AttentionConfig(kind="mha", num_attention_heads=heads, qk_nope_head_dim=0, qk_rope_head_dim=width, v_head_dim=width)
    return replace(model, attention=attention)


def groups() -> float:
    """Of GQA that caches as much as MLA."""
    model = preset("deepseek-v2")
    return count.kv_cache_elements_per_token(model) / model.num_hidden_layers / (2 * model.attention.v_head_dim)


def expected_devices(model: ModelConfig | None = None) -> float:
    """Distinct devices of K experts drawn evenly: D (1 - C(N - N/D, K) / C(N, K))."""
    moe = (model or preset("deepseek-v2")).moe
    assert moe is not None
    n, chosen, devices = moe.n_routed_experts, moe.num_experts_per_tok, moe.expert_devices
    return devices * (1 - math.comb(n - n // devices, chosen) / math.comb(n, chosen))


def free_tokens(name: str, weight_bits: float, kv_bits: float) -> float:
    """Cached tokens that fit beside one copy of the weights on 8 H800."""
    model = preset(name)
    free = 8 * load_cluster("h800").hbm_bytes.value - count.weights_bytes(model, weight_bits)
    return free / count.kv_cache_bytes_per_token(model, kv_bits)


def _flops_16b() -> float:
    model = preset("deepseekmoe-16b")
    return (count.train_flops_per_token(model, _context()) + 6.0 * model.vocab_size * model.hidden_size) * _context() / 1e12


def _cost_by_flops() -> float:
    return saved(*(count.train_flops_per_token(preset(name), _context()) for name in ("deepseek-v2", "deepseek-67b")))


def _elements(name: str) -> int:
    return count.kv_cache_elements_per_token(preset(name))


CLOSED: dict[str, Callable[[], float]] = {
    "v2-total": lambda: total("deepseek-v2"),
    "v2-activated": lambda: activated("deepseek-v2"),
    "lite-total": lambda: total("deepseek-v2-lite"),
    "lite-activated": lambda: activated("deepseek-v2-lite"),
    "small-mha-total": lambda: total("ablation-small-mha"),
    "small-mha-activated": lambda: activated("ablation-small-mha"),
    "kv-elements": lambda: _elements("deepseek-v2"),
    "kv-kilobytes": lambda: kilobytes("deepseek-v2", figure("kv_bits_v2")),
    "kv-kilobytes-67b": lambda: kilobytes("deepseek-67b", 16),
    "kv-cut": lambda: saved(kilobytes("deepseek-v2", figure("kv_bits_v2")), kilobytes("deepseek-67b", 16)),
    "kv-cut-same-bits": lambda: saved(kilobytes("deepseek-v2", 16), kilobytes("deepseek-67b", 16)),
    "kv-cut-mha": lambda: saved(_elements("deepseek-v2"), count.kv_cache_elements_per_token(mha_of_same_heads())),
    "kv-groups": groups,
    "kv-small-mha": lambda: _elements("ablation-small-mha") / 1e3,
    "kv-small-mla": lambda: _elements("ablation-small-mla") / 1e3,
    "kv-share-small": lambda: 100 * _elements("ablation-small-mla") / _elements("ablation-small-mha"),
    "kv-share-large": lambda: 100 * _elements("deepseek-v2") / (1e3 * figure("large_mha_elements")),
    "flops-v2": lambda: count.train_flops_per_token(preset("deepseek-v2"), _context()) / 1e9,
    "cost-flops": _cost_by_flops,
    "cost-published": lambda: saved(figure("hours_v2"), figure("hours_67b")),
    "residents-ideal": lambda: free_tokens("deepseek-v2", 8, figure("kv_bits_v2")) / free_tokens("deepseek-67b", 16, 16),
    "devices-unrestricted": expected_devices,
    "combinations-coarse": lambda: math.comb(16, 2),
    "combinations-fine": lambda: math.comb(64, 8),
    "67b-total": lambda: total("deepseek-67b"),
    "llama3-total": lambda: total("llama3-70b"),
    "qwen-total": lambda: total("qwen1.5-72b"),
    "mixtral-total": lambda: total("mixtral-8x22b"),
    "mixtral-activated": lambda: activated("mixtral-8x22b"),
    "switch-total": lambda: total("switch-base-128"),
    "gshard-total": lambda: count.total_parameters(published().model("GShard 600B")) / 1e9,
    "glam-total": lambda: total("glam-64b-64e") / 1e3,
    "glam-activated": lambda: activated("glam-64b-64e"),
    "glam-flops": lambda: count.forward_flops_per_token(preset("glam-64b-64e"), int(figure("glam_context"))) / 1e9,
    "16b-total": lambda: total("deepseekmoe-16b"),
    "16b-activated": lambda: activated("deepseekmoe-16b") + preset("deepseekmoe-16b").vocab_size * preset("deepseekmoe-16b").hidden_size / 1e9,
    "16b-flops": _flops_16b,
}
"""A value for each claim in closed form, in the claim's unit."""
