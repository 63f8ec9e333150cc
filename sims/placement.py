"""Where the devices of an expert-parallel group stand, and which of them holds which expert.

The model's own devices (D of them, for the limit M) are groups of experts; here a device is a GPU of the group.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from research.errors import ConfigError

NAMES = ("packed", "spread")


@dataclass(frozen=True, slots=True)
class Placement:
    """node, rail: int64 (G,), of each GPU of the group.  expert_device: int64 (E,), the GPU that holds each expert."""

    node: np.ndarray
    rail: np.ndarray
    expert_device: np.ndarray

    @property
    def devices(self) -> int:
        return len(self.node)

    @property
    def nodes(self) -> int:
        """Nodes that the group stands on."""
        return len(np.unique(self.node))

    def node_index(self) -> np.ndarray:
        """int64 (G,): the nodes of the group counted from 0 without gaps."""
        return np.unique(self.node, return_inverse=True)[1]

    def node_matrix(self) -> np.ndarray:
        """bool (G, nodes): which GPU stands where."""
        return self.node_index()[:, None] == np.arange(self.nodes)

    def entries(self) -> np.ndarray:
        """int64 (G, nodes): the GPU at which a token of each GPU enters each node: itself at home, elsewhere the one of its rail,
        or, where the group has none there, the one that its rail falls on when the rails of that node are counted through."""
        index, found = self.node_index(), np.empty((self.devices, self.nodes), np.int64)
        for node in range(self.nodes):
            here = np.flatnonzero(index == node)
            here = here[np.argsort(self.rail[here], kind="stable")]
            same = self.rail[:, None] == self.rail[here]
            found[:, node] = here[np.where(same.any(1), same.argmax(1), self.rail % len(here))]
        found[np.arange(self.devices), index] = np.arange(self.devices)
        return found


def place(placement: Any, experts: Any, *, devices: int, nodes: int, gpus_per_node: int, n_routed_experts: int) -> Placement:
    """`packed` fills node after node; `spread` deals the devices over the nodes; else a list of [node, gpu] per device.

    `experts`: the device of each expert, or None: equal runs in order.  ConfigError names path and value.
    """
    if isinstance(placement, str):
        if placement not in NAMES:
            raise ConfigError(f"placement = {placement!r}: valid: packed, spread, or a list of [node, gpu] for each device")
        index = np.arange(devices)
        node, rail = (index // gpus_per_node, index % gpus_per_node) if placement == "packed" else (index % nodes, index // nodes)
    else:
        node, rail = _explicit(placement, devices, nodes, gpus_per_node)
    return Placement(node, rail, _experts(experts, devices, n_routed_experts))


def _explicit(pairs: Any, devices: int, nodes: int, gpus_per_node: int) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(pairs, list | tuple) or len(pairs) != devices:
        number = len(pairs) if isinstance(pairs, list | tuple) else repr(pairs)
        raise ConfigError(f"placement = {number} entries: must be a list of {devices} [node, gpu] pairs, one for each device of the group")
    for i, pair in enumerate(pairs):
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, int) and not isinstance(x, bool) for x in pair)
        if not whole or not (0 <= pair[0] < nodes and 0 <= pair[1] < gpus_per_node):
            raise ConfigError(f"placement.{i} = {pair!r}: must be [node, gpu] with node in 0..{nodes - 1} and gpu in 0..{gpus_per_node - 1}")
    if not devices:
        raise ConfigError("placement = []: must hold a [node, gpu] pair for each device of the group, one at least")
    places = [tuple(pair) for pair in pairs]
    if len(set(places)) < devices:
        twice = next(p for p in places if places.count(p) > 1)
        raise ConfigError(f"placement = {list(twice)}: stands there twice, a GPU can be one device only")
    both = np.array(places, np.int64)
    return both[:, 0], both[:, 1]


def _experts(experts: Any, devices: int, n_routed_experts: int) -> np.ndarray:
    if experts is None:
        if devices > n_routed_experts:
            raise ConfigError(f"expert_parallel = {devices}: {n_routed_experts} experts (n_routed_experts) do not cover so many devices")
        # Equal runs; where it does not come out even, the first devices hold one more.
        return np.repeat(np.arange(devices), [len(run) for run in np.array_split(np.arange(n_routed_experts), devices)])
    if not isinstance(experts, list | tuple) or len(experts) != n_routed_experts:
        number = len(experts) if isinstance(experts, list | tuple) else repr(experts)
        raise ConfigError(f"expert_placement = {number} entries: does not cover the {n_routed_experts} experts, one device for each is needed")
    for i, device in enumerate(experts):
        if not isinstance(device, int) or isinstance(device, bool) or not 0 <= device < devices:
            raise ConfigError(f"expert_placement.{i} = {device!r}: must be a device in 0..{devices - 1}")
    return np.array(experts, np.int64)
