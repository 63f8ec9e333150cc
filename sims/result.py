"""What a simulation answers."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One direction of the all-to-all.

    `straggler` is the GPU that everyone waits for, `binds` its slowest stream, `waiting_seconds` what
    the average GPU waits for it.
    """

    seconds: float
    straggler: int
    binds: str
    waiting_seconds: float
    stream_seconds: dict[str, list[float]]
    """Per stream (nic out, nic in, nvlink out, nvlink in, sm) the busy seconds of every GPU."""
    nvlink_bytes: int
    infiniband_bytes: int
    logical_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Dispatch and combine of one MoE layer's forward pass."""

    cluster: str
    nodes: int
    gpus_per_node: int
    device_limit: int | None
    num_experts_per_tok: int
    dispatch: Phase
    combine: Phase
    distinct_devices_per_token: float
    distinct_nodes_per_token: float
    expert_load_violation: float
    """(largest - mean) / mean of the tokens that the devices work on."""
    nvlink_matrix: np.ndarray
    infiniband_matrix: np.ndarray
    """int64 (G, G), dispatch and combine together."""
    formulas: dict[str, float]
    """Dispatch and combine seconds by the formulas of other tools (`sims.formulas`)."""

    @property
    def seconds(self) -> float:
        return self.dispatch.seconds + self.combine.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        value = asdict(self)
        value |= {"seconds": self.seconds, "dispatch_seconds": self.dispatch.seconds, "combine_seconds": self.combine.seconds}
        value |= {"nvlink_bytes": self.dispatch.nvlink_bytes + self.combine.nvlink_bytes}
        value |= {"infiniband_bytes": self.dispatch.infiniband_bytes + self.combine.infiniband_bytes}
        for name in ("nvlink_matrix", "infiniband_matrix"):
            value[name] = value[name].tolist()
        return value
