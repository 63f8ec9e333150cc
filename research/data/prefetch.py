"""The batches of the steps to come, made ready while the model works on the present one."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor


class Prefetcher:
    """Iterates over (step, make(step) on `device`), in the order of `steps`.

    A thread makes the next `depth` batches.  As each is a function of its step alone, how far ahead it was made
    changes no number.  On a GPU batches lie in pinned memory and are copied without waiting for the copy.  An
    error in `make` is raised where its batch is asked for.  The thread ends with the iteration, at its end, at a
    `break` or at an exception in the loop.
    """

    def __init__(self, make: Callable[[int], np.ndarray], steps: Iterable[int], device: torch.device, depth: int = 2) -> None:
        """ValueError for a depth of less than 1."""
        if depth < 1:
            raise ValueError(f"depth={depth} must be >= 1")
        self.make, self.steps, self.device, self.depth = make, steps, device, depth
        self.waited_seconds = 0.0
        """How long the consumer had to wait for batches so far."""

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        coming = iter(self.steps)
        try:
            ahead = deque((step, pool.submit(self._ready, step)) for step in islice(coming, self.depth))
            while ahead:
                step, future = ahead.popleft()
                began = time.perf_counter()
                rows = future.result()
                self.waited_seconds += time.perf_counter() - began
                ahead.extend((step, pool.submit(self._ready, step)) for step in islice(coming, 1))
                yield step, rows.to(self.device, non_blocking=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def _ready(self, step: int) -> Tensor:
        rows = torch.from_numpy(self.make(step))
        return rows.pin_memory() if self.device.type == "cuda" else rows
