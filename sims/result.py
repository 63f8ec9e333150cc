"""What a simulation answers."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sims.quantiles import Quantiles
from sims.timeline import Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One direction of the all-to-all (dispatch or combine, forward or backward), of one expert-parallel group.

    `seconds` is the transmit time with its latency; the exchange of counts before a dispatch is `notify_seconds`, beside it.
    `straggler` is the GPU that everyone waits for, `binds` its slowest stream, `waiting_seconds` what the average GPU waits for
    it.  Bytes are of the whole group; `physical` ones cross a link, `logical` ones are copies times payload with the own GPU or
    node counted in, as the tables of expert-parallel libraries count them.
    """

    seconds: Quantiles
    notify_seconds: Quantiles
    straggler: int
    binds: str
    waiting_seconds: float
    stream_seconds: Mapping[str, list[float]]
    """Per stream (nic out, nic in, nvlink out, nvlink in, sm) the busy seconds of every GPU, best fit."""
    bytes_per_token: int
    nvlink_bytes: int
    infiniband_bytes: int
    nvlink_logical_bytes: int
    """Tokens times the devices that they reach, own ones included."""
    infiniband_logical_bytes: int
    """Tokens times the nodes that they reach, the own one included; 0 in one node."""
    count_bytes: int
    """Of the exchange of counts: 4 bytes from every GPU to every other for each of the receiver's experts, and one total."""
    gigabytes_per_second: Mapping[str, float]
    """Per GPU, `nvlink_physical`, `nvlink_logical`, `infiniband_physical`, `infiniband_logical`: bytes of the average GPU over P50."""


PRINTED_GPUS = 1024
"""Of a byte matrix that is written as JSON: one of 4,096 GPUs is 17 million numbers, gigabytes of memory for whoever reads them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """All four moves of one MoE layer; bytes and matrices of one expert-parallel group, of which there are `groups` alike."""

    cluster: str
    nodes: int
    gpus_per_node: int
    expert_parallel: int
    groups: int
    device_limit: int | None
    node_limit: int | None
    num_experts_per_tok: int
    sms: float
    seed: int
    routing: str
    dispatch: Move
    combine: Move
    backward_combine: Move
    """The gradient of combine: shaped as a dispatch, in combine's bits, first in backward."""
    backward_dispatch: Move
    """The gradient of dispatch: shaped as a combine, in combine's bits."""
    distinct_devices_per_token: float
    """GPUs of the group that hold experts of a token, its own included."""
    distinct_routing_devices_per_token: float
    """Of the model's D devices, which the limit M counts."""
    distinct_nodes_per_token: float
    expert_load_violation: float
    """(largest - mean) / mean of the tokens that the devices work on."""
    nvlink_matrix: np.ndarray
    infiniband_matrix: np.ndarray
    """int64 (G, G), dispatch and combine of the forward pass together."""
    formulas: Mapping[str, Mapping[str, float]]
    """Dispatch and combine seconds by the formulas of other tools (`sims.formulas`)."""
    warnings: list[str]
    constants: Mapping[str, Any]
    phases: Callable[[], Timeline] = field(repr=False, compare=False)
    """Plays the collectives in events when it is asked to."""

    @property
    def dispatch_seconds(self) -> Quantiles:
        return self.dispatch.seconds

    @property
    def combine_seconds(self) -> Quantiles:
        return self.combine.seconds

    @property
    def seconds(self) -> float:
        """Median of notify, dispatch and combine together."""
        return self.dispatch.notify_seconds.p50 + self.dispatch.seconds.p50 + self.combine.seconds.p50

    @property
    def nvlink_bytes(self) -> int:
        """Dispatch and combine, physical."""
        return self.dispatch.nvlink_bytes + self.combine.nvlink_bytes

    @property
    def infiniband_bytes(self) -> int:
        return self.dispatch.infiniband_bytes + self.combine.infiniband_bytes

    def timeline(self) -> Timeline:
        """Every stream of every GPU in notify, dispatch and combine of the forward pass (best fit), for the outputs."""
        return self.phases()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; times as {"p10", "p50", "p90"}.  Matrices of more than `PRINTED_GPUS` GPUs are null."""
        value = {name: getattr(self, name) for name in self.__slots__ if name != "phases"}
        for name in ("dispatch", "combine", "backward_combine", "backward_dispatch"):
            value[name] = asdict(value[name])
        for name in ("nvlink_matrix", "infiniband_matrix"):
            value[name] = value[name].tolist() if len(value[name]) <= PRINTED_GPUS else None
        value["formulas"] = {name: dict(formula) for name, formula in self.formulas.items()}
        value |= {"dispatch_seconds": asdict(self.dispatch_seconds), "combine_seconds": asdict(self.combine_seconds)}
        value |= {"notify_seconds": asdict(self.dispatch.notify_seconds), "seconds": self.seconds}
        value |= {"nvlink_bytes": self.nvlink_bytes, "infiniband_bytes": self.infiniband_bytes, "binds": self.dispatch.binds}
        return value

    def record(self) -> dict[str, Any]:
        """As `to_dict` without matrices, streams and constants, and with medians for `dispatch_seconds` and `combine_seconds`: what a
        study keeps of each run.  The quantiles are in `quantiles`."""
        value = self.to_dict()
        for name in ("nvlink_matrix", "infiniband_matrix", "constants"):
            del value[name]
        for name in ("dispatch", "combine", "backward_combine", "backward_dispatch"):
            del value[name]["stream_seconds"]
        times = {name: value[name] for name in ("dispatch_seconds", "combine_seconds", "notify_seconds")}
        return value | {"quantiles": times} | {name: time["p50"] for name, time in times.items()}
