"""One run, wherever it is computed: the trial function, and what stands in the run's directory afterwards.

Any function with the signature of `run_trial` can take its place (`Job.function`): it gets the run's
configuration as a plain dict, a directory of its own, a callback for each record and a question to
ask after it, and returns how the run ended.  Called again on the same directory it goes on.  What it
can do beyond that it says by keywords: `micro_batch_size` (sequences per pass, fewer than configured
after an out-of-memory) and `group` (it trains one run in several workers).
"""

import importlib
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from research.atomic import write_text
from research.configfile import load_run_config
from research.parallel.sharing import common_experts
from research.routing_trace import RoutingTrace
from sims import AllToAll, Result, reroute, simulate
from sweeps import schema
from sweeps.system_metrics import sampled

LOCK_SECONDS = 60.0
SAY_SECONDS = 15.0

Report = Callable[[Mapping[str, float]], None]
Say = Callable[[str], None]


class RunBusyError(Exception):
    """Another worker still holds the run's directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The place of one worker among those that train a run together; `address` is host:port of the first, free to listen on.

    timeout_seconds: after which a worker that does not answer the others is given up.
    """

    rank: int
    size: int
    address: str
    timeout_seconds: float = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One attempt at one run."""

    run: str
    directory: str
    config: dict[str, Any]
    all_to_all: dict[str, Any] | None
    """The simulation of its routing; None for a model without routed experts."""
    attempt: int = 1
    threads: int = 1
    function: str = "sweeps.trial:run_trial"
    micro_batch_size: int | None = None
    """Sequences per pass; None for the configuration's own."""
    gpu_share: float = 1.0
    """Of a GPU's memory that this worker may take."""
    group: Group | None = None


def trial_function(name: str) -> Callable[..., dict[str, Any]]:
    """`module:function`, imported."""
    module, _, function = name.partition(":")
    found: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), function)
    return found


def accepts(function: str, keyword: str) -> bool:
    """Whether the trial function says that it can deal with `keyword`."""
    return keyword in inspect.signature(trial_function(function)).parameters


def call(job: Job, should_stop: Callable[[], bool], say: Say, progress: Report = lambda record: None) -> dict[str, Any]:
    """Train, simulate, and write summary.json; the summary comes back.  Whatever the trial function raises goes through.

    say: gets a line now and then.  progress: gets every record.
    The run's directory is locked meanwhile: a worker that outlived its driver cannot write beside its successor.  Of a group
    the first worker locks, simulates and writes; the others only train.
    """
    os.environ["OMP_NUM_THREADS"] = str(job.threads)  # torch reads it when it is imported
    _limit_gpu_memory(job.gpu_share)
    directory = Path(job.directory)
    directory.mkdir(parents=True, exist_ok=True)
    function, more = trial_function(job.function), dict[str, Any]()
    if job.micro_batch_size is not None:
        more["micro_batch_size"] = job.micro_batch_size
    if job.group is not None:
        more["group"] = job.group
        if job.group.rank > 0:
            return function(job.config, directory, progress, should_stop, **more)
    sayer = _sayer(say)

    def report(record: Mapping[str, float]) -> None:
        progress(record)
        sayer(record)

    try:
        with FileLock(directory / ".lock", timeout=LOCK_SECONDS), sampled(directory):
            found = function(job.config, directory, report, should_stop, **more)
            metrics = dict(found["metrics"])
            if found["state"] == schema.FINISHED and job.all_to_all is not None:
                metrics |= simulate_run(directory, AllToAll(**job.all_to_all))
            summary = {
                "schema": schema.SCHEMA_VERSION,
                "state": found["state"],
                "reason": found["reason"],
                "steps": found["steps"],
                "tokens": found["tokens"],
                "seconds": found["seconds"],
                "attempts": job.attempt,
                "metrics": metrics,
                "versions": _versions(),
                "device": found.get("device", "cpu"),
                "failure": schema.DIVERGED if found["state"] == schema.DIVERGED else None,
            }
            write_summary(directory, summary)
    except Timeout as error:
        raise RunBusyError(f"{directory}: another worker has been training this run for {LOCK_SECONDS:.0f} s") from error
    return summary


