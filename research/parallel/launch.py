"""Several workers of one run on this machine, as processes of it: what `python -m research train --workers` uses.

Across machines Ray starts the workers (`sweeps`), and each of them calls `world.join` itself.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from research.errors import CollectiveFailed, UserError
from research.parallel.world import World, join, leave


def run_workers(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    workers: int,
    expert_parallel: int | None = None,
    timeout_seconds: float = 600.0,
    started: Callable[[list[int]], None] = lambda pids: None,
) -> list[Any]:
    """`work(world, *arguments)` in `workers` new processes; what each returned, by rank.

    When one of them fails, the others are ended within seconds and its error is raised here (of several, one that is not about a
    collective, which is how the neighbours of the first see it); CollectiveFailed if one was killed.  `started` gets their process ids.
    """
    context = multiprocessing.get_context("spawn")
    address = f"127.0.0.1:{free_port()}"
    pipes: list[Connection] = []
    processes = []
    for rank in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        how = (rank, workers, address, expert_parallel, timeout_seconds)
        process = context.Process(target=_worker, args=(theirs, how, work, arguments), daemon=True, name=f"worker-{rank}")
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    started([int(process.pid or 0) for process in processes])
    found: dict[int, Any] = {}
    errors: dict[int, BaseException] = {}
    try:
        waiting = dict(zip(pipes, range(workers), strict=True))
        while waiting and not errors:
            _collect(waiting, found, errors, None)
        # A neighbour's collective fails because of the first error: the first one may be yet to come.
        while waiting and all(isinstance(error, CollectiveFailed) for error in errors.values()):
            if not _collect(waiting, found, errors, 2.0):
                break
    finally:
        for process in processes:
            if errors or not found:
                process.kill()
            process.join()
    if errors:
        raise next((e for e in errors.values() if not isinstance(e, CollectiveFailed)), next(iter(errors.values())))
    return [found[rank] for rank in range(workers)]


def _collect(waiting: dict[Connection, int], found: dict[int, Any], errors: dict[int, BaseException], seconds: float | None) -> bool:
    ready = wait(list(waiting), seconds)
    for pipe in ready:
        assert isinstance(pipe, Connection)
        rank = waiting.pop(pipe)
        try:
            kind, value = pipe.recv()
        except EOFError:
            kind, value = "error", CollectiveFailed(f"rank {rank} was killed")
        (found if kind == "result" else errors)[rank] = value
    return bool(ready)


def _worker(pipe: Connection, how: tuple[int, int, str, int | None, float], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    rank, workers, address, parts, seconds = how
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    world: World | None = None
    try:
        world = join(rank, workers, address=address, expert_parallel=parts, timeout_seconds=seconds)
        message: tuple[str, Any] = ("result", work(world, *arguments))
    except BaseException as error:
        message = ("error", error if isinstance(error, UserError) else RuntimeError(f"rank {rank}: {type(error).__name__}: {error}"))
    with contextlib.suppress(BrokenPipeError):
        pipe.send(message)
    if world is not None and message[0] == "result":
        leave()
    # gloo's threads abort a process that ends after a failed collective; all that matters has been sent.
    os._exit(0)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
