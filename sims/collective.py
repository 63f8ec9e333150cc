"""Seconds of one collective: latency, then the busiest of NIC, NVLink and SMs of the busiest GPU.

Streams of one GPU run side by side, so their time is the maximum, softened: a stream that is nearly as busy as the busiest
holds it up a little (p-norm over NIC, NVLink and SMs with the calibrated exponent; the limit p -> infinity is the maximum).
"""

from collections.abc import Mapping

import numpy as np

from sims.cluster import Cluster
from sims.constants import Constants
from sims.traffic import Traffic

STREAMS = ("nic out", "nic in", "nvlink out", "nvlink in", "sm")
CLASSES = {"nic": ("nic out", "nic in"), "nvlink": ("nvlink out", "nvlink in"), "sm": ("sm",)}

Moved = Mapping[str, np.ndarray]
"""By stream, int64 (G,): the bytes that each GPU moves on it."""
Speed = Mapping[str, np.ndarray]
"""By stream, float64 (G,): the share of its bandwidth that each GPU's link still has (1: healthy)."""


def moved_bytes(traffic: Traffic) -> Moved:
    """What each GPU's streams move."""
    return {
        "nic out": traffic.infiniband.sum(1),
        "nic in": traffic.infiniband.sum(0),
        "nvlink out": traffic.nvlink.sum(1),
        "nvlink in": traffic.nvlink.sum(0),
        "sm": traffic.sm,
    }


def streams(
    traffic: Traffic,
    cluster: Cluster,
    constants: Constants,
    *,
    sms: float | None = None,
    speed: Speed | None = None,
    moved: Moved | None = None,
) -> dict[str, np.ndarray]:
    """Busy seconds of each stream of each GPU, float64 (draws, G), isolated.

    `sms` work on the collective (None: the cluster's `communication_sms`).  Each copy of a token carries a header, which
    costs time but is not counted among the bytes.  `moved` spares their summing where one traffic is timed many times.
    """
    workers = cluster.communication_sms.value if sms is None else sms
    heavier = 1 + constants["header_bytes"] / traffic.bytes_per_token
    slower = heavier / (constants["combine_efficiency"] if traffic.kind == "combine" else 1.0)
    relay = constants["relay_efficiency"] if traffic.nodes > 1 else 1.0
    nvlink = heavier / (cluster.nvlink_bytes_per_second.value * constants["nvlink_efficiency"] * relay)
    oversubscribed = cluster.oversubscription if cluster.network == "plain" else 1.0
    nic = slower * oversubscribed / (cluster.nic_bytes_per_second.value * constants["nic_efficiency"])
    sm = slower / (workers * cluster.sm_bytes_per_second.value * constants["sm_efficiency"])
    per_byte = {"nic out": nic, "nic in": nic, "nvlink out": nvlink, "nvlink in": nvlink, "sm": sm}
    moved = moved_bytes(traffic) if moved is None else moved
    found = {name: np.multiply.outer(per_byte[name] * constants["unexplained"], moved[name]) for name in STREAMS}
    return {name: value / speed[name] if speed and name in speed else value for name, value in found.items()}


def gpu_seconds(found: Mapping[str, np.ndarray], constants: Constants) -> np.ndarray:
    """Transmit seconds of each GPU, float64 (draws, G): the softened maximum of its streams."""
    busy = np.stack([np.maximum.reduce([found[name] for name in names]) for names in CLASSES.values()])
    top = busy.max(0)
    share = np.divide(busy, top, out=np.zeros_like(busy), where=top > 0)
    power = constants["interference_exponent"][:, None]
    return top * (share**power).sum(0) ** (1 / power)


def latency_seconds(traffic: Traffic, cluster: Cluster, constants: Constants) -> np.ndarray:
    """What a collective costs however few its bytes, float64 (draws,); 0 where nothing is sent.

    A byte that changes rails, or any byte of a plain network, crosses leaf, spine and leaf: one network latency more.
    """
    if not traffic.moves:
        return np.zeros(constants.draws)
    seconds = cluster.nvlink_latency_seconds.value * constants["latency_factor"]
    if traffic.nodes > 1:
        hops = 1.0 if cluster.network == "plain" or traffic.crosses_rails else 0.0
        seconds = seconds + cluster.network_latency_seconds.value * (constants["network_latency_factor"] + hops)
    return seconds


def notify_seconds(traffic: Traffic, cluster: Cluster, constants: Constants) -> np.ndarray:
    """The exchange of counts before a dispatch: a barrier for all of the group, float64 (draws,)."""
    if not traffic.moves:
        return np.zeros(constants.draws)
    crossing = cluster.network_latency_seconds.value if traffic.nodes > 1 else 0.0
    return (cluster.notify_seconds.value + crossing) * constants["notify_factor"]


def collective_seconds(
    traffic: Traffic,
    cluster: Cluster,
    constants: Constants,
    *,
    sms: float | None = None,
    notify: bool = False,
    contention: float | np.ndarray = 1.0,
    speed: Speed | None = None,
    moved: Moved | None = None,
) -> np.ndarray:
    """Seconds of one collective, float64 (draws,).

    `contention` > 1 stretches all but the latency; `notify` adds the exchange of counts in front.
    """
    if not traffic.moves:
        return np.zeros(constants.draws)
    transmit = gpu_seconds(streams(traffic, cluster, constants, sms=sms, speed=speed, moved=moved), constants).max(1)
    seconds = latency_seconds(traffic, cluster, constants) + transmit * contention
    return seconds + notify_seconds(traffic, cluster, constants) if notify else seconds
