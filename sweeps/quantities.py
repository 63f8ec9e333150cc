"""What a run costs, known before it is trained: the quantities that a budget holds equal and a constraint may bound."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from research import accounting
from research.config import RunConfig
from research.configfile import validate
from research.memory import training_memory
from sims import AllToAll, simulate
from sweeps import schema

if TYPE_CHECKING:
    from sweeps.definition import Study

FORWARD_AND_BACKWARD = 2
"""All-to-alls of a training step over those of a forward pass: gradients go back the ways the tokens came."""


def training_flops(config: RunConfig) -> float:
    """Of all training tokens, forward and backward."""
    return accounting.train_flops_per_token(config.model, config.data.sequence_length) * config.tokens


def memory_bytes(config: RunConfig) -> float:
    """Predicted peak of a training step."""
    size = config.training.micro_batch_size or config.training.batch_size
    return training_memory(
        config.model,
        size * config.data.sequence_length,
        micro_batches=config.training.batch_size // size,
        checkpointed=config.training.activation_checkpointing == "blocks",
    ).peak


def _one_layer(spec: AllToAll) -> tuple[float, float]:
    """Seconds and bytes (over NVLink and InfiniBand) of dispatch and combine of one MoE layer whose tokens are routed by random
    logits.  The one place where a study asks the cluster model before training."""
    return _answered(json.dumps(asdict(spec), sort_keys=True))


@lru_cache(maxsize=4096)
def _answered(question: str) -> tuple[float, float]:
    """Of the fields of an AllToAll as JSON, which makes a key."""
    result = simulate(validate(AllToAll, json.loads(question), "all-to-all")).to_dict()
    return float(result["seconds"]), float(result["nvlink_bytes"] + result["infiniband_bytes"])


def communication(study: "Study", config: RunConfig) -> tuple[float, float]:
    """Seconds and bytes of the all-to-alls of a whole training on the study's cluster; 0 for a dense model.

    One simulated pass moves nodes x gpus_per_node x tokens_per_device tokens through one layer.  ValueError or ConfigError if
    the experts do not fit on the cluster.
    """
    if not config.model.moe_layers:
        return 0.0, 0.0
    spec = study.all_to_all(config)
    seconds, volume = _one_layer(replace(spec, seed=0))
    passes = FORWARD_AND_BACKWARD * len(config.model.moe_layers) * config.tokens / (spec.nodes * spec.gpus_per_node * spec.tokens_per_device)
    return seconds * passes, volume * passes


Quantity = Callable[["Study", RunConfig], float]

QUANTITIES: dict[str, Quantity] = {
    "tokens": lambda study, config: float(config.tokens),
    "training_flops": lambda study, config: training_flops(config),
    "activated_parameters": lambda study, config: float(accounting.activated_parameters(config.model)),
    "total_parameters": lambda study, config: float(accounting.total_parameters(config.model)),
    "kv_bytes": lambda study, config: accounting.kv_cache_bytes_per_token(config.model),
    "communication_seconds": lambda study, config: communication(study, config)[0],
    "communication_bytes": lambda study, config: communication(study, config)[1],
}
"""What a budget can hold equal: training tokens, FLOPs of the training, parameters, cache bytes per token at 16 bits, and the
all-to-alls of the training on the study's cluster (random logits route them)."""

BEFORE_TRAINING: dict[str, Quantity] = {
    **QUANTITIES,
    "memory_bytes": lambda study, config: memory_bytes(config),
    schema.KV_BYTES_PER_TOKEN: QUANTITIES["kv_bytes"],
    schema.TOTAL_PARAMETERS: QUANTITIES["total_parameters"],
    schema.ACTIVATED_PARAMETERS: QUANTITIES["activated_parameters"],
    schema.TRAIN_FLOPS_PER_TOKEN: lambda study, config: accounting.train_flops_per_token(config.model, config.data.sequence_length),
}
"""What a constraint can be decided by before a run starts."""


def recorded_metrics(config: RunConfig, metrics: list[str]) -> list[str]:
    """Those of `metrics` that a run of this configuration records: a model without routed experts routes nothing."""
    routed = bool(config.model.moe_layers)
    narrow = set(schema.cache_metrics(config.training.cache_bits))
    layers = {f"{schema.EXPERT_VIOLATION}/layer_{layer}" for layer in config.model.moe_layers}

    def has(metric: str) -> bool:
        if metric.startswith(f"{schema.EXPERT_VIOLATION}/"):
            return metric in layers
        if metric.startswith("cache/"):
            return metric in narrow
        return routed or not metric.startswith(("routing/", "simulation/", "train/balance_"))

    return [metric for metric in metrics if has(metric)]


def describe(config: RunConfig) -> dict[str, Any]:
    """The closed forms of one run, for `plan`."""
    return {
        "total_parameters": accounting.total_parameters(config.model),
        "activated_parameters": accounting.activated_parameters(config.model),
        "kv_cache_bytes_per_token": accounting.kv_cache_bytes_per_token(config.model),
        "train_tokens": config.tokens,
        "train_flops": training_flops(config),
        "memory_bytes": memory_bytes(config),
    }
