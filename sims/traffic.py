"""Who sends how many bytes to whom: exact, de-duplicated, before any time is thought of.

A token goes at most once to each device that holds one of its experts, and at most once to each other
node: over InfiniBand to the GPU of the same index (its rail), from there over NVLink to the devices.
Combine goes the same ways back, partial sums being added up where they meet.
"""

import math
from dataclasses import dataclass

import numpy as np

SCALE_BLOCK = 128
"""Elements that share one 4-byte scale in an 8-bit payload."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes of one direction between the G GPUs of an expert-parallel group.

    nvlink, infiniband: int64 (G, G), source by destination, bytes that cross the link.
    logical: int64 (G, G), bytes of tokens of the row's GPU that the column's experts work on, own ones included.
    """

    nvlink: np.ndarray
    infiniband: np.ndarray
    logical: np.ndarray

    def reverse(self, bytes_per_token: int, of: int) -> "Traffic":
        """The way back with `bytes_per_token` instead of `of`."""
        return Traffic(
            nvlink=self.nvlink.T // of * bytes_per_token,
            infiniband=self.infiniband.T // of * bytes_per_token,
            logical=self.logical.T // of * bytes_per_token,
        )


def payload_bytes(hidden_size: int, bits: int) -> int:
    """Bytes of one token: 2 H in 16 bits, H and a 4-byte scale for each 128 elements in 8 bits."""
    return 2 * hidden_size if bits == 16 else hidden_size + 4 * math.ceil(hidden_size / SCALE_BLOCK)


def needed_devices(expert_ids: np.ndarray, n_routed_experts: int, devices: int) -> np.ndarray:
    """bool (tokens, G): which devices hold an expert of the token (ids (tokens, K))."""
    needed = np.zeros((len(expert_ids), devices), bool)
    np.put_along_axis(needed, expert_ids.astype(np.int64) // (n_routed_experts // devices), True, axis=1)
    return needed


def dispatch(needed: np.ndarray, source: np.ndarray, gpus_per_node: int, bytes_per_token: int) -> Traffic:
    """needed bool (tokens, G), source int (tokens,): the GPU where each token lives."""
    gpus = needed.shape[1]
    nodes = gpus // gpus_per_node
    home, rail = source // gpus_per_node, source % gpus_per_node
    # copies[s, d]: tokens of GPU s that device d needs.
    copies = np.stack([needed[source == s].sum(0) for s in range(gpus)]).astype(np.int64)
    nvlink, infiniband = np.zeros((gpus, gpus), np.int64), np.zeros((gpus, gpus), np.int64)
    by_node = needed.reshape(len(needed), nodes, gpus_per_node)
    for node in range(nodes):
        here = slice(node * gpus_per_node, (node + 1) * gpus_per_node)
        remote = (home != node) & by_node[:, node].any(1)
        np.add.at(infiniband, (source[remote], node * gpus_per_node + rail[remote]), bytes_per_token)
        # Inside the node a token starts at its own GPU, or at the GPU of its rail when it came from outside.
        for s in range(gpus):
            entry = node * gpus_per_node + s % gpus_per_node
            nvlink[entry, here] += copies[s, here] * bytes_per_token
    np.fill_diagonal(nvlink, 0)
    return Traffic(nvlink=nvlink, infiniband=infiniband, logical=copies * bytes_per_token)
