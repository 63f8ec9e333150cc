"""A node type and its links, from YAML: every figure with its unit, its basis and its source."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from research.configfile import read_yaml, validate
from research.errors import ConfigError

CLUSTERS = Path(__file__).with_name("clusters")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number of a data sheet or a measurement.

    `basis` is physical (bytes that cross the link) or logical (bytes that a rank receives, its own included).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    value: float
    unit: str
    basis: Literal["physical", "logical"]
    source: str

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"value={self.value} must be > 0")
        if not self.unit.strip() or not self.source.strip():
            raise ValueError("unit and source must be given: a number without them cannot be checked")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes of equal GPUs: NVLink through a switch inside, one NIC per GPU on a rail of its own between them."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str
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


def cluster_names() -> list[str]:
    return sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def load_cluster(name: str | Path) -> Cluster:
    """A preset by name, or the user's own YAML file by path; ConfigError names path, value and remedy."""
    path = CLUSTERS / f"{name}.yaml" if str(name) in cluster_names() else Path(name)
    if not path.exists():
        raise ConfigError(f"cluster = {str(name)!r}: no such preset or file; valid: {', '.join(cluster_names())}, or the path of a YAML file")
    return validate(Cluster, read_yaml(path), str(path))


def figures(cluster: Cluster) -> dict[str, Figure]:
    """Every figure by its key, in the order of the file."""
    values = {field.name: getattr(cluster, field.name) for field in fields(cluster)}
    return {name: value for name, value in values.items() if isinstance(value, Figure)}
