"""What a step of serving takes: the roofline of its operations, the experts of its busiest GPU, and what it communicates.

The operations of a step are those of `sims.roofline`.  They are affine in the sequences that generate, the positions that these attend to, the
prompt tokens and so on (VARIABLES); the coefficients are taken once, so that thousands of steps are priced at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from research.accounting import kv_cache_elements_per_token
from research.config import ModelConfig
from sims.cluster import Cluster
from sims.constants import Constants
from sims.roofline import Operation, Work, attention_operations, embedding_operations, ffn_operations, head_operations, peak, routed_operations
from sims.serving.capacity import Layout, kv_bytes
from sims.serving.engine import COLUMNS
from sims.serving.experts import ExpertWork
from sims.serving.spec import Serving

VARIABLES = ("any", "generating", "prompting", "with logits", *COLUMNS[:5], "heads", "routed", "experts")
"""Of a step, on one GPU: four that are 1 where there is such a token at all (weights are read once), then as in the engine's COLUMNS, then
(token, expert) pairs and experts of the busiest GPU."""
PARTS = ("attention", "dense products", "experts", "memory traffic", "communication", "host")
RESOURCES = ("compute", "HBM bandwidth", "communication", "host")

Operations = Callable[[Work], list[Operation]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One operation of a step, all layers that have it together: FLOPs, bytes and (of these) bytes of a product's result for one
    of each of VARIABLES, float64 (V,)."""

    name: str
    part: str
    kind: str
    flops: np.ndarray
    bytes: np.ndarray
    written: np.ndarray
    compute_bits: int

    @property
    def shared(self) -> bool:
        """Work of the experts, for which all ranks wait together."""
        return self.part == "experts"


def lines(model: ModelConfig, spec: Serving, split: Layout) -> list[Line]:
    """All operations of a step, in the order of a layer."""
    bytes_per_element = kv_bytes(spec, model, split)[0] / kv_cache_elements_per_token(model)
    base = Work(
        tokens=0.0,
        context=0.0,
        phase="decode",
        weight_bytes=spec.weight_bits / 8,
        kv_bytes=bytes_per_element,
        compute_bits=spec.compute_bits,
        expert_parallel=split.expert_parallel,
        shards=split.tensor_parallel,
    )
    layers, moe = range(model.num_hidden_layers), len(model.moe_layers)
    found = _attention(model, base, split)
    routed: list[str] = []
    if moe < len(layers):
        dense = next(i for i in layers if not model.is_moe_layer(i))
        found += _tokens(lambda work: ffn_operations(model, dense, work), base, len(layers) - moe)
    if moe:
        first = model.moe_layers[0]
        routed = [o.name for o in routed_operations(model, base)]
        found += _tokens(lambda work: [o for o in ffn_operations(model, first, work) if o.name not in routed], base, moe)
        found += _experts(model, replace(base, shards=1), moe)
    found += _tokens(lambda work: embedding_operations(model, work), base, 1)
    return found + _tokens(lambda work: head_operations(model, work), base, 1, logits=True)


def _attention(model: ModelConfig, base: Work, split: Layout) -> list[Line]:
    """Sequences that generate attend to latents, prompts to expanded keys and values: both kinds of operation, those that they share once."""
    layers = model.num_hidden_layers
    decode = _probe(lambda work: attention_operations(model, work), base)
    prefill = _probe(lambda work: attention_operations(model, work), replace(base, phase="prefill"))
    common = {name for name in decode if name in prefill and decode[name][0].kind != "attention"}
    found = []
    for name, (operation, fixed, each, far) in decode.items():
        terms = {"decode": each, "context": far, "any" if name in common else "generating": fixed}
        if name in common:
            terms["prompt"] = prefill[name][2]
        found.append(_line(operation, layers, terms))
    a = model.attention
    for name, (operation, fixed, each, far) in prefill.items():
        if name in common:
            continue
        terms = {"prompt": each, "pairs": far, "prompting": fixed}
        if a.kind == "mla" and operation.kind != "attention" and name != "cache":
            # What earlier chunks have cached is expanded again.
            terms["cached"] = each
        elif operation.kind == "attention":
            width = a.qk_head_dim + a.v_head_dim
            read = a.num_attention_heads / split.tensor_parallel * width * 2.0
            if a.kind != "mla":
                read = a.key_value_heads / min(split.tensor_parallel, a.key_value_heads) * width * base.kv_bytes
            terms["cached"] = (0.0, read, 0.0)
        found.append(_line(replace(operation, name="prompt attention") if operation.kind == "attention" else operation, layers, terms))
    return found


