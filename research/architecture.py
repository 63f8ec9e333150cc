"""What a model *is*: frozen values, no behaviour beyond derived sizes.

Attention and expert shapes keep the names of the published DeepSeek-V2 configuration; what that
file names obscurely has a plain name here with the paper's symbol beside it.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

AttentionKind = Literal["mla", "mha", "gqa", "mqa"]
Activation = Literal["silu", "gelu", "relu"]

FORBID_UNKNOWN = {"extra": "forbid", "allow_inf_nan": False}
"""How pydantic reads a configuration: no unknown keys, no numbers that are none."""


def require(condition: bool, sentence: str) -> None:
    """ValueError with `sentence` if not."""
    if not condition:
        raise ValueError(sentence)


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """YaRN (V2 section 3.1.4): the rotary part alone is stretched from `original_max_position_embeddings` to `factor` times as much."""

    __pydantic_config__: ClassVar[Any] = FORBID_UNKNOWN

    factor: float
    """Scale s; 40 in the paper, for 160K positions out of 4K."""
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    """The paper's beta: pairs that turn more often than this over the original length are left alone."""
    beta_slow: float = 1.0
    """The paper's alpha: pairs that turn less often than this are stretched by the whole factor."""
    mscale: float = 0.707
    mscale_all_dim: float = 0.707
    """sqrt(t) = 0.1 mscale ln s + 1.  The logits are scaled by the square of that of `mscale_all_dim`, the rotary parts
    besides by the ratio of the two (1 when they are equal, as published)."""

    def __post_init__(self) -> None:
        require(self.factor >= 1, f"factor={self.factor} must be >= 1")
        require(self.original_max_position_embeddings > 0, f"original_max_position_embeddings={self.original_max_position_embeddings} must be > 0")
        require(0 < self.beta_slow <= self.beta_fast, f"beta_slow={self.beta_slow} must lie in 0..{self.beta_fast} (beta_fast)")
        for name in ("mscale", "mscale_all_dim"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be >= 0")

    def length_scale(self, mscale: float) -> float:
        """sqrt(t) of V2 section 3.1.4: 0.0707 ln s + 1 for mscale 0.707."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def logit_scale(self) -> float:
        return self.length_scale(self.mscale_all_dim) ** 2

    @property
    def rotary_scale(self) -> float:
        return self.length_scale(self.mscale) / self.length_scale(self.mscale_all_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """One attention layer (V2 section 2.1, equations 37 to 47).

    For `mha`, `gqa` and `mqa` a head is `qk_nope_head_dim + qk_rope_head_dim` wide for queries and
    keys (only the rotary part is rotated) and `v_head_dim` wide for values, so that the kinds differ
    in what is shared and cached, not in the width of a head.
    """

    __pydantic_config__: ClassVar[Any] = FORBID_UNKNOWN

    kind: AttentionKind = "mla"
    num_attention_heads: int
    num_key_value_heads: int | None = None
    """Only for `gqa`; `mha` has as many as heads, `mqa` one."""
    q_lora_rank: int | None = None
    """Query latent d_c' (MLA); None: queries are not compressed."""
    kv_lora_rank: int = 512
    """Key/value latent d_c (MLA)."""
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    """Decoupled rotary width d_h^R."""
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None
    """Context extension of the rotary part; None: none."""

    def __post_init__(self) -> None:
        require(self.qk_nope_head_dim >= 0, f"qk_nope_head_dim={self.qk_nope_head_dim} must be >= 0")
        for name in ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
        require(self.q_lora_rank is None or self.q_lora_rank > 0, f"q_lora_rank={self.q_lora_rank} must be > 0 or null")
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotations act on pairs")
        require(self.rope_theta > 0, f"rope_theta={self.rope_theta} must be > 0")
        require(self.yarn is None or self.rope_theta > 1, f"rope_theta={self.rope_theta} must be > 1 with yarn, which divides by its logarithm")
        if self.kind == "gqa":
            groups = self.num_key_value_heads
            require(groups is not None, "kind=gqa needs num_key_value_heads")
            require(
                groups is not None and groups > 0 and self.num_attention_heads % groups == 0,
                f"num_key_value_heads={groups} must divide num_attention_heads={self.num_attention_heads}",
            )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values that are cached: n_h, n_g or 1 (MLA is counted by its latent instead)."""
        if self.kind == "gqa":
            assert self.num_key_value_heads is not None
            return self.num_key_value_heads
        return 1 if self.kind == "mqa" else self.num_attention_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig:
    """Weights of the balance losses: alpha 1, 2, 3 of V2 section 2.2.3, equations 23 to 31."""

    __pydantic_config__: ClassVar[Any] = FORBID_UNKNOWN

    expert: float = 0.003
    device: float = 0.05
    communication: float = 0.02
    scope: Literal["sequence", "batch"] = "sequence"
    """Over which tokens the frequencies and affinities are taken: each sequence (DeepSeek-V2), or the whole batch (Switch, GShard, Mixtral)."""
    count_first_choice_only: bool = False
    """The frequency of an expert counts the tokens whose best expert it is, as in GShard, not all its tokens."""

    def __post_init__(self) -> None:
        for name in ("expert", "device", "communication"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be >= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """DeepSeekMoE (V2 section 2.2): shared and fine-grained routed experts on `expert_devices` devices."""

    __pydantic_config__: ClassVar[Any] = FORBID_UNKNOWN

    n_routed_experts: int
    num_experts_per_tok: int
    """K_r, routed experts that a token uses."""
    moe_intermediate_size: int
    n_shared_experts: int = 0
    first_k_dense_replace: int = 1
    """So many layers at the start keep a dense FFN."""
    moe_layer_freq: int = 1
    """Of the layers after those, the first and then every so-many-th has experts; the others stay dense."""
    selection: Literal["affinity", "hash"] = "affinity"
    """`hash`: a token's experts are drawn once and for all from its id (Roller et al. 2021); there is no gate, and weights are 1 / K."""
    norm_topk_prob: bool = False
    """Weights of the chosen experts are scaled to a sum of 1 (Mixtral, GShard)."""
    second_expert: Literal["always", "by_chance"] = "always"
    """`by_chance`: in training the second of two experts is used with probability min(1, 2 g_2) (GShard, algorithm 1)."""
    gated_experts: bool = True
    """Routed and shared experts are gated FFNs of three matrices; false: of two, as in Switch, GShard and GLaM."""
    routed_scaling_factor: float = 1.0
    expert_devices: int = 1
    """D: devices over which the routed experts of one layer are spread."""
    device_limit: int | None = None
    """M: devices that one token may reach; None is unrestricted."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity_factor: float | None = None
    """Budget over average load at training (1.0 in the paper); None: nothing is dropped.  Evaluation never drops."""
    capacity_of: Literal["device", "expert"] = "device"
    """`device`: the lowest affinities of an overfull device go (V2 section 2.2.4).  `expert`: those that come last in the
    batch go, second choices after all first ones (Switch, GShard)."""
    undropped_sequences: float = 0.1
    """Share of the training sequences whose tokens are never dropped (V2 section 2.2.4); with `capacity_of: device` only,
    since Switch and GShard spare none."""

    def __post_init__(self) -> None:
        e, k, d, m = self.n_routed_experts, self.num_experts_per_tok, self.expert_devices, self.device_limit
        for name in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "expert_devices", "moe_layer_freq"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
        require(self.n_shared_experts >= 0, f"n_shared_experts={self.n_shared_experts} must be >= 0")
        require(self.first_k_dense_replace >= 0, f"first_k_dense_replace={self.first_k_dense_replace} must be >= 0")
        require(k <= e, f"num_experts_per_tok={k} must be <= n_routed_experts={e}")
        require(e % d == 0, f"n_routed_experts={e} must be divisible by expert_devices={d}")
        if m is not None:
            require(1 <= m <= d, f"device_limit={m} must lie in 1..{d} (expert_devices), or be null for unrestricted")
            require(k <= m * (e // d), f"num_experts_per_tok={k} does not fit on device_limit={m} devices of {e // d} experts")
        require(self.capacity_factor is None or self.capacity_factor > 0, f"capacity_factor={self.capacity_factor} must be > 0 or null")
        require(
            self.second_expert == "always" or k == 2,
            f"second_expert={self.second_expert} needs num_experts_per_tok=2, it is {k}",
        )
        require(
            self.selection == "affinity" or m is None,
            f"device_limit={m} with selection={self.selection}: hashed experts have no affinity to limit by; use null",
        )
        require(0 <= self.undropped_sequences <= 1, f"undropped_sequences={self.undropped_sequences} must lie in 0..1")

    @property
    def experts_per_device(self) -> int:
        return self.n_routed_experts // self.expert_devices


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only language model: pre-norm RMSNorm, attention, SwiGLU FFN or DeepSeekMoE."""

    __pydantic_config__: ClassVar[Any] = FORBID_UNKNOWN

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    """Hidden width of the dense FFN layers."""
    attention: AttentionConfig
    moe: MoEConfig | None = None
    """None: every layer is dense."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    activation: Activation = "silu"
    """Of dense FFNs and experts alike."""
    gated_ffn: bool = True
    """Dense FFNs are gated (three matrices); false: two matrices."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
        require(self.initializer_range > 0, f"initializer_range={self.initializer_range} must be > 0")
        require(self.rms_norm_eps >= 0, f"rms_norm_eps={self.rms_norm_eps} must be >= 0")
        if self.moe is not None:
            require(
                self.moe.first_k_dense_replace <= self.num_hidden_layers,
                f"moe.first_k_dense_replace={self.moe.first_k_dense_replace} must be <= num_hidden_layers={self.num_hidden_layers}",
            )

    def is_moe_layer(self, layer: int) -> bool:
        if self.moe is None or layer < self.moe.first_k_dense_replace:
            return False
        return (layer - self.moe.first_k_dense_replace) % self.moe.moe_layer_freq == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))
