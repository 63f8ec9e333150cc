"""How the GPUs divide the model, and how many positions of cache that leaves room for."""

from dataclasses import asdict, dataclass
from typing import Any

from research import accounting
from research.config import ModelConfig
from research.errors import ConfigError
from sims.cluster import Cluster
from sims.serving.spec import Serving, model_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Who holds what.  A rank is a group of `tensor_parallel` GPUs that share a sequence's attention."""

    gpus: int
    """Of one replica."""
    replicas: int
    """Groups that share nothing (dense models); all but one are left out of the simulation."""
    tensor_parallel: int
    expert_parallel: int
    """GPUs over which the routed experts are spread; 1 without experts."""

    @property
    def ranks(self) -> int:
        return self.gpus // self.tensor_parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Bytes of one GPU, and what they hold of the cache per rank."""

    memory_bytes: float
    """The GPU's memory."""
    weights_bytes: float
    activation_bytes: float
    """Of the largest step that `max_batched_tokens` allows."""
    runtime_bytes: float
    """What `memory_utilization` leaves alone."""
    cache_bytes: float
    kv_bytes_per_token: float
    """Of the whole model, all GPUs that share the sequence together, without copies."""
    kv_bytes_per_token_per_gpu: float
    tokens_per_rank: int
    tokens: int
    """Positions of cache of all GPUs, all replicas included; no position is counted twice."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit(spec: Serving, model: ModelConfig, cluster: Cluster) -> tuple[Layout, Capacity]:
    """With `tensor_parallel` null, the degree that leaves the most room for cache (the least such).

    ConfigError for degrees that do not divide what they split, and for what does not fit.
    """
    heads = model.attention.num_attention_heads
    degrees = [n for n in range(1, spec.gpus_per_node + 1) if spec.gpus_per_node % n == 0 and heads % n == 0]
    if spec.tensor_parallel is not None:
        return _checked(spec, model, cluster, layout(spec, model, spec.tensor_parallel))
    rooms = [(layout(spec, model, shards), _room(spec, model, cluster, layout(spec, model, shards))) for shards in degrees]
    best, _ = max(rooms, key=lambda pair: (pair[1].tokens, pair[1].cache_bytes))
    return _checked(spec, model, cluster, best)


def layout(spec: Serving, model: ModelConfig, shards: int) -> Layout:
    """ConfigError for degrees that do not divide what they split."""
    if spec.gpus_per_node % shards:
        raise ConfigError(f"tensor_parallel = {shards}: must divide gpus_per_node = {spec.gpus_per_node} (a sequence's heads stay in one node)")
    heads = model.attention.num_attention_heads
    if heads % shards:
        raise ConfigError(f"tensor_parallel = {shards}: must divide the model's num_attention_heads = {heads}")
    if model.moe is None:
        return Layout(gpus=shards, replicas=spec.gpus // shards, tensor_parallel=shards, expert_parallel=1)
    experts = model.moe.n_routed_experts
    if experts % spec.gpus:
        valid = [n for n in range(1, experts + 1) if experts % n == 0]
        raise ConfigError(
            f"nodes = {spec.nodes} x gpus_per_node = {spec.gpus_per_node}: the model's {experts} routed experts cannot be spread evenly "
            f"over {spec.gpus} GPUs; valid numbers of GPUs: {', '.join(map(str, valid))}"
        )
    return Layout(gpus=spec.gpus, replicas=1, tensor_parallel=shards, expert_parallel=spec.gpus)


def weights_per_gpu(model: ModelConfig, split: Layout, bits: float) -> float:
    """Bytes: routed experts over all GPUs of the replica, all else over `tensor_parallel`."""
    total, routed = accounting.total_parameters(model), routed_parameters(model)
    return ((total - routed) / split.tensor_parallel + routed / split.expert_parallel) * bits / 8


def routed_parameters(model: ModelConfig) -> int:
    """Parameters of all routed experts of all layers."""
    if model.moe is None:
        return 0
    moe = model.moe
    each = (3 if moe.gated_experts else 2) * model.hidden_size * moe.moe_intermediate_size
    return len(model.moe_layers) * moe.n_routed_experts * each


def activation_bytes(model: ModelConfig, split: Layout, tokens: int) -> float:
    """The widest moment of a step of `tokens` tokens per rank, in bfloat16: nothing is kept for a backward pass, so one layer counts.

    The residual stream and its norm; beside them queries, keys, values and mixed values of all heads, or the FFN's hidden widths
    (gate, up, product), or those of the K experts of each token with their inputs and outputs.
    """
    a, d = model.attention, model.hidden_size
    widths = [a.num_attention_heads * 2 * (a.qk_head_dim + a.v_head_dim), 3 * model.intermediate_size]
    if model.moe is not None:
        widths.append(model.moe.num_experts_per_tok * (2 * d + 3 * model.moe.moe_intermediate_size))
    return 2.0 * tokens * (2 * d + max(widths) / split.tensor_parallel)


def _checked(spec: Serving, model: ModelConfig, cluster: Cluster, split: Layout) -> tuple[Layout, Capacity]:
    room = _room(spec, model, cluster, split)
    if room.tokens_per_rank < spec.block_tokens:
        usable = room.memory_bytes - room.runtime_bytes
        raise ConfigError(
            f"model = {model_name(spec.model)}: weights of {room.weights_bytes / 1e9:.1f} GB (weight_bits = {spec.weight_bits}, tensor_parallel = "
            f"{split.tensor_parallel}) and activations of {room.activation_bytes / 1e9:.1f} GB (max_batched_tokens = {spec.max_batched_tokens}) "
            f"leave no room for a cache in the {usable / 1e9:.1f} GB that memory_utilization = {spec.memory_utilization} allows of each GPU of "
            f"{cluster.name}; take more GPUs, fewer bits or a larger tensor_parallel"
        )
    return split, room


def _room(spec: Serving, model: ModelConfig, cluster: Cluster, split: Layout) -> Capacity:
    memory = cluster.hbm_bytes.value
    weights, activations = weights_per_gpu(model, split, spec.weight_bits), activation_bytes(model, split, spec.max_batched_tokens)
    usable = spec.memory_utilization * memory
    room = usable - weights - activations
    per_token, per_gpu = kv_bytes(spec, model, split)
    tokens = max(0, int(room // (per_gpu * spec.block_tokens))) * spec.block_tokens
    return Capacity(
        memory_bytes=memory,
        weights_bytes=weights,
        activation_bytes=activations,
        runtime_bytes=memory - usable,
        cache_bytes=room,
        kv_bytes_per_token=per_token,
        kv_bytes_per_token_per_gpu=per_gpu,
        tokens_per_rank=tokens,
        tokens=tokens * split.ranks * split.replicas,
    )


def kv_bytes(spec: Serving, model: ModelConfig, split: Layout) -> tuple[float, float]:
    """Bytes of one cached position: of the model, and of each GPU of its rank.

    Heads of keys and values are divided among tensor-parallel GPUs (and copied where there are more GPUs than heads); the one
    latent of MLA serves all heads and is held by each.
    """
    whole = (
        float(accounting.kv_cache_bytes_per_token_stored(model, spec.kv_bits))
        if spec.kv_as_stored
        else accounting.kv_cache_bytes_per_token(model, spec.kv_bits)
    )
    shared = 1 if model.attention.kind == "mla" else min(split.tensor_parallel, model.attention.key_value_heads)
    return whole, whole / shared
