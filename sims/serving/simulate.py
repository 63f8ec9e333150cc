"""From the question to the answer."""

from dataclasses import dataclass

import numpy as np

from research.config import ModelConfig
from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from sims.cluster import Cluster, load_cluster
from sims.constants import Constants, load_constants, outside
from sims.quantiles import Quantiles
from sims.serving.capacity import Capacity, Layout, fit
from sims.serving.cost import Cost
from sims.serving.engine import Engine, Log, Scheduler
from sims.serving.experts import TOKENS, expert_work, model_trace
from sims.serving.requests import Requests, draw_requests
from sims.serving.result import CurvePoint, Served, ServingResult
from sims.serving.spec import Serving, model_config, model_name
from sims.serving.steady import Means, elasticities, means, prompt_rate, residents, saturated
from sims.simulation import simulate

LEAST, MOST, TURNOVERS = 200, 60_000, 6
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """A model on its GPUs, ready to be asked."""

    spec: Serving
    model: ModelConfig
    cluster: Cluster
    constants: Constants
    split: Layout
    room: Capacity
    cost: Cost


def server(spec: Serving, trace: RoutingTrace | None = None, constants: Constants | None = None) -> Server:
    """`constants` in place of the calibrated draws.

    ConfigError for what does not fit: GPUs, degrees, memory, or a trace of other experts than the model's.
    """
    cluster, model = load_cluster(spec.cluster), model_config(spec.model)
    if spec.gpus_per_node > cluster.gpus_per_node.value:
        raise ConfigError(f"gpus_per_node = {spec.gpus_per_node}: a node of {cluster.name} has {cluster.gpus_per_node.value:.0f}")
    if spec.compute_bits == 8 and cluster.fp8_flops_per_second is None:
        raise ConfigError(f"compute_bits = 8: {cluster.name} has no FP8 tensor cores (fp8_flops_per_second is not given); valid: 16")
    split, room = fit(spec, model, cluster)
    constants = load_constants(cluster, spec.draws, spec.constants) if constants is None else constants
    sms = cluster.communication_sms.value if spec.sms is None else float(spec.sms)
    if sms >= cluster.sms.value:
        raise ConfigError(f"sms = {sms:.0f}: must be < {cluster.sms.value:.0f}, the SMs of {cluster.name}")
    work = None
    if model.moe is not None:
        routed = model_trace(model, trace, routing=spec.routing, device_limit=spec.device_limit, tokens=TOKENS, seed=spec.seed)
        work = expert_work(spec, model, split, routed, cluster, constants, sms)
    elif trace is not None:
        raise ConfigError(f"model = {model_name(spec.model)}: is dense, a routing trace has nothing to say about it; leave it out")
    cost = Cost(spec, model, split, cluster, constants, work, sms=sms)
    return Server(spec=spec, model=model, cluster=cluster, constants=constants, split=split, room=room, cost=cost)


@simulate.register
def _(spec: Serving, trace: RoutingTrace | None = None) -> ServingResult:
    return simulate_serving(spec, trace)


def simulate_serving(spec: Serving, trace: RoutingTrace | None = None) -> ServingResult:
    """Capacity, saturation in closed form, and the run of the engine.

    trace: routing of a trained model; without it tokens choose experts by `spec.routing`.
    """
    host = server(spec, trace)
    sample = draw_requests(spec.lengths, spec.requests or 4096, rate=None, seed=spec.seed)
    _check_lengths(sample, host)
    average = means(sample, spec.block_tokens, reserve=spec.admission == "reserve")
    most, limit = residents(average, host.room, host.cost, spec)
    count = spec.requests or int(np.clip(TURNOVERS * most / host.split.replicas, LEAST, MOST))
    rate = None if spec.rate is None else spec.rate / host.split.replicas
    requests = draw_requests(spec.lengths, count, rate=rate, seed=spec.seed)
    _check_lengths(requests, host)
    full = saturated(average, host.cost, spec, most)
    gains = elasticities(average, host.room, host.cost, spec)
    log, served = _serve(host, requests, average)
    # Whoever comes is let in at once: more of anything would not serve more.
    idle = (spec.rate is not None or spec.clients is not None) and served.waiting <= max(1.0, 0.01 * served.residents) and served.residents < most
    return ServingResult(
        cluster=host.cluster.name,
        model=model_name(spec.model),
        nodes=spec.nodes,
        gpus_per_node=spec.gpus_per_node,
        tensor_parallel=host.split.tensor_parallel,
        replicas=host.split.replicas,
        binds="arrivals" if idle else max(gains, key=lambda name: gains[name]),
        residents_limited_by="arrivals" if idle else limit,
        elasticities=gains,
        capacity=host.room,
        saturated_residents=most,
        saturated_tokens_per_second=Quantiles.of(full.generated),
        decode_only_tokens_per_second=Quantiles.of(full.generated_alone),
        prompt_only_tokens_per_second=Quantiles.of(prompt_rate(average, host.cost, spec)),
        served=served,
        curve=curve(host, average, most),
        mean_prompt_tokens=float(requests.prompt.mean()),
        mean_output_tokens=float(requests.output.mean()),
        warnings=_warnings(host, served, full.generated, average, most),
        constants=host.constants.to_dict(),
        seed=spec.seed,
        log=log,
        cost=host.cost,
    )


