"""The formulas of other tools, kept as named baselines beside ours; none of them knows the device limit."""

from sims.cluster import Cluster

FORMULAS = {
    "k_copies": "K T H bytes over one link (llm-analysis, GenZ)",
    "uniform_single_copy": "one copy of each token, evenly over the ranks (ASTRA-sim, LLMServingSim)",
    "single_nic_share": "(K - 1) / K of K copies over one NIC (SimuMax)",
    "busbw": "K copies, (n - 1) / n of them, at the bus bandwidth NIC (n - 1) / ((N - 1) gpus) of n GPUs on N nodes (SimAI)",
    "every_node": "every token to every other node (InferSim)",
}


def formulas(
    cluster: Cluster, *, nodes: int, gpus_per_node: int, tokens: float, chosen: int, dispatch_bytes: int, combine_bytes: int
) -> dict[str, dict[str, float]]:
    """`dispatch_seconds` and `combine_seconds` by name (`FORMULAS`).  `tokens` per GPU, bytes per token.

    The link is the NIC, or NVLink where there is one node, at the cluster file's own figures.
    """
    down, up = ({name: copies * tokens * size / link for name, (copies, link) in _copies(cluster, nodes, gpus_per_node, chosen).items()}
                for size in (dispatch_bytes, combine_bytes))  # fmt: skip
    return {name: {"dispatch_seconds": down[name], "combine_seconds": up[name]} for name in FORMULAS}


def _copies(cluster: Cluster, nodes: int, gpus_per_node: int, chosen: int) -> dict[str, tuple[float, float]]:
    """Copies of a token that a GPU sends, and the bandwidth that they meet."""
    gpus = nodes * gpus_per_node
    link = cluster.nic_bytes_per_second.value if nodes > 1 else cluster.nvlink_bytes_per_second.value
    bus = link * (gpus - 1) / ((nodes - 1) * gpus_per_node) if nodes > 1 else link
    return {
        "k_copies": (chosen, link),
        "uniform_single_copy": ((gpus - 1) / gpus, link),
        "single_nic_share": (chosen - 1, link),
        "busbw": (chosen * (gpus - 1) / gpus, bus),
        "every_node": (max(nodes - 1, 1), link),
    }
