"""A node type and its links, from YAML: every figure with its unit, its basis and its source."""

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from research.configfile import read_yaml, validate
from research.errors import ConfigError

Network = Literal["rail-optimized", "plain"]
CLUSTERS = Path(__file__).with_name("clusters")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number of a data sheet or a measurement.

    `basis` is physical (bytes that cross the link) or logical (bytes that a rank receives, its own included), which no cluster takes.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    value: float
    unit: str
    basis: Literal["physical", "logical"]
    source: str
    date: str = ""
    """When the source was read."""

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise ValueError(f"value={self.value} must be > 0 and finite")
        if not self.unit.strip() or not self.source.strip():
            raise ValueError("unit and source must be given: a number without them cannot be checked")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes of equal GPUs: NVLink through a switch inside, one NIC per GPU on a rail of its own between them."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str
    key: str = ""
    """The preset's name, or the path of the file: filled in when it is loaded."""
    network: Network = "rail-optimized"
    """rail-optimized: the GPUs of one index share a leaf switch.  plain: every byte crosses leaf and spine."""
    oversubscription: float = 1.0
    """Of a plain network's leaves: the bandwidth into them over that out of them."""
    gpus_per_node: Figure
    nvlink_bytes_per_second: Figure
    """One way, per GPU, as achieved."""
    nic_bytes_per_second: Figure
    """One way, per GPU, as achieved."""
    nvlink_latency_seconds: Figure
    network_latency_seconds: Figure
    """Added when a collective leaves the node."""
    notify_seconds: Figure
    """Exchange of counts before a dispatch: a barrier for all of the group."""
    communication_sms: Figure
    sm_bytes_per_second: Figure
    """Bytes that one SM can copy."""
    bf16_flops_per_second: Figure
    """Peak, dense."""
    fp8_flops_per_second: Figure | None = None
    hbm_bytes: Figure
    hbm_bytes_per_second: Figure
    sms: Figure

    def __post_init__(self) -> None:
        if not 1 <= self.oversubscription < math.inf:
            raise ValueError(f"oversubscription={self.oversubscription} must be >= 1")
        if self.oversubscription > 1 and self.network != "plain":
            raise ValueError(
                f"oversubscription={self.oversubscription} needs network: plain; the rails of a rail-optimized network are not oversubscribed"
            )
        for name in ("gpus_per_node", "sms", "communication_sms"):
            if not float(value := getattr(self, name).value).is_integer():
                raise ValueError(f"{name}.value={value} must be a whole number")
        if self.communication_sms.value > self.sms.value:
            raise ValueError(f"communication_sms.value={self.communication_sms.value:g} must be <= sms.value={self.sms.value:g}")
        for name, figure in figures(self).items():
            if figure.basis == "logical":
                raise ValueError(
                    f"{name}.basis='logical': must be physical, bytes that cross the link; of a logical figure over N nodes (N - 1) / N cross it"
                )


def cluster_names() -> list[str]:
    return sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def load_cluster(name: str | Path) -> Cluster:
    """A preset by name, or the user's own YAML file by path; ConfigError names path, value and remedy."""
    path = CLUSTERS / f"{name}.yaml" if str(name) in cluster_names() else Path(name)
    if not path.is_file():
        raise ConfigError(f"cluster = {str(name)!r}: no such preset or file; valid: {', '.join(cluster_names())}, or the path of a YAML file")
    return _load(path, str(name), path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _load(path: Path, key: str, changed: int) -> Cluster:
    del changed  # A file that was edited is read again.
    mapping, problems = in_base_units(read_yaml(path), str(path))
    try:
        cluster = validate(Cluster, {**mapping, "key": key}, str(path))
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from error
    if problems:
        raise ConfigError(*problems)
    return cluster


def in_base_units(mapping: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """The file's figures in bytes, seconds and FLOPs; a sentence for every unit that does not measure what its key says.

    A unit is its first word (`bytes/s`, `GB/s`, `Gb/s`, `us`, `TFLOP/s`, `GiB`, ...), the rest says of what.
    """
    result, problems = dict(mapping), []
    for key, figure in mapping.items():
        if not isinstance(figure, dict) or not isinstance(figure.get("unit"), str) or not figure["unit"].strip():
            continue
        kind = next((k for k in UNITS if key.endswith(k)), None)
        if kind is None:
            continue
        word, _, rest = figure["unit"].strip().partition(" ")
        if word not in UNITS[kind]:
            problems.append(f"{source}: {key}.unit = {figure['unit']!r}: does not measure {kind.strip('_')}; valid: {', '.join(UNITS[kind])}")
        elif type(figure.get("value")) in (int, float):
            base = next(iter(UNITS[kind]))
            result[key] = {**figure, "value": figure["value"] * UNITS[kind][word], "unit": f"{base} {rest}".strip()}
    return result, problems


def _decimal(unit: str, prefixes: str, base: float = 1.0) -> dict[str, float]:
    return {f"{prefix}{unit}": base * 1000.0 ** (i + 1) for i, prefix in enumerate(prefixes)}


_BYTES = {"bytes": 1.0, "B": 1.0} | _decimal("B", "kMGT") | {f"{prefix}iB": 1024.0 ** (i + 1) for i, prefix in enumerate("KMGT")}
UNITS: dict[str, dict[str, float]] = {
    "bytes_per_second": {f"{unit}/s": scale for unit, scale in _BYTES.items()} | {f"{u}/s": v for u, v in _decimal("b", "kMGT", 1 / 8).items()},
    "flops_per_second": {"FLOP/s": 1.0} | _decimal("FLOP/s", "kMGTP"),
    "seconds": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "bytes": _BYTES,
    "gpus_per_node": {"GPUs": 1.0, "GPU": 1.0},
    "sms": {"SMs": 1.0, "SM": 1.0},
}
"""By what a key ends in, the units that it may have, the base unit first."""


def figures(cluster: Cluster) -> dict[str, Figure]:
    """Every figure by its key, in the order of the file."""
    values = {field.name: getattr(cluster, field.name) for field in fields(cluster)}
    return {name: value for name, value in values.items() if isinstance(value, Figure)}
