"""Who sends how many bytes to whom: exact, de-duplicated, before any time is thought of.

A token goes at most once to each device that holds one of its experts, and at most once to each other node: over InfiniBand
to the GPU of the same index (its rail), from there over NVLink to the devices.  Relay kernels do so on any network, so a plain
network moves the same bytes.  Combine goes the same ways back, partial sums being added up where they meet.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sims.placement import Placement

SCALE_BLOCK = 128
"""Elements that share one 4-byte scale in an 8-bit payload."""

Dedup = Literal["none", "device", "node"]
Kind = Literal["dispatch", "combine"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes of one direction between the G GPUs of an expert-parallel group.

    nvlink, infiniband: int64 (G, G), source by destination, bytes that cross the link.
    logical: int64 (G, G), bytes of tokens of the row's GPU that the column's experts work on, own ones included.
    node_logical: int64 (G,), bytes of each GPU's tokens times the nodes that they reach, its own included.
    sm: int64 (G,), bytes that each GPU's SMs move: copies sent on or taken in, whichever are more, and copies per node.
    """

    nvlink: np.ndarray
    infiniband: np.ndarray
    logical: np.ndarray
    node_logical: np.ndarray
    sm: np.ndarray
    bytes_per_token: int
    nodes: int = 1
    kind: Kind = "dispatch"
    crosses_rails: bool = False

    @property
    def moves(self) -> bool:
        """Whether any byte leaves a GPU."""
        return bool(self.nvlink.any() or self.infiniband.any())

    def reverse(self, bytes_per_token: int, of: int | None = None) -> "Traffic":
        """The way back with `bytes_per_token` instead of `of` (this direction's own)."""
        was = of or self.bytes_per_token
        scaled = {n: getattr(self, n).T // was * bytes_per_token for n in ("nvlink", "infiniband", "logical", "node_logical", "sm")}
        return Traffic(
            **scaled,
            bytes_per_token=bytes_per_token,
            nodes=self.nodes,
            kind="combine" if self.kind == "dispatch" else "dispatch",
            crosses_rails=self.crosses_rails,
        )

    def resized(self, bytes_per_token: int) -> "Traffic":
        """The same copies with another payload."""
        return self.reverse(bytes_per_token).reverse(bytes_per_token)


def payload_bytes(hidden_size: int, bits: int) -> int:
    """Bytes of one token: 4 H or 2 H in 32 or 16 bits, H and a 4-byte scale for each 128 elements in 8 bits."""
    return hidden_size * bits // 8 if bits > 8 else hidden_size + 4 * math.ceil(hidden_size / SCALE_BLOCK)


def needed_devices(expert_ids: np.ndarray, expert_device: np.ndarray | int, devices: int) -> np.ndarray:
    """bool (tokens, G): which devices hold an expert of the token (ids (tokens, K)).

    `expert_device` is the device of each expert, int (E,), or E alone: equal runs.
    """
    if isinstance(expert_device, int | np.integer):
        expert_device = np.arange(expert_device) // (expert_device // devices)
    needed = np.zeros(len(expert_ids) * devices, bool)
    needed[(expert_device.take(expert_ids) + (np.arange(len(expert_ids)) * devices)[:, None]).ravel()] = True
    return needed.reshape(-1, devices)


def dispatch(needed: np.ndarray, source: np.ndarray, gpus_per_node: int, bytes_per_token: int) -> Traffic:
    """needed bool (tokens, G), source int (tokens,): the GPU where each token lives; nodes are runs of `gpus_per_node`."""
    gpus = needed.shape[1]
    index = np.arange(gpus)
    where = Placement(index // gpus_per_node, index % gpus_per_node, index)
    counts = np.zeros((gpus, len(needed)), np.float32)
    counts[source, np.arange(len(needed))] = 1
    return traffic_of(counts, needed, where, bytes_per_token)


def traffic_of(
    counts: np.ndarray,
    needed: np.ndarray,
    placement: Placement,
    bytes_per_token: int,
    *,
    dedup: Dedup = "node",
    chosen: np.ndarray | None = None,
) -> Traffic:
    """Dispatch of a pool of P tokens of which GPU s has counts[s, p], float (G, P), and token p needs needed[p], bool (P, G).

    `chosen`, int (P, G), is how many of a token's experts each device holds: the copies where nothing is de-duplicated.
    """
    copies = _product(counts, needed if dedup != "none" or chosen is None else chosen)
    at = placement.node_matrix()
    reached = _product(counts, needed.astype(np.float32) @ at.astype(np.float32) > 0)
    relay = _relayed(copies, reached, placement, at) if dedup == "node" else _direct(copies, placement)
    nvlink, infiniband, issued = relay
    # A relay kernel reads a token once for each node that it goes to, a direct one once.
    read = reached.sum(1) if dedup == "node" else np.rint(counts.sum(1)).astype(np.int64)
    return Traffic(
        nvlink=nvlink * bytes_per_token,
        infiniband=infiniband * bytes_per_token,
        logical=copies * bytes_per_token,
        node_logical=reached.sum(1) * bytes_per_token,
        sm=(np.maximum(issued, copies.sum(0)) + read) * bytes_per_token * int(nvlink.any() or infiniband.any()),
        bytes_per_token=bytes_per_token,
        nodes=placement.nodes,
        crosses_rails=bool(dedup != "node" and (infiniband[placement.rail[:, None] != placement.rail]).any()),
    )


def _product(counts: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """counts (G, P) times pool (P, X) as int64, exactly: float32 holds every integer up to 2^24."""
    exact = np.float32 if counts.sum(1).max(initial=0) * max(int(pool.max(initial=0)), 1) < 1 << 24 else np.float64
    return np.rint(counts.astype(exact, copy=False) @ pool.astype(exact)).astype(np.int64)


def _relayed(copies: np.ndarray, reached: np.ndarray, placement: Placement, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens over NVLink and InfiniBand (G, G), and copies that each GPU issues (G,), its own included."""
    gpus, index, entries = placement.devices, placement.node_index(), placement.entries()
    nvlink, infiniband = np.zeros((gpus, gpus), np.int64), np.zeros((gpus, gpus), np.int64)
    for node in range(placement.nodes):
        away = np.flatnonzero(index != node)
        np.add.at(infiniband, (away, entries[away, node]), reached[away, node])
        # Inside the node a token starts at its own GPU, or at the GPU of its rail when it came from outside.
        here = np.flatnonzero(at[:, node])
        block = np.zeros((gpus, len(here)), np.int64)
        np.add.at(block, entries[:, node], copies[:, here])
        nvlink[:, here] += block
    issued = nvlink.sum(1)
    np.fill_diagonal(nvlink, 0)
    return nvlink, infiniband, issued


def _direct(copies: np.ndarray, placement: Placement) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every copy straight to its device: over NVLink at home, from NIC to NIC elsewhere."""
    home = placement.node[:, None] == placement.node
    nvlink, infiniband = np.where(home, copies, 0), np.where(home, 0, copies)
    np.fill_diagonal(nvlink, 0)
    return nvlink, infiniband, copies.sum(1)