def _limit_gpu_memory(share: float) -> None:
    """Two workers on one GPU: neither can take the other's memory."""
    if not 0 < share < 1:
        return
    import torch  # noqa: PLC0415  (the driver imports this module and must not pay for torch)

    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def run_trial(
    config: Mapping[str, Any],
    directory: Path,
    report: Report,
    should_stop: Callable[[], bool],
    *,
    micro_batch_size: int | None = None,
    group: Group | None = None,
) -> dict[str, Any]:
    """Train for real; writes metrics.jsonl, checkpoint/ and routing.npz into `directory`.

    In a group the routed experts are shared out, all else is replicated (`research.parallel`), and the first worker writes.
    """
    import torch  # noqa: PLC0415  (the driver imports this module and must not pay for torch)

    from research.parallel.world import ALONE, join, leave  # noqa: PLC0415
    from research.training.loop import train  # noqa: PLC0415
    from research.training.records import JsonlRecorder, NoRecorder, Record  # noqa: PLC0415

    settings, first = load_run_config(config), group is None or group.rank == 0
    file = JsonlRecorder(directory / schema.METRICS_FILE) if first else NoRecorder()

    class Both:
        def record(self, record: Record) -> None:
            file.record(record)
            report({"step": record.step, "tokens": record.tokens, **record.metrics})

    world = ALONE
    if group is not None and group.size > 1:
        parts = common_experts(group.size, settings)
        world = join(group.rank, group.size, address=group.address, expert_parallel=parts, timeout_seconds=group.timeout_seconds)
    try:
        result = train(settings, directory, Both(), lambda record: should_stop(), micro_batch_size=micro_batch_size, world=world)
    finally:
        if world is not ALONE:
            leave()
    if result.trace is not None and first:
        result.trace.save(directory / schema.ROUTING_FILE)
    return {
        "state": result.state,
        "reason": result.reason,
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "metrics": dict(result.metrics),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def simulate_run(directory: Path, spec: AllToAll) -> dict[str, float]:
    """Write simulation.json: the run as it routes, and re-routed under every device limit that holds K experts; metrics of the first."""
    path = directory / schema.ROUTING_FILE
    if not path.exists():
        return {}
    trace = RoutingTrace.load(path)
    result = simulate(spec, trace)
    per_device = trace.n_routed_experts // trace.expert_devices
    limits = [m for m in range(1, trace.expert_devices + 1) if m * per_device >= trace.num_experts_per_tok]
    others = {str(limit or "unrestricted"): simulate(spec, reroute(trace, limit)).record() for limit in (*limits, None)}
    write_text(directory / schema.SIMULATION_FILE, json.dumps({"result": result.record(), "by_device_limit": others}))
    return _simulation_metrics(result)


def failed_summary(reason: str, attempts: int, failure: str = schema.BUG) -> dict[str, Any]:
    """The summary of a run that ended in an error or lost its worker too often: no numbers, only why."""
    return {
        "schema": schema.SCHEMA_VERSION,
        "state": schema.FAILED,
        "reason": reason,
        "steps": 0,
        "tokens": 0,
        "seconds": 0.0,
        "attempts": attempts,
        "metrics": {},
        "versions": _versions(),
        "device": None,
        "failure": failure,
    }


def pruned_summary(reason: str, attempts: int, directory: Path) -> dict[str, Any]:
    """The summary of a run that was given up while no worker had it: as far as it had come, no final numbers."""
    path = directory / schema.METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    last = json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {"step": 0, "tokens": 0}
    return {**failed_summary(reason, attempts), "state": schema.PRUNED, "failure": None, "steps": last["step"], "tokens": last["tokens"]}


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    write_text(directory / schema.SUMMARY_FILE, json.dumps(summary, indent=1))


def _simulation_metrics(result: Result) -> dict[str, float]:
    found = result.record()
    return {
        schema.DISPATCH_SECONDS: found["dispatch_seconds"],
        schema.COMBINE_SECONDS: found["combine_seconds"],
        schema.ALL_TO_ALL_SECONDS: found["seconds"],
        schema.NVLINK_BYTES: float(found["nvlink_bytes"]),
        schema.INFINIBAND_BYTES: float(found["infiniband_bytes"]),
    }


def _sayer(say: Callable[[str], None]) -> Report:
    """A line for every validation, and one now and then between."""
    said = [0.0]

    def report(record: Mapping[str, float]) -> None:
        validated = schema.BITS_PER_BYTE in record
        if not validated and time.monotonic() - said[0] < SAY_SECONDS:
            return
        said[0] = time.monotonic()
        names = {schema.LOSS: "loss", schema.BITS_PER_BYTE: "bits per byte", schema.TOKENS_PER_SECOND: "tokens/s"}
        say(", ".join([f"step {record['step']:.0f}", *(f"{text} {record[name]:.4g}" for name, text in names.items() if name in record)]))

    return report


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "numpy", "tokenizers", "simpy", "ray")}
