"""Several workers of one run on this machine, as processes of it: what `python -m research train --workers` uses.

Across machines Ray starts the workers (`sweeps`), and each of them calls `world.join` itself.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from typing import Any, NamedTuple

import torch

from research.errors import CollectiveFailed, ConfigError, UserError
from research.parallel.world import World, join, leave

TURN_SECONDS = 0.2
FIRST_CAUSE_SECONDS = 2.0


class Parent(NamedTuple):
    """What a worker has of the process that started it."""

    tell: Callable[[Any], None]
    """Says something picklable to `listen`."""
    stop_asked: Callable[[], bool]


def run_workers(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    workers: int,
    expert_parallel: int | None = None,
    device: str = "auto",
    timeout_seconds: float = 600.0,
    started: Callable[[list[int]], None] = lambda pids: None,
    listen: Callable[[Any], None] = lambda said: None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """`work(world, parent, *arguments)` in `workers` new processes; what each returned, by rank.  See `Parent` for the last two.

    ConfigError if there are GPUs, `device` is not cpu, and they are fewer than the workers.  They end with this process, however it ends.
    When one of them fails, the others are ended within seconds and its error is raised here (of several, one that is not about a
    collective, which is how the neighbours of the first see it); CollectiveFailed if one was killed.  `started` gets their process ids.
    """
    backend = _backend(device, workers)
    context = multiprocessing.get_context("spawn")
    asked = context.Event()
    address = f"127.0.0.1:{free_port()}"
    pipes: list[Connection] = []
    processes = []
    for rank in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        how = (rank, workers, address, expert_parallel, timeout_seconds, backend)
        process = context.Process(target=_worker, args=(theirs, asked, how, work, arguments), daemon=True, name=f"worker-{rank}")
        # A worker leaves Ctrl-C to its parent from its first instruction on: the mask is inherited.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    started([int(process.pid or 0) for process in processes])
    found: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}
    try:
        waiting = dict(zip(pipes, range(workers), strict=True))
        while waiting and not errors:
            _collect(waiting, found, errors, listen, TURN_SECONDS)
            if stop_asked():
                asked.set()
        # A neighbour's collective fails because of the first error: the first one may be yet to come.
        until = time.monotonic() + FIRST_CAUSE_SECONDS
        while waiting and time.monotonic() < until and all(isinstance(error, CollectiveFailed) for error in errors.values()):
            _collect(waiting, found, errors, listen, TURN_SECONDS)
    finally:
        for process in processes:
            if len(found) < workers:
                process.kill()
            process.join()
    if errors:
        raise next((e for e in errors.values() if not isinstance(e, CollectiveFailed)), next(iter(errors.values())))
    return [found[rank] for rank in range(workers)]


def _collect(
    waiting: dict[Connection, int], found: dict[int, Any], errors: dict[int, BaseException], listen: Callable[[Any], None], seconds: float
) -> None:
    for pipe in wait(list(waiting), seconds):
        assert isinstance(pipe, Connection)
        try:
            kind, value = pipe.recv()
        except EOFError:
            kind, value = "error", CollectiveFailed(f"rank {waiting[pipe]} was killed")
        if kind == "said":
            listen(value)
        else:
            (found if kind == "result" else errors)[waiting.pop(pipe)] = value


def _worker(
    pipe: Connection, asked: Event, how: tuple[int, int, str, int | None, float, str], work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    rank, workers, address, parts, seconds, backend = how
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    world: World | None = None
    try:
        world = join(rank, workers, address=address, expert_parallel=parts, backend=backend, timeout_seconds=seconds)
        parent = Parent(lambda said: pipe.send(("said", said)), asked.is_set)
        message: tuple[str, Any] = ("result", work(world, parent, *arguments))
    except BaseException as error:
        message = ("error", error if isinstance(error, UserError) else RuntimeError(f"rank {rank}: {type(error).__name__}: {error}"))
    with contextlib.suppress(BrokenPipeError):
        pipe.send(message)
    if world is not None and message[0] == "result":
        leave()
    # gloo's threads abort a process that ends after a failed collective; all that matters has been sent.
    os._exit(0)


def _backend(device: str, workers: int) -> str:
    """nccl where there is a GPU for each worker, gloo where there is none, or none is to be used."""
    if device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    there = torch.cuda.device_count()
    if workers > there:
        raise ConfigError(f"--workers {workers}: each needs a GPU of its own and this machine has {there}; at most {there}, or --device cpu")
    return "nccl"


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers: they see to it themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
