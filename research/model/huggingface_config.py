"""config.json of Hugging Face `transformers` (DeepseekV2ForCausalLM, 5.23) to a ModelConfig and back; `huggingface` holds the weights."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from research.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig, YarnConfig
from research.errors import ConfigError

ARCHITECTURE = "DeepseekV2ForCausalLM"
MODEL_TYPE = "deepseek_v2"

# Keys that must be there, with their smallest value: the architecture has no defaults that are any published model's.
_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 1,
    "num_attention_heads": 1,
    "kv_lora_rank": 1,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 2,
    "v_head_dim": 1,
}
_EXPERT_SIZES = {"n_routed_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 1}
# What this model does in one way only: key -> the values that say so.  The first is what an absent key means.
_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("softmax", None),
    "norm_topk_prob": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "moe_layer_freq": (1, None),
    "partial_rotary_factor": (1, None),
}
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ROPE_FIXED: dict[str, tuple[Any, ...]] = {"truncate": (True, None), "attention_factor": (None,), "partial_rotary_factor": (1, None)}


class _Reader:
    """Values of a config.json mapping; every mistake is kept as a sentence until `problems` is asked."""

    def __init__(self, mapping: Mapping[str, Any], where: str) -> None:
        self.mapping, self.where = mapping, where
        self.problems: list[str] = []

    def refuse(self, key: str, valid: str) -> None:
        said = f"{key} = {self.mapping[key]!r}" if key in self.mapping else f"{key} is missing"
        self.problems.append(f"{self.where}: {said}: expected {valid}")

    def integer(self, key: str, smallest: int, absent: int | None = None, largest: int | None = None) -> int:
        """The integer under `key`; where it is wrong, or absent without a default, `smallest` stands in so that reading goes on."""
        value = self.mapping.get(key, absent)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest or (largest is not None and value > largest):
            self.refuse(key, f"an integer >= {smallest}" if largest is None else f"an integer in {smallest}..{largest}")
            return smallest
        return value

    def number(self, key: str, absent: float | None, valid: str, good: Callable[[float], bool]) -> float:
        """The number under `key`, `absent` where it is null or not there; where it is wrong, 1."""
        value = self.mapping.get(key)
        value = absent if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not good(value):
            self.refuse(key, valid)
            return 1.0
        return float(value)

    def fixed(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        for key, values in allowed.items():
            if self.mapping.get(key, values[0]) not in values:
                self.refuse(key, f"{values[0]!r}, the only form that this model has" if values[0] is not None else "no such key")


def config_from_hf(mapping: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The model that a config.json mapping of model_type deepseek_v2 describes.

    Rotary parameters may stand in `rope_theta` and `rope_scaling` (as published) or in `rope_parameters`
    (transformers 5).  `group_limited_greedy` gives expert_devices = n_group and device_limit = topk_group;
    `greedy`, which does not look at n_group, gives no limit, and n_group devices where that divides the experts.
    When no layer has experts, `moe` is None.

    The file has no word for token dropping and for two of the three balance losses: capacity_factor is None,
    balance.expert is `aux_loss_alpha` (0 where absent), balance.device and balance.communication are 0.
    Keys that do not change the function (token ids, cache, pretraining_tp) are not looked at.
    ConfigError lists every value that this model cannot have, by its name in the file.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: holds a {type(mapping).__name__}, expected an object of keys and values")
    read = _Reader(mapping, source)
    if mapping.get("model_type") != MODEL_TYPE:
        read.refuse("model_type", f"{MODEL_TYPE!r}")
    read.fixed(_FIXED)
    sizes = {key: read.integer(key, smallest) for key, smallest in _SIZES.items()}
    if sizes["qk_rope_head_dim"] % 2:
        read.refuse("qk_rope_head_dim", "an even width: rotations act on pairs")
    rank = None if "q_lora_rank" in mapping and mapping["q_lora_rank"] is None else read.integer("q_lora_rank", 1)
    if mapping.get("num_key_value_heads") not in (None, mapping.get("num_attention_heads")):
        read.refuse("num_key_value_heads", f"num_attention_heads ({mapping.get('num_attention_heads')}) or null: latent attention groups no heads")
    moe = _moe_from(read, sizes["num_hidden_layers"])
    theta, yarn = _rope_from(read)
    tied = mapping.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        read.refuse("tie_word_embeddings", "true or false")
    eps = read.number("rms_norm_eps", 1e-6, "a number >= 0", lambda x: x >= 0)
    std = read.number("initializer_range", 0.02, "a number > 0", lambda x: x > 0)
    if read.problems:
        raise ConfigError(*read.problems)
    heads: dict[str, Any] = {key: sizes[key] for key in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    outer: dict[str, Any] = {key: size for key, size in sizes.items() if key not in heads}
    try:
        attention = AttentionConfig(kind="mla", q_lora_rank=rank, rope_theta=theta, yarn=yarn, **heads)
        return ModelConfig(
            attention=attention, moe=MoEConfig(**moe) if moe else None, rms_norm_eps=eps, initializer_range=std, tie_word_embeddings=tied, **outer
        )
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def _moe_from(read: _Reader, layers: int) -> dict[str, Any] | None:
    """The arguments of MoEConfig; None when no layer has experts."""
    mapping = read.mapping
    dense = read.integer("first_k_dense_replace", 0, absent=0)
    if dense >= layers or mapping.get("n_routed_experts", 0) is None:
        return None
    before = len(read.problems)
    experts, chosen, width = (read.integer(key, smallest) for key, smallest in _EXPERT_SIZES.items())
    sound = len(read.problems) == before
    shared = 0 if "n_shared_experts" in mapping and mapping["n_shared_experts"] is None else read.integer("n_shared_experts", 0)
    if sound and chosen > experts:
        read.refuse("num_experts_per_tok", f"at most n_routed_experts ({experts})")
    devices, limit = _groups_from(read, experts, chosen, sound)
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "n_shared_experts": shared,
        "first_k_dense_replace": dense,
        "routed_scaling_factor": read.number("routed_scaling_factor", 1.0, "a number", lambda x: True),
        "expert_devices": devices,
        "device_limit": limit,
        "balance": BalanceConfig(
            expert=read.number("aux_loss_alpha", 0.0, "a number >= 0", lambda x: x >= 0),
            scope="batch" if mapping.get("seq_aux") is False else "sequence",
            device=0.0,
            communication=0.0,
        ),
    }


def _groups_from(read: _Reader, experts: int, chosen: int, sound: bool) -> tuple[int, int | None]:
    """expert_devices and device_limit; only where the numbers of experts are `sound` are they compared with the groups."""
    method = read.mapping.get("topk_method", "greedy")
    if method == "greedy":
        groups = read.mapping.get("n_group")
        return (groups, None) if isinstance(groups, int) and not isinstance(groups, bool) and groups > 0 and experts % groups == 0 else (1, None)
    if method != "group_limited_greedy":
        read.refuse("topk_method", "'greedy' or 'group_limited_greedy'")
        return 1, None
    groups = read.integer("n_group", 1)
    limit = read.integer("topk_group", 1, largest=groups)
    if sound and experts % groups:
        read.refuse("n_group", f"a divisor of n_routed_experts ({experts})")
    elif sound and limit * (experts // groups) < chosen <= experts:
        read.refuse(
            "num_experts_per_tok", f"at most {limit * (experts // groups)}, the experts of topk_group ({limit}) groups of {experts // groups}"
        )
    return groups, limit


def _rope_from(read: _Reader) -> tuple[float, YarnConfig | None]:
    """rope_theta and YaRN.  As in transformers a `rope_scaling` with content goes before `rope_parameters`."""
    name = "rope_scaling" if read.mapping.get("rope_scaling") else "rope_parameters"
    rope = read.mapping.get(name) or {}
    if not isinstance(rope, Mapping):
        read.refuse(name, "a mapping or null")
        return 1.0, None
    inner = _Reader(rope, f"{read.where}: {name}")
    inner.fixed(_ROPE_FIXED)
    for key in sorted(set(rope) - set(_ROPE_KEYS) - set(_ROPE_FIXED)):
        inner.refuse(key, f"one of {', '.join(_ROPE_KEYS)}")
    theta_in = inner if "rope_theta" in rope else read
    theta = theta_in.number("rope_theta", 10000.0, "a number > 1", lambda x: x > 1)
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.get(key, "default")
    yarn = None
    if kind == "yarn":
        yarn = _yarn_from(inner, read.mapping.get("max_position_embeddings"))
    elif kind not in ("default", None):
        inner.refuse(key, "'yarn' or 'default'")
    read.problems += inner.problems
    return theta, yarn


def _yarn_from(read: _Reader, positions: Any) -> YarnConfig | None:
    """YaRN's values, with the defaults of transformers where a key is absent; None when one is refused."""
    factor = read.number("factor", None, "a number >= 1", lambda x: x >= 1)
    original = read.integer("original_max_position_embeddings", 1, absent=positions)
    fast = read.number("beta_fast", 32.0, "a number > 0", lambda x: x > 0)
    slow = read.number("beta_slow", 1.0, f"a number in 0..{fast} (beta_fast)", lambda x: 0 < x <= fast)
    mscale = read.number("mscale", 0.0, "a number >= 0", lambda x: x >= 0)
    whole = read.number("mscale_all_dim", 0.0, "a number >= 0", lambda x: x >= 0)
    if not mscale and not whole:
        mscale = 1.0
    if not _agreed(mscale, whole):
        read.refuse("mscale", "mscale and mscale_all_dim both > 0, or neither: the known implementations differ in what one alone means")
    if read.problems:
        return None
    return YarnConfig(factor=factor, original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow, mscale=mscale, mscale_all_dim=whole)


