"""Who was routed where, as arrays: what a trained model hands to the cluster simulator.

Also holds the routing decision in NumPy.  It is the slow twin of `research.model.router.route`: the
two are tested to choose the same experts, so that a simulation that re-routes recorded affinities
under another device limit asks the model's own rule.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.atomic import atomic_write
from research.errors import DataError

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTrace:
    """Routing of the same held-out tokens at several training steps.

    expert_ids: int16 (steps, L, M, K), the routed experts of each token in each MoE layer.
    steps: int64 (steps,), the optimizer step of each snapshot, ascending.
    layers: int64 (L,), the model's layer index of each MoE layer.
    scores: float16 (L, M, E), the affinities s (softmax over all experts) at the last snapshot.
    """

    expert_ids: np.ndarray
    steps: np.ndarray
    layers: np.ndarray
    scores: np.ndarray
    n_routed_experts: int
    expert_devices: int
    device_limit: int | None

    def __post_init__(self) -> None:
        steps, layers, tokens, _ = self.expert_ids.shape
        if self.steps.shape != (steps,) or self.layers.shape != (layers,):
            raise ValueError(f"expert_ids {self.expert_ids.shape} does not fit steps {self.steps.shape} and layers {self.layers.shape}")
        if self.scores.shape != (layers, tokens, self.n_routed_experts):
            raise ValueError(f"scores {self.scores.shape} must be {(layers, tokens, self.n_routed_experts)}")
        if self.expert_ids.size and not (self.expert_ids.min() >= 0 and self.expert_ids.max() < self.n_routed_experts):
            raise ValueError(f"expert_ids must lie in 0..{self.n_routed_experts - 1}")

    @property
    def num_experts_per_tok(self) -> int:
        return int(self.expert_ids.shape[3])

    def device_ids(self) -> np.ndarray:
        """int16 (steps, L, M, K): the device (expert group) of each choice."""
        return self.expert_ids // (self.n_routed_experts // self.expert_devices)

    def save(self, path: str | Path) -> None:
        """Write as .npz, atomically."""
        with atomic_write(path) as file:
            np.savez_compressed(
                file,
                format=FORMAT,
                expert_ids=self.expert_ids.astype(np.int16),
                steps=self.steps,
                layers=self.layers,
                scores=self.scores.astype(np.float16),
                shape=np.array([self.n_routed_experts, self.expert_devices, self.device_limit or 0]),
            )

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Read a saved trace; DataError says what is wrong with the file."""
        try:
            with np.load(path, allow_pickle=False) as data:
                if int(data["format"]) != FORMAT:
                    raise DataError(f"{path}: routing trace of format {int(data['format'])}, this version reads {FORMAT}")
                experts, devices, limit = (int(x) for x in data["shape"])
                return cls(
                    expert_ids=data["expert_ids"],
                    steps=data["steps"],
                    layers=data["layers"],
                    scores=data["scores"],
                    n_routed_experts=experts,
                    expert_devices=devices,
                    device_limit=limit or None,
                )
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{path}: is not a routing trace ({error})") from error


def select_experts(scores: np.ndarray, num_experts_per_tok: int, expert_devices: int = 1, device_limit: int | None = None) -> np.ndarray:
    """Device-limited top-K (V2 section 2.2.2): int64 (..., K), best first, of scores (..., E).

    The M devices that hold the highest single affinities are kept, then the top K inside them.
    Experts of other devices are masked with -inf, never with 0, so the sign of a score is free; ties
    go to the lower index.
    """
    *lead, experts = scores.shape
    masked = scores.astype(np.float64)
    if device_limit is not None and device_limit < expert_devices:
        grouped = masked.reshape(*lead, expert_devices, experts // expert_devices)
        best = np.argsort(-grouped.max(-1), axis=-1, kind="stable")[..., :device_limit]
        keep = np.zeros((*lead, expert_devices), dtype=bool)
        np.put_along_axis(keep, best, True, axis=-1)
        masked = np.where(keep[..., None], grouped, -np.inf).reshape(*lead, experts)
    return np.argsort(-masked, axis=-1, kind="stable")[..., :num_experts_per_tok]
