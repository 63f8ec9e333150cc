"""The question of an all-to-all from a command line: options, a model, `--set`, a trace; the same words in every command."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from research.config import ModelConfig
from research.configfile import apply_overrides, nearest, read_yaml, resolve_model, validate
from research.errors import ConfigError
from research.presets import PRESETS
from research.routing_trace import RoutingTrace
from sims.all_to_all import AllToAll
from sims.cluster import cluster_names
from sims.placement import NAMES
from sims.routing import FAMILIES, reroute

Overrides = Annotated[list[str] | None, typer.Option("--set", help="field=value of the question: device_limit=2, or model.moe.device_limit=2")]
Trace = Annotated[Path | None, typer.Option(help="routing.npz of a trained model; without it routing is made up (--routing)")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table")]
Cluster = Annotated[str | None, typer.Option(help=f"{', '.join(cluster_names())}, or a YAML file of your own")]
Model = Annotated[str | None, typer.Option(help="Preset, or YAML of a model or run: hidden size, experts, K, D and M are taken from it")]
GpusPerNode = Annotated[int | None, typer.Option(help="GPUs of each node that take part (8)")]
ExpertDevices = Annotated[int | None, typer.Option("--expert-devices", help="D: groups of experts that --device-limit counts (8)")]
ExpertParallel = Annotated[int | None, typer.Option("--expert-parallel", "--ep", help="GPUs of one expert-parallel group (all)")]
Experts = Annotated[int | None, typer.Option("--experts", "--n-routed-experts", help="Routed experts (160)")]
NodeLimit = Annotated[int | None, typer.Option("--node-limit", help="A token reaches at most so many nodes (unrestricted)")]
NodeScore = Annotated[str | None, typer.Option(help="Nodes are chosen by the sum of their K/N highest affinities (sum) or by the highest (max)")]
DispatchBits = Annotated[int | None, typer.Option(help="8 (FP8 with scales), 16 or 32 (16)")]
CombineBits = Annotated[int | None, typer.Option(help="8, 16 or 32 (16)")]
Routing = Annotated[str | None, typer.Option(help=", ".join(FAMILIES))]
PlacementOption = Annotated[
    str | None,
    typer.Option("--placement", help="packed, spread, or a YAML file with devices: [[node, gpu], ...] and, if wished, experts: [device of each]"),
]
Dedup = Annotated[str | None, typer.Option(help="Copies of a token: one per node and device (node), per device, or per expert (none)")]
Network = Annotated[str | None, typer.Option(help="rail-optimized or plain; else what the cluster's file says")]
Oversubscription = Annotated[float | None, typer.Option(help="Of a plain network's leaves (1)")]
Nic = Annotated[list[str] | None, typer.Option("--nic", help="GPU=share of its NIC's bandwidth that is left; may be repeated")]
Nvlink = Annotated[list[str] | None, typer.Option("--nvlink", help="GPU=share of its NVLink bandwidth that is left; may be repeated")]
Seed = Annotated[int | None, typer.Option(help="Of the made-up routing (0)")]

FROM_TRACE = ("n_routed_experts", "num_experts_per_tok", "expert_devices", "seed", "routing")
SECTIONS = ("model.moe.", "model.", "routing.", "moe.")
SHORT = {
    "top_k": "num_experts_per_tok", "k": "num_experts_per_tok", "experts": "n_routed_experts", "m": "device_limit", "family": "routing",
    "tokens": "tokens_per_device", "hidden": "hidden_size", "ep": "expert_parallel",
}  # fmt: skip
"""What a field is also called in --set and --over."""


ENTRIES = ("nic", "nvlink", "constants")
"""Fields that are set entry by entry: `nic.3=0.5`, `constants.nic_efficiency=0.9`."""


def field_of(name: str) -> str:
    """The field of the question that a dotted or short name means (`nic.3` is an entry of one); ConfigError with the nearest one."""
    known = [field.name for field in fields(AllToAll)]
    plain = name.strip().replace("-", "_")
    for section in SECTIONS:
        plain = plain.removeprefix(section)
    plain = SHORT.get(plain.lower(), plain)
    if plain not in known and plain.partition(".")[0] not in ENTRIES:
        raise ConfigError(f"--set {name}: no such field of the question{nearest(plain, known)}")
    return plain


def factors(option: str, given: list[str] | None) -> dict[Any, Any]:
    """`3=0.5` of an option that may be repeated, as GPU -> number."""
    found = {}
    for each in given or []:
        gpu, _, factor = each.partition("=")
        try:
            found[int(gpu)] = float(factor)
        except ValueError:
            raise ConfigError(f"{option} {each}: expected GPU=factor, such as 3={1.25 if option == '--slow' else 0.5}") from None
    return found


def question(options: Mapping[str, Any], model: str | None, placement: str | None, overrides: list[str] | None) -> tuple[AllToAll, set[str]]:
    """The spec, and the names of the fields that were asked for (options left at None were not)."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if placement is not None:
        given |= _placement(placement)
    renamed = []
    for override in overrides or []:
        name, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected field=value, such as device_limit=2")
        renamed.append(f"{field_of(name)}={value}")
    asked = set(given) | {name.partition("=")[0] for name in renamed}
    mapping = (_model(model) if model is not None else {}) | given
    return validate(AllToAll, apply_overrides(mapping, renamed), "all-to-all"), asked


