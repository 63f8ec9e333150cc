"""What a step's tokens ask of the experts and of the network, by how many tokens there are.

Measured on routed tokens at powers of two, between which it is interpolated: the (token, expert) pairs of the GPU that gets most
of them, how many of its experts get any (their weights are read), and the seconds of dispatch and combine.
"""

from dataclasses import dataclass

import numpy as np

from research.config import ModelConfig
from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.cluster import Cluster
from sims.collective import collective_seconds
from sims.constants import Constants
from sims.routing import Family, reroute, synthetic_trace
from sims.serving.capacity import Layout
from sims.serving.spec import Serving
from sims.traffic import dispatch, needed_devices, payload_bytes

TOKENS = 8192
"""Of a synthetic trace."""
WINDOWS = 16
"""Batches over which the busiest GPU is averaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertWork:
    """Of one MoE layer.  tokens: float64 (N,) of all GPUs, ascending from 1."""

    tokens: np.ndarray
    pairs: np.ndarray
    """float64 (N,), (token, expert) pairs on the busiest GPU."""
    experts: np.ndarray
    """float64 (N,), experts of that GPU with a token."""
    dispatch: np.ndarray
    combine: np.ndarray
    """float64 (N, draws), seconds; nothing where one GPU or one tensor-parallel group holds all experts."""

    def at(self, tokens: np.ndarray, draws: slice = slice(None)) -> "ExpertWork":
        """For each of float64 (S,) tokens: between neighbours on a line, and beyond the last on the line of the last two."""
        right = np.clip(np.searchsorted(self.tokens, tokens), 1, len(self.tokens) - 1)
        share = (tokens - self.tokens[right - 1]) / (self.tokens[right] - self.tokens[right - 1])

        def between(values: np.ndarray) -> np.ndarray:
            weight = share if values.ndim == 1 else share[:, None]
            return values[right - 1] * (1 - weight) + values[right] * weight

        experts = np.minimum(between(self.experts), self.experts.max())
        return ExpertWork(
            tokens=tokens,
            pairs=between(self.pairs),
            experts=experts,
            dispatch=between(self.dispatch[:, draws]),
            combine=between(self.combine[:, draws]),
        )


def expert_work(
    spec: Serving, model: ModelConfig, split: Layout, trace: RoutingTrace, cluster: Cluster, constants: Constants, sms: float
) -> ExpertWork:
    """From the last snapshot of a trace; more tokens than it holds are the same ones again."""
    ids = trace.expert_ids[-1].astype(np.int64)
    most = 2.0 * spec.max_batched_tokens * split.ranks
    grid = 2 ** np.arange(int(np.ceil(np.log2(max(most, 2)))) + 1)
    rows = [_busiest(ids, trace.n_routed_experts, split.expert_parallel, int(tokens)) for tokens in grid]
    seconds = [_collectives(spec, model, split, ids, trace.n_routed_experts, int(tokens), cluster, constants, sms) for tokens in grid]
    return ExpertWork(
        tokens=grid.astype(float),
        pairs=np.array([row[0] for row in rows]),
        experts=np.array([row[1] for row in rows]),
        dispatch=np.stack([pair[0] for pair in seconds]),
        combine=np.stack([pair[1] for pair in seconds]),
    )


def _busiest(ids: np.ndarray, experts: int, gpus: int, tokens: int) -> tuple[float, float]:
    """Pairs and distinct experts of the GPU with most pairs, mean over batches out of the trace (layers, M, K)."""
    layers, there, _ = ids.shape
    taken, repeats = min(tokens, there), tokens / min(tokens, there)
    starts = np.linspace(0, there - taken, max(1, min(WINDOWS, there // taken))).astype(int)
    pairs, distinct = list[float](), list[float]()
    for layer in range(layers)[: max(1, WINDOWS // len(starts))]:
        for start in starts:
            counts = np.bincount(ids[layer, start : start + taken].ravel(), minlength=experts).reshape(gpus, -1)
            busiest = int(np.argmax(counts.sum(1)))
            pairs.append(counts[busiest].sum() * repeats)
            distinct.append(float((counts[busiest] > 0).sum()))
    return float(np.mean(pairs)), float(np.mean(distinct))


def _collectives(
    spec: Serving,
    model: ModelConfig,
    split: Layout,
    ids: np.ndarray,
    experts: int,
    tokens: int,
    cluster: Cluster,
    constants: Constants,
    sms: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds (draws,) of dispatch and combine."""
    nothing = np.zeros(constants.draws)
    if split.ranks == 1:
        return nothing, nothing
    flat = ids.reshape(-1, ids.shape[-1])
    # A prime stride walks through all layers of the trace.
    needed = needed_devices(flat[np.arange(tokens) * 7919 % len(flat)], experts, split.gpus)
    down, up = payload_bytes(model.hidden_size, spec.dispatch_bits), payload_bytes(model.hidden_size, spec.combine_bits)
    there = dispatch(needed, np.arange(tokens) % split.gpus, spec.gpus_per_node, down)
    back = there.reverse(up, of=down)
    return (
        collective_seconds(there, cluster, constants, sms=sms, notify=True),
        collective_seconds(back, cluster, constants, sms=sms, notify=False),
    )


def model_trace(
    model: ModelConfig, trace: RoutingTrace | None, *, routing: Family, device_limit: int | str | None, tokens: int, seed: int
) -> RoutingTrace:
    """The trace that was given, re-routed if another device limit than the model's was asked for, or made-up tokens.

    ConfigError for a limit that the experts do not fit, and for a trace of another model's experts.
    """
    moe = model.moe
    assert moe is not None
    limit = moe.device_limit if isinstance(device_limit, str) else device_limit
    least = -(-moe.num_experts_per_tok // moe.experts_per_device)
    if limit is not None and not least <= limit <= moe.expert_devices:
        raise ConfigError(f"device_limit = {limit}: must lie in {least}..{moe.expert_devices} (expert_devices of the model), or be null")
    if trace is None:
        return synthetic_trace(
            routing,
            # As many for every expert: what is balanced is then so to the token.
            tokens=max(tokens // moe.n_routed_experts, 1) * moe.n_routed_experts,
            n_routed_experts=moe.n_routed_experts,
            num_experts_per_tok=moe.num_experts_per_tok,
            expert_devices=moe.expert_devices,
            device_limit=limit,
            seed=seed,
        )
    found, wanted = (trace.n_routed_experts, trace.num_experts_per_tok), (moe.n_routed_experts, moe.num_experts_per_tok)
    if found != wanted:
        raise ConfigError(f"trace: of {found[0]} experts, {found[1]} per token; the model has {wanted[0]} and {wanted[1]}")
    return trace if isinstance(device_limit, str) else reroute(trace, limit)
