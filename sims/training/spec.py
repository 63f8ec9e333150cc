"""The question: this model, trained so, on these nodes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from research.config import ModelConfig
from research.presets import deepseek_v2
from sims.links import check_links
from sims.routing import FAMILIES
from sims.training.schedules import Schedule

Recompute = Literal["none", "partial", "full"]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStep:
    """A step of `batch_size` sequences on nodes x gpus_per_node GPUs = pipeline x tensor x data parallel.

    Expert-parallel groups lie inside the data-parallel ones.  Defaults are DeepSeek-V2's published set-up (V2 section 3.1.3) on
    1,024 GPUs; on how many it was trained, and whether the 8 GPUs of a layer share a node, is not published.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    model: ModelConfig = field(default_factory=deepseek_v2)
    cluster: str = "h800"
    nodes: int = 128
    gpus_per_node: int = 8
    pipeline_parallel: int | None = None
    """Stages; None: as many as fit, 16 at most."""
    expert_parallel: int | None = None
    """GPUs that share the routed experts of a layer; None: the model's `moe.expert_devices`, 1 for a dense model."""
    tensor_parallel: int = 1
    """GPUs that share heads and FFN widths, with sequence parallelism between products; not together with expert parallelism."""
    placement: str = "either"
    """Of an expert-parallel group: `packed` into as few nodes as it fits in, or `spread`, one GPU of each node.  `either`, since the
    paper does not say: both, equally likely, where both are possible; the draws of both are pooled."""
    schedule: Schedule = "zero-bubble"
    layers_per_stage: tuple[int, ...] | None = None
    """None: as even as possible in FLOPs, the head counted with the last stage."""
    batch_size: int = 9216
    """Sequences of a step (the global batch)."""
    micro_batch_size: int = 1
    """Sequences of one forward pass of a data-parallel rank."""
    sequence_length: int = 4096
    recompute: Recompute = "partial"
    """`partial`: norms, MLA's up-projections and activations between products (as DeepSeek-V3 says it); `full`: whole blocks,
    all-to-alls included."""
    dispatch_bits: int = 16
    combine_bits: int = 16
    communication_sms: int | None = None
    """SMs that an all-to-all takes; None: the cluster's figure."""
    shared_expert_overlap: bool = True
    """The shared experts compute while tokens travel (V2 section 3.1.3)."""
    gradient_overlap: bool = True
    """Gradients are reduced during the backward pass of the last microbatch."""
    routing: str = "balanced"
    """A family of `sims.routing`; a trace of a trained model overrules it."""
    routing_samples: int = 4
    """Different routings that microbatches and layers take turns in."""
    speed: dict[int, float] = field(default_factory=dict)
    """GPU index -> time of its computing over that of the others (1.25: a quarter slower)."""
    nic: dict[int, float] = field(default_factory=dict)
    """GPU index -> share of its NIC's bandwidth that is left, for all-to-alls, sends between stages and the reduction of gradients."""
    nvlink: dict[int, float] = field(default_factory=dict)
    """GPU index -> share of its NVLink bandwidth that is left."""
    tier: Literal["closed", "event"] = "closed"
    """`event` also plays the step in SimPy, an event for each phase."""
    jitter: float = 0.0
    """Standard deviation of the logarithm of a phase's time, in the event tier."""
    draws: int = 64
    """Of the calibrated constants."""
    constants: dict[str, float] = field(default_factory=dict)
    """Calibrated constant -> value that it has in every draw: a what-if."""
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("nodes", "gpus_per_node", "tensor_parallel", "batch_size", "micro_batch_size", "sequence_length", "routing_samples", "draws")
        for name in sizes:
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be >= 1")
        for name in ("pipeline_parallel", "expert_parallel", "communication_sms"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name}={value} must be >= 1, or null")
        for name in ("dispatch_bits", "combine_bits"):
            _require(getattr(self, name) in (8, 16), f"{name}={getattr(self, name)} must be 8 (with scales) or 16")
        _require(self.seed >= 0, f"seed={self.seed} must be >= 0")
        _require(0 <= self.jitter < 1, f"jitter={self.jitter} must lie in 0..1")
        _require(self.jitter == 0 or self.tier == "event", f"jitter={self.jitter} needs tier=event")
        _require(self.placement in ("packed", "spread", "either"), f"placement={self.placement!r} must be packed, spread or either")
        _require(self.routing in FAMILIES, f"routing={self.routing!r} must be one of {', '.join(FAMILIES)}")
        for gpu, factor in self.speed.items():
            _require(0 <= gpu < self.gpus, f"speed.{gpu}={factor}: there is no such GPU; valid: 0 to {self.gpus - 1}")
            _require(factor > 0, f"speed.{gpu}={factor} must be > 0")
        check_links(self.nic, self.nvlink, self.gpus)
        self._check_parallelism()
        self._check_stages()

    @property
    def can_spread(self) -> bool:
        """Whether the GPUs of an expert-parallel group can each be on a node of their own."""
        return self.nodes % self.experts_over == 0

    def _check_parallelism(self) -> None:
        tensor, experts, stages = self.tensor_parallel, self.experts_over, self.stages
        _require(self.gpus_per_node % tensor == 0, f"tensor_parallel={tensor} must divide gpus_per_node={self.gpus_per_node}")
        heads = self.model.attention.num_attention_heads
        _require(heads % tensor == 0, f"tensor_parallel={tensor} must divide model.attention.num_attention_heads={heads}")
        _require(
            self.gpus % (stages * tensor) == 0,
            f"pipeline_parallel={stages} x tensor_parallel={tensor} must divide the {self.gpus} GPUs"
            f" (nodes={self.nodes} x gpus_per_node={self.gpus_per_node})",
        )
        data = self.data_parallel
        _require(
            data % experts == 0,
            f"expert_parallel={experts} must divide the {data} data-parallel ranks"
            f" ({self.gpus} GPUs / pipeline_parallel={stages} / tensor_parallel={tensor})",
        )
        if self.model.moe is None:
            _require(experts == 1, f"expert_parallel={experts}: the model has no experts; valid: 1 or null")
        else:
            count = self.model.moe.n_routed_experts
            _require(count % experts == 0, f"expert_parallel={experts} must divide model.moe.n_routed_experts={count}")
        _require(experts == 1 or tensor == 1, f"expert_parallel={experts} with tensor_parallel={tensor}: one of them must be 1")
        if self.placement == "spread":
            _require(self.can_spread, f"placement=spread: expert_parallel={experts} GPUs on as many nodes must divide nodes={self.nodes}")
        elif experts > self.gpus_per_node:
            _require(experts % self.gpus_per_node == 0, f"expert_parallel={experts} must be a multiple of gpus_per_node={self.gpus_per_node}")
        else:
            _require(self.gpus_per_node % experts == 0, f"expert_parallel={experts} must divide gpus_per_node={self.gpus_per_node}")

    def _check_stages(self) -> None:
        layers, stages = self.model.num_hidden_layers, self.stages
        _require(layers >= stages, f"pipeline_parallel={stages} must be <= model.num_hidden_layers={layers}: a stage has a layer at least")
        if self.layers_per_stage is not None:
            given = self.layers_per_stage
            _require(
                len(given) == stages and sum(given) == layers and min(given) >= 1,
                f"layers_per_stage={list(given)} must be {stages} numbers >= 1 (pipeline_parallel) with the sum {layers} (model.num_hidden_layers)",
            )
        each = self.data_parallel * self.micro_batch_size
        _require(
            self.batch_size % each == 0,
            f"batch_size={self.batch_size} must be a multiple of {each}"
            f" ({self.data_parallel} data-parallel ranks x micro_batch_size={self.micro_batch_size})",
        )
        if self.schedule == "dualpipe":
            count = self.microbatches
            _require(stages % 2 == 0, f"schedule=dualpipe needs an even pipeline_parallel, not {stages}")
            _require(
                count % 2 == 0 and count >= 2 * stages,
                f"schedule=dualpipe needs an even number of microbatches >= {2 * stages} (2 x pipeline_parallel),"
                f" batch_size={self.batch_size} gives {count}",
            )

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def experts_over(self) -> int:
        """GPUs of an expert-parallel group."""
        if self.expert_parallel is not None:
            return self.expert_parallel
        return self.model.moe.expert_devices if self.model.moe else 1

    @property
    def stages(self) -> int:
        if self.pipeline_parallel is not None:
            return self.pipeline_parallel
        each = self.tensor_parallel * self.experts_over
        most = min(16, self.model.num_hidden_layers, self.gpus)
        even = 2 if self.schedule == "dualpipe" else 1
        fitting = [n for n in range(1, most + 1) if self.gpus % (n * each) == 0 and (n % even == 0 or n == 1)]
        return max(fitting, default=1)

    @property
    def data_parallel(self) -> int:
        return self.gpus // (self.stages * self.tensor_parallel)

    @property
    def microbatches(self) -> int:
        """That a pipeline works through in a step."""
        return self.batch_size // (self.data_parallel * self.micro_batch_size)

    @property
    def tokens(self) -> int:
        """Of a microbatch of one rank."""
        return self.micro_batch_size * self.sequence_length

    @property
    def units(self) -> int:
        """Groups of pipelines that wait for each other at every layer, because they share experts: the data-parallel ranks of one
        expert-parallel group, all stages."""
        return self.data_parallel // self.experts_over
