"""The formulas of other tools, kept as named baselines beside ours; none of them knows the device limit."""

from sims.cluster import Cluster


def formulas(
    cluster: Cluster, *, nodes: int, gpus_per_node: int, tokens: int, chosen: int, dispatch_bytes: int, combine_bytes: int
) -> dict[str, float]:
    """Dispatch and combine seconds together, by name.  `tokens` per GPU, bytes per token.

    k_copies: K T H bytes over one link (llm-analysis, GenZ).  uniform_single_copy: one copy, evenly
    over the ranks (ASTRA-sim, LLMServingSim).  single_nic_share: (K - 1) / K of the data over one NIC
    (SimuMax).  every_node: every token to every node (InferSim).
    """
    both = tokens * (dispatch_bytes + combine_bytes)
    gpus = nodes * gpus_per_node
    link = cluster.nic_bytes_per_second.value if nodes > 1 else cluster.nvlink_bytes_per_second.value
    return {
        "k_copies": chosen * both / link,
        "uniform_single_copy": both * (gpus - 1) / gpus / link,
        "single_nic_share": chosen * both * (chosen - 1) / chosen / link,
        "every_node": max(nodes - 1, 1) * both / link,
    }