def _check_lengths(requests: Requests, host: Server) -> None:
    longest = int((requests.prompt + requests.output).max())
    if longest > host.room.tokens_per_rank:
        raise ConfigError(
            f"lengths: a request of {longest:,} tokens (prompt and output) does not fit in the cache of a rank, which holds "
            f"{host.room.tokens_per_rank:,} at kv_bits = {host.spec.kv_bits}; lower lengths.maximum, or take more GPUs or fewer bits"
        )


def _scheduler(host: Server) -> Scheduler:
    spec, split = host.spec, host.split
    batch = None if spec.max_batch is None else max(1, spec.max_batch // split.replicas)
    return Scheduler(
        ranks=split.ranks,
        blocks=host.room.tokens_per_rank // spec.block_tokens,
        block_tokens=spec.block_tokens,
        max_batched_tokens=spec.max_batched_tokens,
        max_batch=batch,
        reserve=spec.admission == "reserve",
    )


def _serve(host: Server, requests: Requests, average: Means) -> tuple[Log, Served]:
    """One run at the best estimate.  In a closed loop the order of things does not depend on how long they take, so the same run
    is priced with every draw; with arrivals of their own it is run again at the draws whose steps are the P10, P50 and P90."""
    spec, scheduler = host.spec, _scheduler(host)
    if spec.rate is None:
        clients = len(requests) if spec.clients is None else max(1, spec.clients // host.split.replicas)
        log = Engine(requests, scheduler, host.cost, clients=clients).run()
        return log, _measure(host, requests, [(log, host.cost.price(log.rows).seconds)], endless=spec.clients is None)
    most, _ = residents(average, host.room, host.cost, spec)
    order = np.argsort(saturated(average, host.cost, spec, most).step_seconds, kind="stable")
    picked = sorted({int(order[round(share * (len(order) - 1))]) for share in (0.1, 0.5, 0.9)})
    log = Engine(requests, scheduler, host.cost).run()
    runs = list[tuple[Log, np.ndarray]]()
    for draw in picked:
        again = Engine(requests, scheduler, host.cost.of_draw(draw)).run()
        runs.append((again, again.seconds[:, None]))
    return log, _measure(host, requests, runs, endless=False, shown=log)


def _measure(host: Server, requests: Requests, runs: list[tuple[Log, np.ndarray]], *, endless: bool, shown: Log | None = None) -> Served:
    """From logs and the seconds (events, draws) of their events."""
    log, replicas = shown or runs[0][0], host.split.replicas
    gathered = [_rates(host, requests, run, seconds, endless=endless) for run, seconds in runs]

    def over(name: str) -> Quantiles:
        values = np.concatenate([found[name] for found in gathered])
        if len(runs) == 1:
            return Quantiles.of(values)
        low, middle, high = (float(np.sort(values)[i]) for i in (0, len(values) // 2, -1))
        return Quantiles(p10=low, p50=middle, p90=high)

    def by_share(name: str) -> dict[str, Quantiles]:
        return {key: over(f"{name} {key}") for key in SHARES}

    parts, start, stop = host.cost.price(log.rows), *_window(log)
    total = float(parts.seconds[:, 0].sum())
    inside = slice(start, stop)
    weight = log.seconds[inside]
    scale = float(replicas)
    whole = (start, stop) == (0, len(log.seconds))
    return Served(
        requests=len(requests) * replicas,
        seconds=over("seconds"),
        window="the whole run" if whole else f"{log.start[start]:.1f} to {log.start[stop - 1] + log.seconds[stop - 1]:.1f} s",
        generated_tokens_per_second=_scaled(over("generated"), scale),
        prompt_tokens_per_second=_scaled(over("prompt"), scale),
        requests_per_second=_scaled(over("requests"), scale),
        residents=float(np.average(log.residents[inside], weights=weight)) * replicas,
        waiting=float(np.average(log.waiting[inside], weights=weight)) * replicas,
        rank_waiting_share=float(np.average(log.rank_waiting[inside], weights=weight)),
        cache_used=float(1 - np.average(log.free_blocks[inside], weights=weight) / _scheduler(host).blocks),
        steps=int(log.rows[:, 7].sum()),
        preemptions=log.preemptions * replicas,
        recomputed_tokens=log.recomputed_tokens * replicas,
        ttft_seconds=by_share("ttft"),
        time_per_output_token_seconds=by_share("tpot"),
        latency_seconds=by_share("latency"),
        step_shares={name: float(value[0]) / total for name, value in parts.parts.items()},
        resource_shares={name: float(value[0]) / total for name, value in parts.resources.items()},
    )


def _scaled(quantiles: Quantiles, factor: float) -> Quantiles:
    return Quantiles(p10=quantiles.p10 * factor, p50=quantiles.p50 * factor, p90=quantiles.p90 * factor)


def _window(log: Log) -> tuple[int, int]:
    """Events [start, stop) without filling and draining: from a third of the requests done to the last admission."""
    stop = int(log.admitted_event.max())
    ends = np.sort(log.last_event)
    start = int(ends[len(ends) // 3])
    enough = stop - start >= 10 and log.generated[start:stop].sum() >= 0.1 * log.generated.sum()
    return (start, stop) if enough else (0, len(log.seconds))


def _rates(host: Server, requests: Requests, log: Log, seconds: np.ndarray, *, endless: bool) -> dict[str, np.ndarray]:
    """Each float64 (draws,)."""
    closed = endless or host.spec.clients is not None
    start, stop = _window(log)
    if closed:
        begin = np.concatenate([np.zeros((1, seconds.shape[1])), np.cumsum(seconds, 0)])
        came = begin[log.admitted_event if endless else log.issued_event]
    else:
        begin = np.concatenate([log.start, log.start[-1:] + log.seconds[-1:]])[:, None]
        came = requests.arrival[:, None]
    end = begin[:-1] + seconds
    first, last = end[log.first_event], end[log.last_event]
    span = end[stop - 1] - begin[start]
    # Where the server is always full, requests that came while it filled up or was emptied are left out.
    steady = (log.admitted_event >= start) & (log.admitted_event < stop) if closed else np.ones(len(requests), bool)
    steady = steady if steady.any() else np.ones(len(requests), bool)
    later = steady & (requests.output > 1)
    found = {
        "seconds": end[-1] - (0.0 if closed else requests.arrival[0]),
        "generated": log.generated[start:stop].sum() / span,
        "prompt": log.prompt_tokens[start:stop].sum() / span,
        "requests": ((log.last_event >= start) & (log.last_event < stop)).sum() / span,
    }
    each = {"ttft": (first - came)[steady], "latency": (last - came)[steady]}
    if later.any():
        each["tpot"] = (last - first)[later] / (requests.output[later, None] - 1)
    for name in ("ttft", "tpot", "latency"):
        for key, share in SHARES.items():
            found[f"{name} {key}"] = np.quantile(each[name], share, axis=0) if name in each else np.zeros(seconds.shape[1])
    return found


def curve(host: Server, average: Means, most: float) -> list[CurvePoint]:
    """Batches in powers of two from one sequence per group of GPUs up to what fits, that itself, and twice as many."""
    groups = host.split.ranks * host.split.replicas
    batches = [groups * 2.0**i for i in range(24) if groups * 2.0**i < most]
    found = []
    for batch in [*batches, most, 2 * most]:
        at = saturated(average, host.cost, host.spec, batch)
        bound = max(at.priced.resources, key=lambda name: at.priced.resources[name][0])
        found.append(
            CurvePoint(
                batch=batch,
                fits=batch <= most,
                step_seconds=Quantiles.of(at.step_seconds),
                generated_tokens_per_second=Quantiles.of(at.generated),
                decode_only_tokens_per_second=Quantiles.of(at.generated_alone),
                bound_by=bound,
            )
        )
    return found


def _warnings(host: Server, served: Served, full: np.ndarray, average: Means, most: float) -> list[str]:
    spec = host.spec
    found = list[str]()
    if host.cost.experts is not None and host.split.ranks > 1:
        moe = host.model.moe
        assert moe is not None
        tokens = served.residents / host.split.gpus * (average.decode + average.prompt)
        query = {"cluster": host.cluster.key, "nodes": spec.nodes, "tokens_per_device": round(tokens), "hidden_size": host.model.hidden_size}
        query |= {"num_experts_per_tok": moe.num_experts_per_tok} | ({"sms": spec.sms} if spec.sms is not None else {})
        found += outside(query)
    if spec.rate is None and spec.clients is None and served.requests < 3 * most:
        found.append(
            f"requests = {served.requests:,}: {most:,.0f} are resident at saturation, so this run fills and empties a server never in balance; "
            "take the closed form's rates, or more requests"
        )
    if spec.rate is not None and spec.rate * average.output > float(full[0]):
        found.append(
            f"rate = {spec.rate:g} requests/s asks for {spec.rate * average.output:,.0f} tokens/s, saturation gives {full[0]:,.0f}: "
            "the queue grows as long as the run lasts, and latencies with it"
        )
    if spec.rate is not None and served.latency_seconds["p90"].p50 > served.seconds.p50 / 3:
        found.append(
            f"requests = {served.requests:,}: the run of {served.seconds.p50:,.0f} s is short against latencies (p90 of them "
            f"{served.latency_seconds['p90'].p50:,.0f} s): the server is still filling up and rates are low"
        )
    if served.preemptions > 0.05 * served.requests:
        found.append(f"{served.preemptions:,} preemptions for {served.requests:,} requests: admission = reserve or max_batch would waste less")
    return found