def _agreed(mscale: float, mscale_all_dim: float) -> bool:
    """Whether transformers and the released code read the pair alike, as this project does."""
    return (mscale > 0 and mscale_all_dim > 0) or (mscale == 1 and mscale_all_dim == 0)


ONLY_MOE = {"selection": "affinity", "norm_topk_prob": False, "second_expert": "always", "gated_experts": True, "moe_layer_freq": 1}
"""What that architecture cannot say otherwise."""


def config_to_hf(config: ModelConfig, max_position_embeddings: int = 4096) -> dict[str, Any]:
    """A config.json mapping that transformers reads as the same function.

    `max_position_embeddings` is written unless YaRN says it (factor times the original length).  Without a
    device limit the method is `greedy` and n_group = topk_group = expert_devices; without experts every layer
    is dense and one expert stands there that no layer has.  Not written, for there is no word: token dropping,
    the device and the communication loss.  The token ids are null: they are the tokenizer's.
    ConfigError lists what that architecture cannot say.
    """
    a, moe, yarn = config.attention, config.moe, config.attention.yarn
    problems = []
    if a.kind != "mla":
        problems.append(f"attention.kind = {a.kind!r}: {ARCHITECTURE} has no other attention than 'mla'")
    if config.hidden_size % a.num_attention_heads:
        problems.append(f"hidden_size = {config.hidden_size}: {ARCHITECTURE} takes a multiple of num_attention_heads ({a.num_attention_heads}) only")
    if yarn is not None and not _agreed(yarn.mscale, yarn.mscale_all_dim):
        problems.append(
            f"attention.yarn: mscale = {yarn.mscale}, mscale_all_dim = {yarn.mscale_all_dim}: "
            f"{ARCHITECTURE} reads this otherwise; valid: both > 0, or 1 and 0"
        )
    only: list[tuple[str, Any, Any]] = [("activation", config.activation, "silu"), ("gated_ffn", config.gated_ffn, True)]
    if moe is not None:
        only += [(f"moe.{name}", getattr(moe, name), valid) for name, valid in ONLY_MOE.items()]
    problems += [f"{name} = {value!r}: {ARCHITECTURE} has {valid!r} only" for name, value, valid in only if value != valid]
    if problems:
        raise ConfigError(*problems)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_attention_heads,
        "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
        **_moe_to(moe, config.num_hidden_layers),
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": max_position_embeddings if yarn is None else int(yarn.factor * yarn.original_max_position_embeddings),
        "rope_theta": float(a.rope_theta),
        "rope_scaling": None if yarn is None else _yarn_to(yarn),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _moe_to(moe: MoEConfig | None, layers: int) -> dict[str, Any]:
    value = moe or MoEConfig(n_routed_experts=1, num_experts_per_tok=1, moe_intermediate_size=1, balance=BalanceConfig(expert=0.0))
    return {
        "n_routed_experts": value.n_routed_experts,
        "num_experts_per_tok": value.num_experts_per_tok,
        "moe_intermediate_size": value.moe_intermediate_size,
        "n_shared_experts": value.n_shared_experts,
        "first_k_dense_replace": value.first_k_dense_replace if moe else layers,
        "moe_layer_freq": 1,
        "routed_scaling_factor": float(value.routed_scaling_factor),
        "topk_method": "greedy" if value.device_limit is None else "group_limited_greedy",
        "n_group": value.expert_devices,
        "topk_group": value.expert_devices if value.device_limit is None else value.device_limit,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "aux_loss_alpha": value.balance.expert,
        "seq_aux": value.balance.scope == "sequence",
    }


def _yarn_to(yarn: YarnConfig) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": float(yarn.factor),
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }
