"""A trial function that trains nothing: it counts, keeps its place, and writes down every step that it computes.

`computed.log` in a run's directory holds a line "pid step" per computed step, so that a test can see
what was repeated and where.  Files in the study's root steer it: `slow` (seconds per step), `bug`
(raise), `diverge` (end as diverged), `hang` (once, for ever); a file's text, if any, limits it to the runs named there.  `memory`:
so many sequences per pass fit, `gpu-memory` the same of a GPU.  `greedy`: a control group in which, once, more memory is taken than there is.

`harsh` trains for real and strikes each run that the file `faults` names once, in its sixth step, with what stands there for it.
`together` is for a group of workers, `idle` does nothing, `sleep` sleeps for the seconds in `slow`.
"""

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from research.atomic import write_text
from research.errors import OutOfMemory
from research.training.records import BITS_PER_BYTE, LOSS, JsonlRecorder, Record
from sims import synthetic_trace
from sweeps.trial import Group, Report, run_trial

STEPS = 20
TOKENS_PER_STEP = 100
CHECKPOINT_EVERY = 4


def bits_per_byte(config: Mapping[str, Any], step: int = STEPS) -> float:
    """What the stand-in says it reached: a function of the configuration, lower for more experts and devices."""
    moe = config["model"]["moe"]
    return 2.0 + 1.0 / step + 0.1 / moe["num_experts_per_tok"] + 0.01 / moe["device_limit"] + 0.001 * config["seed"]


def count(
    config: Mapping[str, Any],
    directory: Path,
    report: Report,
    should_stop: Callable[[], bool],
    *,
    micro_batch_size: int | None = None,
) -> dict[str, Any]:
    root = directory.parent.parent
    _need_memory(root, micro_batch_size or config["training"]["batch_size"])
    kept = directory / "checkpoint" / "step"
    start = int(kept.read_text()) if kept.exists() else 0
    recorder = JsonlRecorder(directory / "metrics.jsonl")
    state, step = "finished", start
    for step in range(start + 1, STEPS + 1):
        if _steered(root / "bug", directory.name) and step == 3:
            raise ValueError(f"a bug in step {step}")
        if _steered(root / "hang", directory.name) and step == 7 and _first(directory):
            time.sleep(10_000)
        if (root / "greedy").exists() and step == 7 and _first(directory):
            _take_until_killed(Path((root / "greedy").read_text()))
        _go_slowly(root / "slow")
        with (directory / "computed.log").open("a") as log:
            log.write(f"{os.getpid()} {step}\n")
        record = Record(step=step, tokens=step * TOKENS_PER_STEP, metrics={LOSS: 3.0 / step, BITS_PER_BYTE: bits_per_byte(config, step)})
        recorder.record(record)
        report({"step": step, "tokens": record.tokens, **record.metrics})
        stop = step < STEPS and should_stop()
        if stop or step % CHECKPOINT_EVERY == 0:
            write_text(kept, str(step))
        if stop or _steered(root / "diverge", directory.name):
            state = "stopped" if stop else "diverged"
            break
    else:
        moe = config["model"]["moe"]
        shape = {k: moe[k] for k in ("n_routed_experts", "num_experts_per_tok", "expert_devices", "device_limit")}
        synthetic_trace("random", tokens=256, seed=config["seed"], **shape).save(directory / "routing.npz")
    metrics = {LOSS: 3.0 / step, BITS_PER_BYTE: bits_per_byte(config, step)}
    reason = None if state == "finished" else f"{state} at step {step}"
    return {"state": state, "reason": reason, "steps": step, "tokens": step * TOKENS_PER_STEP, "seconds": 0.1, "metrics": metrics, "device": "cpu"}