def _tokens(operations: Operations, base: Work, layers: int, *, logits: bool = False) -> list[Line]:
    """What is done for each token alike, or for each token with logits."""
    found = []
    for operation, fixed, each, _ in _probe(operations, base).values():
        terms = {"with logits": fixed, "heads": each} if logits else {"any": fixed, "decode": each, "prompt": each}
        found.append(_line(operation, layers, terms))
    return found


def _experts(model: ModelConfig, base: Work, layers: int) -> list[Line]:
    """Of the busiest GPU: work by pairs, weights by experts."""

    def at(pairs: float, experts: float) -> list[Operation]:
        return routed_operations(model, replace(base, routed_tokens=pairs, experts_read=experts))

    found = []
    for none, pair, expert in zip(at(0.0, 0.0), at(1.0, 0.0), at(0.0, 1.0), strict=True):
        terms = {"routed": _minus(pair, none), "experts": _minus(expert, none)}
        found.append(_line(none, layers, terms, part="experts"))
    return found


Term = tuple[float, float, float]
"""FLOPs, bytes, and bytes of a result that is written behind a product."""


def _minus(one: Operation, other: Operation) -> Term:
    return one.flops - other.flops, one.bytes - other.bytes, one.written - other.written


def _probe(operations: Operations, base: Work) -> dict[str, tuple[Operation, Term, Term, Term]]:
    """By name: what is there without tokens, for each token, and for each position that a token attends to."""
    none, one, far = (operations(replace(base, tokens=tokens, context=context)) for tokens, context in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)))
    return {o.name: (o, (o.flops, o.bytes, o.written), _minus(one[i], o), _minus(far[i], one[i])) for i, o in enumerate(none)}


