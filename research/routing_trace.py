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


def select_experts(
    scores: np.ndarray,
    num_experts_per_tok: int,
    expert_devices: int = 1,
    device_limit: int | None = None,
    *,
    node_groups: int = 1,
    node_limit: int | None = None,
    node_top: int = 1,
) -> np.ndarray:
    """Device-limited top-K (V2 section 2.2.2): int64 (..., K), best first, of scores (..., E).

    The M devices that hold the highest single affinities are kept, then the top K inside them.
    Experts of other devices are masked with -inf, never with 0, so the sign of a score is free; ties
    go to the lower index.

    With `node_limit` the experts are besides `node_groups` equal groups, and before all else the `node_limit` groups are kept
    whose `node_top` highest affinities have the largest sum (DeepSeek-V3, section 2.1.2: K / node_limit of them).
    """
    *lead, experts = scores.shape
    exact = np.float32 if scores.dtype in (np.float16, np.float32) else np.float64
    masked = scores.reshape(-1, experts).astype(exact)
    if node_limit is not None and node_limit < node_groups:
        masked = _limited(masked, node_groups, node_limit, node_top)
    if device_limit is not None and device_limit < expert_devices:
        masked = _limited(masked, expert_devices, device_limit, 1)
    return _best(masked, num_experts_per_tok).reshape(*lead, min(num_experts_per_tok, experts))


def _limited(scores: np.ndarray, groups: int, limit: int, top: int) -> np.ndarray:
    """Scores (N, E) with all but the best `limit` of the equal groups at -inf; a group is worth its `top` highest scores."""
    grouped = scores.reshape(len(scores), groups, -1)
    if top == 1:
        worth = grouped.max(-1)
    else:
        # In float64 and from the highest down: a sum's last bits must not depend on the order in which a partition leaves them.
        worth = -np.sort(-grouped, axis=-1)[..., :top].astype(np.float64).sum(-1)
    keep = np.zeros((len(scores), groups), dtype=bool)
    np.put_along_axis(keep, _best(worth, limit), True, axis=-1)
    return np.where(keep[..., None], grouped, -np.inf).reshape(scores.shape)


def _best(scores: np.ndarray, number: int) -> np.ndarray:
    """int64 (N, number): the largest of each row (N, E), best first, ties to the lower index.

    `number` maxima one after the other, many times faster than sorting a row of hundreds; sorted where a row has fewer finite scores.
    """
    found, lowest = np.empty((len(scores), number), np.int64), np.inf
    rest, rows = scores.copy(), np.arange(len(scores))
    for k in range(number if number <= LONG_CHOICE else 0):
        found[:, k] = rest.argmax(-1)
        lowest = rest[rows, found[:, k]].min(initial=np.inf)
        if not lowest > -np.inf:
            break
        rest[rows, found[:, k]] = -np.inf
    # A maximum that is not a number, or -inf again where all is taken, says nothing; then as below.
    if number > LONG_CHOICE or not lowest > -np.inf:
        return np.argsort(-scores, axis=-1, kind="stable")[..., :number]
    return found


LONG_CHOICE = 32
"""Beyond as many choices a sort is as fast."""
