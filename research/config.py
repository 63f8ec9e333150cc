"""What a run *is*: frozen values, no behaviour beyond derived sizes.

Attention and expert shapes keep the names of the published DeepSeek-V2 configuration; what that
file names obscurely has a plain name here with the paper's symbol beside it.  Validation of types
and unknown keys happens at the door (`configfile`); what only makes sense together is checked in
`__post_init__` and raised as ValueError with a whole sentence.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from research.schedule import BatchSchedule, batch_schedule

KV_BITS = (16, 8, 6, 4)
"""Bits per element in which a cache can be kept; 16 is bfloat16 without a grid."""

AttentionKind = Literal["mla", "mha", "gqa", "mqa"]
Domain = Literal["en", "zh", "ko", "code", "math"]
Activation = Literal["silu", "gelu", "relu"]

_FORBID_UNKNOWN = {"extra": "forbid", "allow_inf_nan": False}


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """YaRN (V2 section 3.1.4): the rotary part alone is stretched from `original_max_position_embeddings` to `factor` times as much."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

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
        _require(self.factor >= 1, f"factor={self.factor} must be >= 1")
        _require(self.original_max_position_embeddings > 0, f"original_max_position_embeddings={self.original_max_position_embeddings} must be > 0")
        _require(0 < self.beta_slow <= self.beta_fast, f"beta_slow={self.beta_slow} must lie in 0..{self.beta_fast} (beta_fast)")
        for name in ("mscale", "mscale_all_dim"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be >= 0")

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

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

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
        _require(self.qk_nope_head_dim >= 0, f"qk_nope_head_dim={self.qk_nope_head_dim} must be >= 0")
        for name in ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
        _require(self.q_lora_rank is None or self.q_lora_rank > 0, f"q_lora_rank={self.q_lora_rank} must be > 0 or null")
        _require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotations act on pairs")
        _require(self.rope_theta > 0, f"rope_theta={self.rope_theta} must be > 0")
        _require(self.yarn is None or self.rope_theta > 1, f"rope_theta={self.rope_theta} must be > 1 with yarn, which divides by its logarithm")
        if self.kind == "gqa":
            groups = self.num_key_value_heads
            _require(groups is not None, "kind=gqa needs num_key_value_heads")
            _require(
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

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    expert: float = 0.003
    device: float = 0.05
    communication: float = 0.02
    scope: Literal["sequence", "batch"] = "sequence"
    """Over which tokens the frequencies and affinities are taken: each sequence (DeepSeek-V2), or the whole batch (Switch, GShard, Mixtral)."""
    count_first_choice_only: bool = False
    """The frequency of an expert counts the tokens whose best expert it is, as in GShard, not all its tokens."""

    def __post_init__(self) -> None:
        for name in ("expert", "device", "communication"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be >= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """DeepSeekMoE (V2 section 2.2): shared and fine-grained routed experts on `expert_devices` devices."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

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
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
        _require(self.n_shared_experts >= 0, f"n_shared_experts={self.n_shared_experts} must be >= 0")
        _require(self.first_k_dense_replace >= 0, f"first_k_dense_replace={self.first_k_dense_replace} must be >= 0")
        _require(k <= e, f"num_experts_per_tok={k} must be <= n_routed_experts={e}")
        _require(e % d == 0, f"n_routed_experts={e} must be divisible by expert_devices={d}")
        if m is not None:
            _require(1 <= m <= d, f"device_limit={m} must lie in 1..{d} (expert_devices), or be null for unrestricted")
            _require(k <= m * (e // d), f"num_experts_per_tok={k} does not fit on device_limit={m} devices of {e // d} experts")
        _require(self.capacity_factor is None or self.capacity_factor > 0, f"capacity_factor={self.capacity_factor} must be > 0 or null")
        _require(
            self.second_expert == "always" or k == 2,
            f"second_expert={self.second_expert} needs num_experts_per_tok=2, it is {k}",
        )
        _require(
            self.selection == "affinity" or m is None,
            f"device_limit={m} with selection={self.selection}: hashed experts have no affinity to limit by; use null",
        )
        _require(0 <= self.undropped_sequences <= 1, f"undropped_sequences={self.undropped_sequences} must lie in 0..1")

    @property
    def experts_per_device(self) -> int:
        return self.n_routed_experts // self.expert_devices


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only language model: pre-norm RMSNorm, attention, SwiGLU FFN or DeepSeekMoE."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

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
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
        _require(self.initializer_range > 0, f"initializer_range={self.initializer_range} must be > 0")
        _require(self.rms_norm_eps >= 0, f"rms_norm_eps={self.rms_norm_eps} must be >= 0")
        if self.moe is not None:
            _require(
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text, which tokenizer, how long a sequence is."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    corpus: str = "quickstart"
    """`quickstart` or `default` (pinned archives), `installed` (text every Python has), or `files`."""
    paths: tuple[str, ...] = ()
    """For `files`: paths or globs of .txt/.md/.py (any text), .jsonl or .parquet files."""
    text_field: str = "text"
    """Column or key that holds the text in .jsonl and .parquet files."""
    tokenizer_vocab_size: int = 1024
    """Byte-level BPE vocabulary trained on the corpus."""
    sequence_length: int = 256
    mixture: dict[str, float] = field(default_factory=dict)
    """Sampling weight per domain; empty: in proportion to size in tokens."""
    mask_documents: bool = False
    """Attention does not cross the end-of-text token, in training and in validation; false: a sequence sees all that was
    packed into it.  A document here is a block of the corpus (at most 8,000 characters)."""
    max_train_megabytes: float | None = None
    """Cut each corpus to about this much text (deterministically, whole documents), domain shares kept."""

    def __post_init__(self) -> None:
        _require(self.sequence_length >= 2, f"sequence_length={self.sequence_length} must be >= 2")
        _require(
            self.tokenizer_vocab_size >= 260, f"tokenizer_vocab_size={self.tokenizer_vocab_size} must be >= 260 (256 bytes and the special tokens)"
        )
        _require(
            (self.corpus == "files") == bool(self.paths),
            f"corpus={self.corpus!r} with paths={list(self.paths)}: paths go with corpus 'files', and only with it",
        )
        _require(all(w >= 0 for w in self.mixture.values()), f"mixture={self.mixture} must have weights >= 0")
        _require(not self.mixture or sum(self.mixture.values()) > 0, f"mixture={self.mixture} needs a weight > 0")
        _require(self.max_train_megabytes is None or self.max_train_megabytes > 0, f"max_train_megabytes={self.max_train_megabytes} must be > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and the paper's schedule (V2 section 3.1.2): warm-up, then two steps down."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    learning_rate: float = 2.4e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.6, 0.9)
    """Shares of all tokens at which the rate is multiplied by `decay_factor`."""
    decay_factor: float = 0.316
    base_width: int | None = None
    """The rate of every matrix but the embedding is multiplied by base_width / hidden_size, so that a rate found at this width
    is right at others (muP: Yang et al. 2022, table 3, Adam); None: the same rate for all, as in the paper."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be > 0")
        _require(self.gradient_clip > 0, f"gradient_clip={self.gradient_clip} must be > 0")
        _require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must be >= 0")
        _require(all(0 < x <= 1 for x in self.decay_at), f"decay_at={list(self.decay_at)} must lie in 0..1")
        _require(list(self.decay_at) == sorted(self.decay_at), f"decay_at={list(self.decay_at)} must ascend")
        _require(self.base_width is None or self.base_width > 0, f"base_width={self.base_width} must be > 0 or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How long, in which batches, how often something is written down."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    train_tokens: int
    batch_size: int = 8
    """Sequences per optimizer step (the global batch)."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; None: the whole batch at once."""
    batch_ramp_from: int | None = None
    """Sequences of the first step: the batch grows linearly in tokens from here to `batch_size`, in multiples of
    `micro_batch_size` (2304 to 9216 in V2 section 3.1.2); None: `batch_size` throughout."""
    batch_ramp_tokens: int | None = None
    """Tokens over which it grows (225e9 of 8.1e12 in the paper)."""
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the products in training.  `bfloat16` is autocast: weights, optimizer state, gate, softmax and norms stay float32.
    `auto` is bfloat16 on a GPU and float32 on a CPU.  `float64` keeps everything in it: to compare, not to train."""
    activation_checkpointing: Literal["none", "blocks"] = "none"
    """`blocks`: each block keeps its input alone and is computed again for the backward pass: a third more time, much less memory."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    record_every: int = 10
    """Steps between records of the losses and the routing."""
    validate_every: int = 200
    validation_tokens: int = 32768
    """Held-out tokens per domain (all there are, if fewer)."""
    cache_bits: tuple[int, ...] = ()
    """The held-out text is also predicted out of a cache of each of these widths at the end (16, 8, 6 or 4 bits per element)."""
    checkpoint_every: int = 200
    """Steps; one is also written at a stop and at the end."""
    checkpoint_seconds: float | None = 600.0
    """One is also written at the first record after so many seconds without; null: by steps alone."""
    keep_checkpoints: int = 1
    """So many of the last ones are kept: the newest is checkpoint/, those before it are checkpoints/step-N/."""
    keep_best: bool = False
    """Also keep that of the lowest validation bits per byte, as checkpoints/best/, written at every validation that is the best so far."""
    trace_every: int = 200
    """Steps between snapshots of the routing trace."""

    def __post_init__(self) -> None:
        every = ("record_every", "validate_every", "checkpoint_every", "trace_every")
        for name in ("train_tokens", "batch_size", *every, "validation_tokens", "keep_checkpoints"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
        _require(self.checkpoint_seconds is None or self.checkpoint_seconds > 0, f"checkpoint_seconds={self.checkpoint_seconds} must be > 0 or null")
        wrong = [bits for bits in self.cache_bits if bits not in KV_BITS]
        _require(
            not wrong, f"cache_bits={list(self.cache_bits)}: no cache has {wrong[0] if wrong else 0} bits; valid: {', '.join(map(str, KV_BITS))}"
        )
        _require(len(set(self.cache_bits)) == len(self.cache_bits), f"cache_bits={list(self.cache_bits)}: a width stands there twice")
        if self.micro_batch_size is not None:
            _require(
                self.micro_batch_size > 0 and self.batch_size % self.micro_batch_size == 0,
                f"micro_batch_size={self.micro_batch_size} must divide batch_size={self.batch_size}",
            )
        self._check_ramp()

    def _check_ramp(self) -> None:
        first, tokens = self.batch_ramp_from, self.batch_ramp_tokens
        _require((first is None) == (tokens is None), f"batch_ramp_from={first} and batch_ramp_tokens={tokens} go together: give both or none")
        if first is None or tokens is None:
            return
        _require(tokens > 0, f"batch_ramp_tokens={tokens} must be > 0")
        _require(0 < first <= self.batch_size, f"batch_ramp_from={first} must lie in 1..{self.batch_size} (batch_size)")
        _require(
            self.micro_batch_size is None or first % self.micro_batch_size == 0,
            f"batch_ramp_from={first} must be a multiple of micro_batch_size={self.micro_batch_size}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run, whole.  Equal values are the same run: see `config_id`."""

    __pydantic_config__: ClassVar[Any] = _FORBID_UNKNOWN

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"seed={self.seed} must be >= 0")
        _require(
            self.model.vocab_size >= self.data.tokenizer_vocab_size,
            f"model.vocab_size={self.model.vocab_size} must be >= data.tokenizer_vocab_size={self.data.tokenizer_vocab_size}",
        )

    @property
    def schedule(self) -> BatchSchedule:
        """Batch sizes and tokens by step."""
        training = self.training
        return batch_schedule(
            train_tokens=training.train_tokens,
            sequence_length=self.data.sequence_length,
            batch_size=training.batch_size,
            first=training.batch_ramp_from,
            ramp_tokens=training.batch_ramp_tokens or 0,
            multiple=training.micro_batch_size or 1,
        )

    @property
    def micro_batches_add_up(self) -> bool:
        """Whether passes of fewer sequences give the same gradient of a micro-batch, up to rounding.  What is dropped is decided on the
        whole micro-batch first; only balance losses over a batch (`balance.scope`) are not the mean of those of its parts."""
        moe = self.model.moe
        return moe is None or moe.balance.scope == "sequence" or not (moe.balance.expert or moe.balance.device or moe.balance.communication)

    @property
    def steps(self) -> int:
        """Optimizer steps: as many whole batches as it takes to see `train_tokens` tokens."""
        return self.schedule.steps

    @property
    def tokens(self) -> int:
        """Training tokens of all the steps: `train_tokens`, and what its last batch has beyond it."""
        return self.schedule.tokens(self.steps)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a configuration (tuples become lists), ready for JSON or YAML."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_id(config: Any) -> str:
    """The run's identity: 12 hex digits of the SHA-256 of its sorted JSON."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """`path: left -> right` for every leaf in which two nested dicts differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted({*left, *right})
        return [line for key in keys for line in differences(left.get(key), right.get(key), f"{path}.{key}".lstrip("."))]
    return [] if left == right else [f"{path}: {left!r} -> {right!r}"]