def _line(operation: Operation, layers: int, terms: Mapping[str, Term], part: str | None = None) -> Line:
    flops, moved, written = (np.array([layers * terms.get(name, (0.0, 0.0, 0.0))[i] for name in VARIABLES]) for i in range(3))
    parts = {"attention": "attention", "dense_gemm": "dense products", "grouped_gemm": "experts", "memory": "memory traffic"}
    return Line(
        name=operation.name,
        part=part or parts[operation.kind],
        kind=operation.kind,
        flops=flops,
        bytes=moved,
        written=written,
        compute_bits=operation.compute_bits,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Priced:
    """Seconds of S events, each with all its steps, by draw; and where they go, of all events together."""

    seconds: np.ndarray
    """float64 (S, draws)."""
    parts: dict[str, np.ndarray]
    """PARTS to float64 (draws,)."""
    resources: dict[str, np.ndarray]
    """RESOURCES to float64 (draws,): what each operation is bound by."""


class Cost:
    """The engine's StepCost, and the same over all draws of the constants."""

    def __init__(
        self,
        spec: Serving,
        model: ModelConfig,
        split: Layout,
        cluster: Cluster,
        constants: Constants,
        experts: ExpertWork | None,
        *,
        sms: float,
    ) -> None:
        self.spec, self.model, self.split, self.cluster, self.constants = spec, model, split, cluster, constants
        self.experts, self.sms = experts, sms
        self.lines = lines(model, spec, split)
        self.byte_seconds = 1 / (cluster.hbm_bytes_per_second.value * constants["memory_efficiency"])
        computing = 1 - sms / cluster.sms.value if spec.overlap else 1.0
        self.flop_seconds = [self._flop_seconds(line, computing) for line in self.lines]
        self.half_tokens = constants["grouped_gemm_half_tokens"]
        self.link_latency = cluster.nvlink_latency_seconds.value * constants["all_reduce_latency_factor"]
        self.link_seconds = 1 / (cluster.nvlink_bytes_per_second.value * constants["nvlink_efficiency"])
        self.host = constants["serving_step_overhead_seconds"]
        # At the best estimate: seconds of each line for one of each variable, float64 (lines, VARIABLES).
        self.best_flops = np.array([line.flops * each[0] for line, each in zip(self.lines, self.flop_seconds, strict=True)])
        self.best_bytes = np.array([line.bytes * self.byte_seconds[0] for line in self.lines])
        self.exposed = constants["exposed_write"]
        self.best_written = np.array([line.written * self.byte_seconds[0] for line in self.lines])
        self.grouped = np.array([line.kind == "grouped_gemm" for line in self.lines])
        self.apart = np.array([not line.shared for line in self.lines])
        self.moe_layers = len(model.moe_layers)

    def _flop_seconds(self, line: Line, sms_share: float) -> np.ndarray:
        """float64 (draws,), of one FLOP; nothing where bytes alone count."""
        if line.kind == "memory":
            return np.zeros_like(self.byte_seconds)
        efficiency = self.constants["attention_efficiency" if line.kind == "attention" else "dense_gemm_efficiency"]
        if line.kind == "grouped_gemm":
            efficiency = efficiency * self.constants["grouped_gemm_share"]
        return 1 / (peak(self.cluster, line.compute_bits) * sms_share * efficiency)

    def of_draw(self, draw: int) -> "Cost":
        """With one draw of the constants as the best estimate."""
        experts = self.experts and replace(
            self.experts, dispatch=self.experts.dispatch[:, draw : draw + 1], combine=self.experts.combine[:, draw : draw + 1]
        )
        constants = Constants({name: self.constants[name][draw : draw + 1] for name in self.constants.names}, self.constants.sources)
        return Cost(self.spec, self.model, self.split, self.cluster, constants, experts, sms=self.sms)

    def rank_seconds(self, rows: np.ndarray) -> np.ndarray:
        variables = self._variables(rows, None)
        compute, moved, written = (variables @ best[self.apart].T for best in (self.best_flops, self.best_bytes, self.best_written))
        return (np.maximum(compute, moved) + self.exposed[0] * np.minimum(compute, written)).sum(1)

    def step_seconds(self, row: np.ndarray) -> float:
        """As `price` at the best estimate, without the parts."""
        if self.spec.overlap:
            return float(sum(value[0, 0] for value in self._parts(row[None], slice(0, 1))[0].values()))
        rows = row[None]
        work = self.experts.at(rows[:, 5], slice(0, 1)) if self.experts else None
        variables = self._variables(rows, work)[0]
        compute, moved, written = (best @ variables for best in (self.best_flops, self.best_bytes, self.best_written))
        if work is not None:
            compute[self.grouped] *= 1 + self.half_tokens[0] / max(work.pairs[0] / max(work.experts[0], 1e-9), 1e-9)
        own = np.maximum(compute, moved) + self.exposed[0] * np.minimum(compute, written)
        return float(own.sum() + self._communication(rows, work, slice(0, 1))[0, 0] + self.host[0])

    def part_seconds(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """PARTS to float64 (S,): events (S, COLUMNS) at the best estimate, each with all its steps."""
        return {name: value[:, 0] * rows[:, 7] for name, value in self._parts(rows, slice(0, 1))[0].items()}

    def price(self, rows: np.ndarray) -> Priced:
        """Events (S, COLUMNS), each with its `steps` steps, at all draws."""
        parts, resources = self._parts(rows, slice(None))
        steps = rows[:, 7]
        seconds = sum(parts.values(), np.zeros(1)) * steps[:, None]
        return Priced(
            seconds=seconds,
            parts={name: steps @ value for name, value in parts.items()},
            resources={name: steps @ value for name, value in resources.items()},
        )

    def _parts(self, rows: np.ndarray, draws: slice) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Seconds (S, draws) of one step of each event, by PARTS and by RESOURCES.

        With `overlap` two half batches take turns: each reads the weights, and of the communication (slowed by what computes
        beside it) only what is longer than the computation is seen.
        """
        if not self.spec.overlap:
            return self._apart(rows, draws)
        halves = rows.copy()
        halves[:, :7] /= 2
        parts, resources = self._apart(halves, draws)
        parts, resources = ({name: 2 * value for name, value in found.items()} for found in (parts, resources))
        sent = parts["communication"] / self.constants["overlapped_bandwidth"][draws]
        beside = sum(value for name, value in parts.items() if name not in ("communication", "host"))
        parts["communication"] = resources["communication"] = np.maximum(sent - beside, 0.0)
        parts["host"] = resources["host"] = parts["host"] / 2
        return parts, resources

    def _apart(self, rows: np.ndarray, draws: slice) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        work = self.experts.at(rows[:, 5], draws) if self.experts else None
        variables = self._variables(rows, work)
        shape = (len(rows), len(self.byte_seconds[draws]))
        parts, resources = ({name: np.zeros(shape) for name in names} for names in (PARTS, RESOURCES))
        for line, flop_seconds in zip(self.lines, self.flop_seconds, strict=True):
            compute = np.outer(variables @ line.flops, flop_seconds[draws])
            if line.kind == "grouped_gemm" and work is not None:
                each = work.pairs / np.maximum(work.experts, 1e-9)
                compute *= 1 + self.half_tokens[draws] / np.maximum(each, 1e-9)[:, None]
            moved = np.outer(variables @ line.bytes, self.byte_seconds[draws])
            behind = self.exposed[draws] * np.minimum(compute, np.outer(variables @ line.written, self.byte_seconds[draws]))
            parts[line.part] += np.maximum(compute, moved) + behind
            resources["compute"] += np.where(compute >= moved, compute, 0.0)
            resources["HBM bandwidth"] += np.where(compute < moved, moved, 0.0) + behind
        parts["communication"] += self._communication(rows, work, draws)
        parts["host"] += self.host[draws]
        return parts, {**resources, "communication": parts["communication"], "host": parts["host"]}

    def _variables(self, rows: np.ndarray, work: ExpertWork | None) -> np.ndarray:
        """float64 (S, VARIABLES)."""
        values = np.zeros((len(rows), len(VARIABLES)))
        values[:, 0] = (rows[:, 0] + rows[:, 2]) > 0
        values[:, 1], values[:, 2], values[:, 3] = rows[:, 0] > 0, rows[:, 2] > 0, rows[:, 6] > 0
        values[:, 4:9], values[:, 9] = rows[:, :5], rows[:, 6]
        if work is not None:
            values[:, 10], values[:, 11] = work.pairs, work.experts
        return values

    def _communication(self, rows: np.ndarray, work: ExpertWork | None, draws: slice) -> np.ndarray:
        """float64 (S, draws): all-to-alls of the MoE layers, and two all-reduces of each layer within a tensor-parallel group."""
        seconds = np.zeros((len(rows), len(self.byte_seconds[draws])))
        if work is not None:
            seconds += self.moe_layers * (work.dispatch + work.combine)
        shards, layers = self.split.tensor_parallel, self.model.num_hidden_layers
        if shards > 1:
            sent = 2 * (shards - 1) / shards * 2.0 * self.model.hidden_size * (rows[:, 0] + rows[:, 2])
            seconds += 2 * layers * (self.link_latency[draws] + np.outer(sent, self.link_seconds[draws]))
        return seconds
