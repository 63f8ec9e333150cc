"""The question: this model, with these requests, on these nodes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from research.accounting import KV_BITS
from research.config import ModelConfig, MoEConfig
from research.configfile import apply_overrides, known_paths, nearest, read_yaml, resolve_model, validate
from research.errors import ConfigError
from research.presets import PRESETS, preset
from sims.routing import Family
from sims.serving.requests import Lengths

WEIGHT_BITS = (16, 8, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """Continuous batching on `nodes` x `gpus_per_node` GPUs.

    Experts are spread over all GPUs.  Attention is split over `tensor_parallel` of them and repeated (data-parallel) over the
    rest.  A dense model's groups of `tensor_parallel` GPUs are replicas that share nothing; one is simulated.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False, "arbitrary_types_allowed": True}

    model: str | ModelConfig = "deepseek-v2"
    """A preset's name, a YAML file, or the configuration itself."""
    cluster: str = "h800"
    nodes: int = 1
    gpus_per_node: int = 8
    tensor_parallel: int | None = None
    """GPUs that share one sequence's attention; null: as many as leave the most room for cache (each of them holds MLA's whole latent)."""
    weight_bits: int = 16
    kv_bits: int = 16
    kv_as_stored: bool = False
    """With the steps, offsets and padding of a narrow cache (`accounting.kv_cache_bytes_per_token_stored`); false: bits alone, as published."""
    compute_bits: Literal[16, 8] = 16
    """Of the matrix products outside attention: 8 uses the FP8 peak.  Narrow weights alone do not make narrow products."""
    memory_utilization: float = 0.9
    """Share of a GPU's memory for weights, activations and cache; the rest is the runtime's (CUDA, NCCL, fragments)."""
    block_tokens: int = 64
    """Positions of a block of the paged cache."""
    admission: Literal["paged", "reserve"] = "paged"
    """`paged`: blocks as a sequence grows; the youngest is computed again when they run out.  `reserve`: all its blocks at once."""
    max_batch: int | None = None
    """Sequences at a time over all ranks; null: as many as the cache holds."""
    max_batched_tokens: int = 4096
    """Generated and prompt tokens of one step, per attention rank (chunked prefill).  All ranks wait for the one with the longest chunk."""
    lengths: Lengths = field(default_factory=Lengths)
    rate: float | None = None
    """Poisson arrivals per second; null: saturation, or `clients`."""
    clients: int | None = None
    """Closed loop: so many clients, each with one request at a time; null without a rate: there is always one waiting."""
    requests: int | None = None
    """Simulated; null: six times as many as are resident, 200 to 60,000."""
    routing: Family = "random"
    """Family of `sims.routing` by which tokens choose experts; see also `trace`."""
    device_limit: int | Literal["model"] | None = "model"
    """M; `model`: the model's own; null: unrestricted."""
    dispatch_bits: Literal[16, 8] = 16
    combine_bits: Literal[16, 8] = 16
    sms: int | None = None
    """That communication uses; null: the cluster's."""
    overlap: bool = False
    """Two half batches take turns, so that one communicates while the other computes."""
    draws: int = 64
    """Of the calibrated constants."""
    constants: dict[str, float] = field(default_factory=dict)
    """Calibrated constant -> value that it has in every draw: a what-if."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "block_tokens", "max_batched_tokens", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        for name in ("tensor_parallel", "max_batch", "clients", "requests", "sms"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1, or null")
        if self.weight_bits not in WEIGHT_BITS:
            raise ValueError(f"weight_bits={self.weight_bits} must be one of {', '.join(map(str, WEIGHT_BITS))}")
        if self.kv_bits not in KV_BITS:
            raise ValueError(f"kv_bits={self.kv_bits} must be one of {', '.join(map(str, KV_BITS))}")
        if not 0 < self.memory_utilization <= 1:
            raise ValueError(f"memory_utilization={self.memory_utilization} must lie in 0..1, without 0")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate={self.rate} must be > 0 requests per second, or null for saturation")
        if self.rate is not None and self.clients is not None:
            raise ValueError(f"rate={self.rate} with clients={self.clients}: arrivals are Poisson or of clients that wait, give one of the two")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be >= 0")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def serving(mapping: dict[str, Any], source: str = "serving") -> Serving:
    """A Serving from nested plain values; ConfigError lists every mistake.  `model` may be a name, a file or a mapping with `preset`."""
    problems, rest = list[str](), dict(mapping)
    try:
        rest["model"] = model_config(rest.get("model", "deepseek-v2"), source)
    except ConfigError as error:
        problems += error.problems
        rest["model"] = "deepseek-v2"
    try:
        spec = validate(Serving, rest, source)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from error
    if problems:
        raise ConfigError(*problems)
    return spec


def overridden(mapping: Mapping[str, Any], overrides: Iterable[str], cls: type, source: str = "serving") -> dict[str, Any]:
    """Nested values with each `--set` laid over them: a field of the question (`rate=5`, `lengths.prompt=100`), of the model by its
    path (`model.moe.device_limit=2`), or of its experts by name (`n_routed_experts=64`, `routing.device_limit=2`).

    ConfigError for a name that is none, with the nearest that is.
    """
    known = {name.split(".")[0] for name in known_paths(cls)}
    experts, given = [field.name for field in fields(MoEConfig)], list[str]()
    values = dict(mapping)
    for override in overrides:
        path, equals, value = override.partition("=")
        name = path.strip()
        plain = name.removeprefix("routing.").removeprefix("moe.")
        if name == "model":
            values["model"] = value.strip() if isinstance(values.get("model"), str) else model_mapping(value.strip(), source)
        elif not equals or name.split(".")[0] in known - {"routing"} or name == "routing":
            given.append(override)
        elif plain in known:
            given.append(f"{plain}={value}")
        elif plain in experts:
            given.append(f"model.moe.{plain}={value}")
        else:
            choices = {*known_paths(cls), *experts, *(f"model.{each}" for each in known_paths(ModelConfig))}
            raise ConfigError(f"{source}: --set {name} = {value!r}: unknown key{nearest(name, choices)}")
    return apply_overrides(values, given)


@dataclass(frozen=True)
class _Holder:
    """So that an error of the model names its path from `model` on."""

    model: ModelConfig


def model_config(model: Any, source: str = "serving") -> ModelConfig:
    """By name, file, mapping or value."""
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, str) and model in PRESETS:
        return preset(model)
    return validate(_Holder, {"model": resolve_model(model_mapping(model, source), source)}, source).model


def model_mapping(model: Any, source: str = "serving") -> dict[str, Any]:
    """Nested values over which `model.*` overrides can be laid: `preset`, or what the file holds (a model, or a run with one)."""
    if not isinstance(model, str):
        return model
    if model in PRESETS:
        return {"preset": model}
    if not Path(model).is_file():
        raise ConfigError(f"{source}: model = {model!r}: no such preset or file{nearest(model, PRESETS)}")
    content = read_yaml(model)
    inner = content.get("model", content)
    return {"preset": inner} if isinstance(inner, str) else inner


def model_name(model: str | ModelConfig) -> str:
    """For answers and errors: the name it was given by, or that of the preset that it equals."""
    if isinstance(model, str):
        return model
    same = [name for name in PRESETS if preset(name) == model]
    return same[0] if same else f"{model.num_hidden_layers} layers of width {model.hidden_size}"