SHAPE = ("n_routed_experts", "num_experts_per_tok", "expert_devices")


def routed(spec: AllToAll, path: Path | None, asked: set[str], model: str | None = None) -> tuple[AllToAll, RoutingTrace | None]:
    """The spec with the trace's sizes, and the trace, re-routed where a device limit was asked for.

    ConfigError for a trace of another shape than the model, and for what only the trained model can say.
    """
    if path is None:
        return spec, None
    trace = RoutingTrace.load(path)
    if model is not None and (wrong := [name for name in SHAPE if getattr(trace, name) != getattr(spec, name)]):
        raise ConfigError(*(f"{path}: {name} = {getattr(trace, name)}: the model {model} has {getattr(spec, name)}" for name in wrong))
    if fixed := sorted(asked & set(FROM_TRACE)):
        raise ConfigError(*(f"--set {name}: comes from the trace {path} of a trained model; leave it out" for name in fixed))
    if "device_limit" not in asked:
        return _shaped(spec, trace), trace
    limit, devices, chosen = spec.device_limit, trace.expert_devices, trace.num_experts_per_tok
    if limit is not None and (limit > devices or limit * (trace.n_routed_experts // devices) < chosen):
        least = -(-chosen * devices // trace.n_routed_experts)
        raise ConfigError(
            f"--set device_limit={limit}: the trace {path} has {chosen} experts per token on {devices} devices; valid: {least} to {devices}, or null"
        )
    trace = reroute(trace, limit)
    return _shaped(spec, trace), trace


def _shaped(spec: AllToAll, trace: RoutingTrace) -> AllToAll:
    return replace(spec, device_limit=trace.device_limit, **{name: getattr(trace, name) for name in SHAPE})


def _model(name: str) -> dict[str, Any]:
    """Fields of the question that a model settles."""
    if name in PRESETS:
        model = PRESETS[name]()
    elif Path(name).is_file():
        mapping = read_yaml(name)
        model = validate(ModelConfig, resolve_model(mapping.get("model", mapping), name), f"{name}: model")
    else:
        raise ConfigError(f"model = {name!r}: no such preset or file{nearest(name, PRESETS)}")
    if model.moe is None:
        raise ConfigError(f"model = {name!r}: has no routed experts, so there is no all-to-all; choose a model with model.moe")
    moe = asdict(model.moe)
    return {"hidden_size": model.hidden_size} | {
        key: moe[key] for key in ("n_routed_experts", "num_experts_per_tok", "expert_devices", "device_limit")
    }


def _placement(given: str) -> dict[str, Any]:
    if given in NAMES:
        return {"placement": given}
    if not Path(given).is_file():
        raise ConfigError(f"placement = {given!r}: must be packed, spread or a YAML file; there is no such file")
    mapping = read_yaml(given)
    if unknown := sorted(set(mapping) - {"devices", "experts"}):
        raise ConfigError(f"{given}: {unknown[0]} = {mapping[unknown[0]]!r}: unknown key; valid: devices, experts")
    for key, least, what in (("devices", 2, "a [node, gpu] pair for each device of the group"), ("experts", 0, "the device of each expert")):
        if key in mapping:
            _check_list(f"{given}: {key}", mapping[key], least, what)
    return {field: mapping[key] for key, field in (("devices", "placement"), ("experts", "expert_placement")) if key in mapping}


def _check_list(where: str, value: Any, pair: int, what: str) -> None:
    """ConfigError for the first entry that is no whole number or, where `pair` is 2, no pair of them."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} = {value!r}: must be a list with {what}")
    for i, entry in enumerate(value):
        numbers = entry if pair and isinstance(entry, list) else [entry]
        if (pair and (numbers is not entry or len(numbers) != pair)) or any(type(number) is not int for number in numbers):
            raise ConfigError(f"{where}.{i} = {entry!r}: must be {'[node, gpu], two whole numbers' if pair else 'a whole number'}")