def harsh(
    config: Mapping[str, Any],
    directory: Path,
    report: Report,
    should_stop: Callable[[], bool],
    *,
    micro_batch_size: int | None = None,
) -> dict[str, Any]:
    file = directory.parent.parent / "faults"
    fault = dict(line.split() for line in file.read_text().splitlines()).get(directory.name) if file.exists() else None

    def struck(record: Mapping[str, float]) -> None:
        report(record)
        if fault is not None and record["step"] >= 6 and _first(directory):
            FAULTS[fault]()

    if hasattr(os, "sched_getaffinity"):
        write_text(directory / "affinity.json", json.dumps(sorted(os.sched_getaffinity(0))))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        return run_trial(config, directory, struck, should_stop, micro_batch_size=micro_batch_size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def _fill_disk() -> None:
    """Every file that is written from now on finds no room behind its first 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _ask_for_a_petabyte() -> None:
    import torch

    torch.empty(2**50)


FAULTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "memory": _ask_for_a_petabyte,
    "disk": _fill_disk,
}


def together(config: Mapping[str, Any], directory: Path, report: Report, should_stop: Callable[[], bool], *, group: Group) -> dict[str, Any]:
    """Every rank leaves its mark and waits for the others'; rank 1 dies once where the file `bug` says so."""
    (directory / f"rank-{group.rank}").write_text(f"{os.getpid()} {group.size} {group.address}")
    if group.rank == 1 and _steered(directory.parent.parent / "bug", directory.name) and _first(directory):
        os.kill(os.getpid(), signal.SIGKILL)
    while not all((directory / f"rank-{rank}").exists() for rank in range(group.size)) or not _first_is_over(directory):
        time.sleep(0.02)
    return _ended({LOSS: 1.0, BITS_PER_BYTE: bits_per_byte(config)})


def hanging(config: Mapping[str, Any], directory: Path, report: Report, should_stop: Callable[[], bool], *, group: Group) -> dict[str, Any]:
    """Trains for real; rank 1 sleeps once in the middle of a layer of step 8."""
    from research.parallel import exchange

    plan = exchange.plan

    def slow(routing: Any, world: Any, per_worker: int, layer: int) -> Any:
        if group.rank == 1 and world.training and world.step == 8 and _first(directory):
            time.sleep(10_000)
        return plan(routing, world, per_worker, layer)

    exchange.plan = slow
    try:
        return run_trial(config, directory, report, should_stop, group=group)
    finally:
        exchange.plan = plan


def _first_is_over(directory: Path) -> bool:
    """Whether the rank that was to die has come back, if it was to die."""
    return not _steered(directory.parent.parent / "bug", directory.name) or (directory / "struck").exists()


def idle(config: Mapping[str, Any], directory: Path, report: Report, should_stop: Callable[[], bool]) -> dict[str, Any]:
    return _ended({BITS_PER_BYTE: bits_per_byte(config)})


def sleep(config: Mapping[str, Any], directory: Path, report: Report, should_stop: Callable[[], bool]) -> dict[str, Any]:
    until = time.monotonic() + float((directory.parent.parent / "slow").read_text())
    while time.monotonic() < until and not should_stop():
        time.sleep(0.05)
        report({"step": 1, "tokens": 1})
    return _ended({BITS_PER_BYTE: bits_per_byte(config)})


def _ended(metrics: dict[str, float]) -> dict[str, Any]:
    return {"state": "finished", "reason": None, "steps": STEPS, "tokens": 1, "seconds": 0.0, "metrics": metrics, "device": "cpu"}


def _need_memory(root: Path, sequences: int) -> None:
    if (root / "memory").exists() and sequences > int((root / "memory").read_text()):
        raise OutOfMemory(f"out of memory on cpu in step 1: {sequences} sequences")
    if (root / "gpu-memory").exists() and sequences > int((root / "gpu-memory").read_text()):
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _take_until_killed(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    held = []
    while True:
        held.append(b"x" * 2**24)


def _first(directory: Path) -> bool:
    """Whether this is asked for the first time of a run."""
    if (directory / "struck").exists():
        return False
    (directory / "struck").write_text(str(os.getpid()))
    return True


def _go_slowly(file: Path) -> None:
    """For the seconds that stand in `file`, which may become fewer meanwhile."""
    began = time.monotonic()
    while file.exists() and (left := began + float(file.read_text() or 0.0) - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


def _steered(file: Path, run: str) -> bool:
    return file.exists() and (not file.read_text().strip() or run in file.read_text().split())
