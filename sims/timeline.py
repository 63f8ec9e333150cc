"""Every phase of a simulation as rows: who did what when, over which link, and for whom it waited.

The contract between the simulators, which write it, and the outputs (Parquet, trace, heat maps), which read it.
"""

from dataclasses import dataclass, field, fields

import numpy as np


@dataclass(kw_only=True, slots=True)
class Phase:
    """One phase of one stream of one GPU (or of one class of GPUs that are alike, `copies` of them)."""

    name: str
    """`dispatch`, `combine`, `notify`, `attention`, `experts`, `shared experts`, `gradients`, `optimizer`, `send`, ..."""
    node: int
    gpu: int
    """Index over the whole cluster."""
    stream: str
    """`compute`, `all-to-all`, `pipeline`, `gradients`, or the link itself: `nvlink out`, `nic in`, ..."""
    start_seconds: float
    end_seconds: float
    layer: int = -1
    microbatch: int = -1
    direction: str = ""
    """`forward`, `backward`, `weights` or empty."""
    nvlink_bytes: int = 0
    infiniband_bytes: int = 0
    """Physical bytes that this GPU sends in the phase."""
    waits_for: int = -1
    """The GPU that it waited for before it could start, or -1."""
    wait_seconds: float = 0.0
    wait_link: str = ""
    """The stream of that GPU which held it up."""
    copies: int = 1


@dataclass(slots=True)
class Timeline:
    """Phases in the order in which they were recorded."""

    phases: list[Phase] = field(default_factory=list)

    def columns(self) -> dict[str, np.ndarray]:
        """One array per field of Phase, in the order of the rows."""
        return {f.name: np.array([getattr(phase, f.name) for phase in self.phases], f.type) for f in fields(Phase)}
