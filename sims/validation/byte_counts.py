"""What is exact: how many devices a token reaches under the limit M, and how many bytes cross NVLink and InfiniBand."""

from dataclasses import replace
from functools import cache
from math import comb
from pathlib import Path

import numpy as np

from research.routing_trace import select_experts
from sims.all_to_all import AllToAll
from sims.measured import read_run
from sims.outputs.figures import LimitPoint, limit_figure, limit_text, svg_bytes
from sims.outputs.of_results import limit_point
from sims.placement import Placement, place
from sims.simulation import simulate
from sims.traffic import Traffic, needed_devices, payload_bytes, traffic_of
from sims.validation.comparison import Published, published
from sims.validation.document import Figure, Section, signed, table
from sims.validation.pictures import ratio_figure

TOKENS = 16384
LIMITS = (1, 2, 3, 4, 5, 6, 8)
NOTED_DEVICES = (1, 2, 2.995, 3.89, 4.38, 4.46, 4.45)
"""Measured once with a throw-away prototype, random logits, 160 experts, K = 6, D = 8."""
MEASURED = Path(__file__).with_name("measured")


def expected_devices(experts: int, chosen: int, devices: int) -> float:
    """Distinct devices of `chosen` experts drawn at random without replacement (hypergeometric)."""
    return devices * (1 - comb(experts - experts // devices, chosen) / comb(experts, chosen))


@cache
def _scores(experts: int) -> np.ndarray:
    return np.random.default_rng(0).random((TOKENS, experts), np.float32)


def expert_parallel_traffic(nodes: int, experts: int = 256, chosen: int = 8, hidden_size: int = 7168, bits: int = 8) -> Traffic:
    """Dispatch of one token pool per GPU, dealt out evenly: random top-`chosen`, equal runs of experts on nodes of 8."""
    ids = select_experts(_scores(experts), chosen)
    where = place("packed", None, devices=8 * nodes, nodes=nodes, gpus_per_node=8, n_routed_experts=experts)
    return _traffic(ids, where, payload_bytes(hidden_size, bits))


def _traffic(ids: np.ndarray, where: Placement, bytes_per_token: int) -> Traffic:
    # Every GPU has every token of the pool once: the mean over tokens is then exact for the pool.
    needed = needed_devices(ids, where.expert_device, where.devices)
    return traffic_of(np.ones((where.devices, len(ids)), np.float32), needed, where, bytes_per_token)


def devices_section() -> Section:
    """Distinct devices per token over M, and the bytes of DeepSeek-V2's 8 devices in each placement."""
    rows, exact = [], expected_devices(160, 6, 8)
    places = {
        "one node": place("packed", None, devices=8, nodes=1, gpus_per_node=8, n_routed_experts=160),
        "2 x 4": place("packed", None, devices=8, nodes=2, gpus_per_node=4, n_routed_experts=160),
        "8 nodes": place("spread", None, devices=8, nodes=8, gpus_per_node=8, n_routed_experts=160),
    }
    for limit, noted in zip(LIMITS, NOTED_DEVICES, strict=True):
        ids = select_experts(_scores(160), 6, 8, limit)
        reached = float(needed_devices(ids, places["one node"].expert_device, 8).sum(1).mean())
        sent = [_traffic(ids, where, payload_bytes(5120, 16)) for where in places.values()]
        cells = [f"{t.nvlink.sum() / (8 * TOKENS):,.0f} / {t.infiniband.sum() / (8 * TOKENS):,.0f}" for t in sent]
        rows.append([str(limit), f"{noted:g}", f"{reached:.3f}", signed(reached, noted), f"{100 * max(1 - reached / exact, 0):.0f} %", *cells])
    blocks = [
        "Random affinities, 160 experts on 8 devices, K = 6, through the model's own routing rule. Bytes are of one token's dispatch in one layer "
        "(5,120 wide, BF16), NVLink / InfiniBand, for the three placements of the 8 devices that the paper leaves open.",
        table(["M", "noted", "ours", "error", "fewer sends than unrestricted", *(f"bytes, {name}" for name in places)], rows),
        f"Unrestricted routing of random experts has a closed form, 8 (1 - C(140, 6) / C(160, 6)) = {exact:.4f}; M >= K equals it exactly.",
    ]
    points = limit_points()
    figure = Figure(
        name="limit-by-nodes",
        caption="Dispatch and combine of DeepSeek-V2's layer (H800, BF16, 4,096 tokens per GPU, all GPUs expert-parallel) over M, K and nodes: "
        "predicted, with the formulas of other tools, none of which knows M. No measured sweep over M exists to hold it against.",
        alternative=limit_text(points),
        svg=svg_bytes(limit_figure(points)),
    )
    return Section(title="How many devices a token reaches", blocks=blocks, figures=[figure])


def limit_points() -> list[LimitPoint]:
    """The all-to-all of DeepSeek-V2's layer on H800 over M, two K and three numbers of nodes."""
    question = AllToAll(cluster="h800", hidden_size=5120, n_routed_experts=160, expert_devices=8)
    cells = [
        replace(question, nodes=nodes, num_experts_per_tok=chosen, device_limit=limit)
        for nodes in (1, 2, 4)
        for chosen in (6, 8)
        for limit in (1, 2, 3, 4, 6, None)
    ]
    return [limit_point(simulate(cell)) for cell in cells]


def ratio_section() -> Section:
    """NVLink bytes to InfiniBand bytes at 2, 4 and 8 nodes, and what the published bandwidths say about which of them binds."""
    known = published()
    ratio = known["v3_ratio"].value
    rows, ratios = [], {}
    for nodes in (2, 4, 8):
        traffic = expert_parallel_traffic(nodes)
        gpus = 8 * nodes
        per_token = [matrix.sum() / (gpus * TOKENS) / traffic.bytes_per_token for matrix in (traffic.nvlink, traffic.infiniband)]
        exact = expected_copies(nodes)
        ratios[nodes] = per_token[0] / per_token[1]
        binds = "NVLink" if ratios[nodes] > ratio else "InfiniBand"
        rows.append(
            [str(nodes), f"{per_token[0]:.3f}", f"{exact[0]:.3f}", f"{per_token[1]:.3f}", f"{exact[1]:.3f}", f"{ratios[nodes]:.2f}", f"**{binds}**"]
        )
    blocks = [
        "DeepEP's set-up: 256 experts, K = 8 drawn at random, hidden 7,168, FP8 dispatch, 8 GPUs per node, expert-parallel over all of them. "
        "A token crosses InfiniBand once to each other node that it needs, and NVLink once to each device there but the one that it came in by. "
        f"DeepSeek-V3 gives {known['v3_nvlink'].value:g} GB/s of NVLink beside {known['v3_infiniband'].value:g} GB/s of InfiniBand: "
        f"a ratio of {ratio:g}. NVLink binds where its bytes are more than that many times InfiniBand's.",
        table(["nodes", "NVLink copies per token", "closed form", "InfiniBand copies", "closed form", "ratio of bytes", f"binds at {ratio:g}"], rows),
        "### What the published bandwidths imply",
        *_implied(known),
    ]
    figure = Figure(
        name="nvlink-to-infiniband",
        caption=f"NVLink bytes over InfiniBand bytes of a dispatch. Above the line ({ratio:g}, the ratio of H800's bandwidths) NVLink binds.",
        alternative="Ratio of NVLink to InfiniBand bytes: " + ", ".join(f"{value:.2f} at {nodes} nodes" for nodes, value in ratios.items()) + ".",
        svg=svg_bytes(ratio_figure(ratios, ratio)),
    )
    return Section(title="NVLink bytes to InfiniBand bytes", blocks=blocks, figures=[figure])


def expected_copies(nodes: int, experts: int = 256, chosen: int = 8) -> tuple[float, float]:
    """Copies per token over NVLink and InfiniBand in closed form: a copy for every device but the entry of each node."""
    devices, reached = expected_devices(experts, chosen, 8 * nodes), expected_devices(experts, chosen, nodes)
    # At home the entry is the token's own GPU, in another node that of its rail: a device like any other, needed with equal chance.
    return devices * (1 - 1 / 8), reached * (1 - 1 / nodes)


def _implied(known: dict[str, Published]) -> list[str]:
    """Seconds and physical rates behind the logical bandwidths of DeepEP's table."""
    rows = []
    for key, nodes, hidden_bits, what in (
        ("deepep_ep16_dispatch", 2, 8, "EP16 dispatch"),
        ("deepep_ep16_combine", 2, 16, "EP16 combine"),
        ("deepep_ep32_dispatch", 4, 8, "EP32 dispatch"),
    ):
        size = payload_bytes(7168, hidden_bits)
        nvlink, infiniband = expected_copies(nodes)
        logical = expected_devices(256, 8, nodes) * size * 4096
        seconds = logical / (known[key].value * 1e9)
        rates = [copies * size * 4096 / seconds / 1e9 for copies in (nvlink, infiniband)]
        shares = rates[0] / known["v3_nvlink"].value, rates[1] / known["v3_infiniband"].value
        binds = "NVLink" if shares[0] > shares[1] else "InfiniBand"
        rows.append(
            [what, f"{known[key].value:g} GB/s", f"{1e6 * seconds:,.0f} us", f"{rates[0]:.0f} GB/s ({100 * shares[0]:.0f} %)",
             f"{rates[1]:.1f} GB/s ({100 * shares[1]:.0f} %)", f"**{binds}**"]
        )  # fmt: skip
    head = [
        "DeepEP on H800",
        "published, logical RDMA",
        "time of 4,096 tokens",
        "physical NVLink (of 160)",
        "physical InfiniBand (of 50)",
        "nearer its limit",
    ]
    return [
        table(head, rows),
        "A logical bandwidth counts the bytes of a rank's own node: the physical rate is (N - 1) / N of it. At 2 nodes InfiniBand carries less "
        "than half of what it can while NVLink is near its limit; at 4 nodes it is InfiniBand's turn. The bytes alone say so, and the "
        "published bandwidths agree.",
    ]


def measured_section() -> Section:
    """Bytes that real expert-parallel runs counted, beside what their routing predicts."""
    rows, runs = [], [(path.name, read_run(path)) for path in sorted(MEASURED.iterdir()) if path.is_dir()]
    for name, run in runs:
        for phase in run.phases:
            rows.append(
                [name, f"{run.workers} x {run.replicas}", str(run.device_limit), phase.name, f"{phase.measured:,}", f"{phase.predicted:,}",
                 f"{phase.different} of {phase.entries}"]
            )  # fmt: skip
    if not rows:
        return Section(title=MEASURED_TITLE, blocks=["No run over several processes is recorded in the package."])
    agreeing = sum(run.agrees for _, run in runs)
    blocks = [
        "Models that were trained by expert parallelism on several processes (gloo, this repository's `python -m research train --workers 8 "
        "--witness`), each with its share of the experts. Every process counted the bytes that it handed to its collectives, per destination, layer "
        "and step; the prediction is made from who was routed where, by the function that every simulated all-to-all asks. Tokens that stay with "
        "their worker are counted on both sides.",
        table(["run", "workers x replicas", "M", "phase", "bytes counted", "bytes predicted", "entries that differ"], rows),
        f"In {agreeing} of {len(runs)} runs every entry is equal to the byte. `python -m sims bytes RUN` does the same for a run of your own.",
    ]
    return Section(title=MEASURED_TITLE, blocks=blocks)


MEASURED_TITLE = "Bytes of real expert-parallel runs"
