"""What a run *is*: frozen values, no behaviour beyond derived sizes.

The model's part stands in `architecture`.  Validation of types and unknown keys happens at the door
(`configfile`); what only makes sense together is checked in `__post_init__` and raised as ValueError
with a whole sentence.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from research.architecture import (
    FORBID_UNKNOWN,
    Activation,
    AttentionConfig,
    AttentionKind,
    BalanceConfig,
    ModelConfig,
    MoEConfig,
    YarnConfig,
    require,
)
from research.schedule import BatchSchedule, batch_schedule

__all__ = [
    "KV_BITS",
    "Activation",
    "AttentionConfig",
    "AttentionKind",
    "BalanceConfig",
    "BatchSchedule",
    "DataConfig",
    "Domain",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TrainingConfig",
    "YarnConfig",
    "config_id",
    "differences",
    "to_dict",
]

KV_BITS = (16, 8, 6, 4)
"""Bits per element in which a cache can be kept; 16 is bfloat16 without a grid."""

Domain = Literal["en", "zh", "ko", "code", "math"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text, which tokenizer, how long a sequence is."""

    __pydantic_config__: ClassVar[Any] = FORBID_UNKNOWN

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
        require(self.sequence_length >= 2, f"sequence_length={self.sequence_length} must be >= 2")
        require(
            self.tokenizer_vocab_size >= 260, f"tokenizer_vocab_size={self.tokenizer_vocab_size} must be >= 260 (256 bytes and the special tokens)"
        )
        require(
            (self.corpus == "files") == bool(self.paths),
            f"corpus={self.corpus!r} with paths={list(self.paths)}: paths go with corpus 'files', and only with it",
        )
        require(all(w >= 0 for w in self.mixture.values()), f"mixture={self.mixture} must have weights >= 0")
        require(not self.mixture or sum(self.mixture.values()) > 0, f"mixture={self.mixture} needs a weight > 0")
        require(self.max_train_megabytes is None or self.max_train_megabytes > 0, f"max_train_megabytes={self.max_train_megabytes} must be > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and the paper's schedule (V2 section 3.1.2): warm-up, then two steps down."""

    __pydantic_config__: ClassVar[Any] = FORBID_UNKNOWN

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
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be > 0")
        require(self.gradient_clip > 0, f"gradient_clip={self.gradient_clip} must be > 0")
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must be >= 0")
        require(all(0 < x <= 1 for x in self.decay_at), f"decay_at={list(self.decay_at)} must lie in 0..1")
        require(list(self.decay_at) == sorted(self.decay_at), f"decay_at={list(self.decay_at)} must ascend")
        require(self.base_width is None or self.base_width > 0, f"base_width={self.base_width} must be > 0 or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How long, in which batches, how often something is written down."""

    __pydantic_config__: ClassVar[Any] = FORBID_UNKNOWN

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
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
        require(self.checkpoint_seconds is None or self.checkpoint_seconds > 0, f"checkpoint_seconds={self.checkpoint_seconds} must be > 0 or null")
        wrong = [bits for bits in self.cache_bits if bits not in KV_BITS]
        require(not wrong, f"cache_bits={list(self.cache_bits)}: no cache has {wrong[0] if wrong else 0} bits; valid: {', '.join(map(str, KV_BITS))}")
        require(len(set(self.cache_bits)) == len(self.cache_bits), f"cache_bits={list(self.cache_bits)}: a width stands there twice")
        if self.micro_batch_size is not None:
            require(
                self.micro_batch_size > 0 and self.batch_size % self.micro_batch_size == 0,
                f"micro_batch_size={self.micro_batch_size} must divide batch_size={self.batch_size}",
            )
        self._check_ramp()

    def _check_ramp(self) -> None:
        first, tokens = self.batch_ramp_from, self.batch_ramp_tokens
        require((first is None) == (tokens is None), f"batch_ramp_from={first} and batch_ramp_tokens={tokens} go together: give both or none")
        if first is None or tokens is None:
            return
        require(tokens > 0, f"batch_ramp_tokens={tokens} must be > 0")
        require(0 < first <= self.batch_size, f"batch_ramp_from={first} must lie in 1..{self.batch_size} (batch_size)")
        require(
            self.micro_batch_size is None or first % self.micro_batch_size == 0,
            f"batch_ramp_from={first} must be a multiple of micro_batch_size={self.micro_batch_size}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run, whole.  Equal values are the same run: see `config_id`."""

    __pydantic_config__: ClassVar[Any] = FORBID_UNKNOWN

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed={self.seed} must be >= 0")
        require(
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
