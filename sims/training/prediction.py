"""DeepSeek-V2's published training cost as a prediction: what is not published about its set-up is run both ways, or drawn."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from sims.quantiles import Quantiles
from sims.simulation import simulate
from sims.training.result import StepResult
from sims.training.spec import TrainingStep

PLACEMENTS = {"packed": "the 8 devices of a layer in one node", "spread": "on 8 nodes"}
NODES = (32, 64, 128, 256)
"""Of 8 GPUs; with fewer, DeepSeek-V2 does not fit without recomputing more than it is said to."""


def deepseek_v2(placement: str, nodes: int = 128, constants: Mapping[str, float] | None = None) -> StepResult:
    """The published set-up (V2 sections 3.1.2 and 3.1.3): 16-way zero-bubble pipeline, 8-way expert parallelism, ZeRO-1, no tensor
    parallelism, some recomputation, shared experts beside the all-to-alls, 9,216 sequences of 4K."""
    result = simulate(TrainingStep(placement=placement, nodes=nodes, constants=dict(constants or {})))
    assert isinstance(result, StepResult)
    return result


def predicted(constants: tuple[tuple[str, float], ...] = ()) -> dict[str, dict[str, Any]]:
    """Draws, float64, of tokens/s per GPU by what is assumed: each placement on 1,024 GPUs and over the number of nodes, and
    `unknown`: placements and numbers of nodes equally likely, as they are to someone who has read the paper.  `constants`: name
    and value of those that are held at one."""
    return _predicted(constants)


@cache
def _predicted(constants: tuple[tuple[str, float], ...]) -> dict[str, dict[str, Any]]:
    held = dict(constants)
    found = {placement: {nodes: deepseek_v2(placement, nodes, held).tokens_per_second_per_gpu for nodes in NODES} for placement in PLACEMENTS}
    every = np.concatenate([draws for by_nodes in found.values() for draws in by_nodes.values()])
    return {
        **{placement: {"nodes": 128, "tokens_per_second_per_gpu": draws[128], "by_nodes": draws} for placement, draws in found.items()},
        "unknown": {"nodes": None, "tokens_per_second_per_gpu": every, "by_nodes": {}},
    }


def table() -> list[dict[str, Any]]:
    """A row for each assumption, P10, P50, P90 of tokens/s per GPU and of GPU-hours per 1e12 tokens."""
    rows = []
    for name, found in predicted().items():
        for nodes, draws in {found["nodes"]: found["tokens_per_second_per_gpu"], **found["by_nodes"]}.items():
            rate = Quantiles.of(draws)
            rows.append(
                {
                    "placement": name,
                    "nodes": nodes,
                    "tokens_per_second_per_gpu": [*rate],
                    "gpu_hours_per_trillion_tokens": [*Quantiles.of(1e12 / 3600 / draws)],
                }
            )
    return rows
