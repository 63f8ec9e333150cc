"""A trace that ui.perfetto.dev and chrome://tracing open.

Trace event format (Google, "Trace Event Format"): process = node, thread = a stream of a GPU, complete events ("X") with their bytes,
flow arrows ("s", "f") from a dispatch to its combine, counters ("C") of each link's rate and of the bytes that each node has sent.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sims.timeline import Phase, Timeline

LINKS = (("NVLink", "nvlink_bytes"), ("InfiniBand", "infiniband_bytes"))
STREAM_ORDER = ("compute", "all-to-all", "nic out", "nic in", "nvlink out", "nvlink in", "sm", "pipeline", "gradients")
Event = dict[str, Any]
Lane = tuple[int, int, str, int]
"""Node, GPU, stream, and 0, or 1, 2, ... for phases of one stream that overlap: complete events of a thread must nest."""


def trace_bytes(timeline: Timeline, about: Mapping[str, str] | None = None, *, compress: bool = False) -> bytes:
    """The JSON of `trace_events`, gzipped on demand (Perfetto opens both); the same bytes for the same timeline."""
    document = {"traceEvents": trace_events(timeline), "displayTimeUnit": "ns", "otherData": dict(sorted((about or {}).items()))}
    data = json.dumps(document, separators=(",", ":")).encode()
    return gzip.compress(data, mtime=0) if compress else data


def trace_events(timeline: Timeline) -> list[Event]:
    """Names first, then slices, arrows and counters, each in the order of time.  Times are whole nanoseconds, given in microseconds.

    A slice's `args` hold what one GPU sends; `copies` GPUs do the same, so that the sum of bytes times copies is that of the byte matrices.
    """
    phases = sorted(timeline.phases, key=lambda phase: (phase.start_seconds, phase.end_seconds))
    lanes = _lanes(phases)
    threads = {lane: index for index, lane in enumerate(sorted(set(lanes), key=_lane_order), 1)}
    slices = [_slice(phase, threads[lane]) for phase, lane in zip(phases, lanes, strict=True)]
    return [*_names(threads), *slices, *_arrows(phases, slices), *_rates(phases), *_sent(phases)]


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _lane_order(lane: Lane) -> tuple[int, int, int, str, int]:
    node, gpu, stream, overlap = lane
    return node, gpu, STREAM_ORDER.index(stream) if stream in STREAM_ORDER else len(STREAM_ORDER), stream, overlap


def _lanes(phases: Sequence[Phase]) -> list[Lane]:
    """The thread of each phase (in order of start): the first lane of its stream that is free by then."""
    busy_until: dict[tuple[int, int, str], list[int]] = defaultdict(list)
    found = []
    for phase in phases:
        lanes = busy_until[phase.node, phase.gpu, phase.stream]
        start, end = _nanoseconds(phase.start_seconds), _nanoseconds(phase.end_seconds)
        free = next((index for index, until in enumerate(lanes) if until <= start), len(lanes))
        if free == len(lanes):
            lanes.append(end)
        lanes[free] = end
        found.append((phase.node, phase.gpu, phase.stream, free))
    return found


def _slice(phase: Phase, thread: int) -> Event:
    start, end = _nanoseconds(phase.start_seconds), _nanoseconds(phase.end_seconds)
    args: Event = {"gpu": phase.gpu}
    args |= {name: getattr(phase, name) for name in ("layer", "microbatch") if getattr(phase, name) >= 0}
    args |= {name: getattr(phase, name) for _, name in LINKS if getattr(phase, name)}
    if phase.copies != 1:
        args["copies"] = phase.copies
    if phase.waits_for >= 0:
        args |= {"waits_for": phase.waits_for, "wait_us": _nanoseconds(phase.wait_seconds) / 1e3, "wait_link": phase.wait_link}
    category = phase.direction or "phase"
    return {
        "ph": "X", "name": phase.name, "cat": category, "pid": phase.node, "tid": thread, "ts": start / 1e3, "dur": (end - start) / 1e3, "args": args,
    }  # fmt: skip


def _names(threads: Mapping[Lane, int]) -> Iterator[Event]:
    for node in dict.fromkeys(lane[0] for lane in threads):
        yield {"ph": "M", "name": "process_name", "pid": node, "tid": 0, "args": {"name": f"node {node}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": node, "tid": 0, "args": {"sort_index": node}}
    for (node, gpu, stream, overlap), thread in threads.items():
        label = f"GPU {gpu} {stream}" + (f" ({overlap + 1})" if overlap else "")
        yield {"ph": "M", "name": "thread_name", "pid": node, "tid": thread, "args": {"name": label}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": node, "tid": thread, "args": {"sort_index": thread}}


def _arrows(phases: Sequence[Phase], slices: Sequence[Event]) -> Iterator[Event]:
    """From each dispatch to the combine of the same GPU, layer, microbatch and direction; in the backward pass the combine's comes first.

    Phases of one collective that start together (one per link) are one end, at the longest of them; ends pair up in the order of time.
    """
    ends: dict[tuple[int, int, int, str], dict[str, dict[float, int]]] = defaultdict(lambda: {"dispatch": {}, "combine": {}})
    for index, phase in enumerate(phases):
        move = phase.name.removesuffix(" backward")
        if move in ("dispatch", "combine"):
            # Phases come in order of (start, end): the last of one start is the longest.
            ends[phase.gpu, phase.layer, phase.microbatch, phase.direction][move][phase.start_seconds] = index
    count = 0
    for pair in ends.values():
        for there, back in zip(pair["dispatch"].values(), pair["combine"].values(), strict=False):
            first, second = sorted((there, back))
            count += 1
            for kind, index in (("s", first), ("f", second)):
                at = slices[index]
                yield {
                    "ph": kind, "id": count, "name": "tokens", "cat": "all-to-all", "pid": at["pid"], "tid": at["tid"], "ts": at["ts"],
                } | ({"bp": "e"} if kind == "f" else {})  # fmt: skip


def _rates(phases: Sequence[Phase]) -> Iterator[Event]:
    """GB/s out of each GPU over each kind of link: a phase sends its bytes evenly."""
    changes: dict[tuple[int, int, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for phase in phases:
        start, end = _nanoseconds(phase.start_seconds), _nanoseconds(phase.end_seconds)
        for label, name in LINKS:
            if getattr(phase, name) and end > start:
                rate = getattr(phase, name) / (end - start)  # bytes per ns = GB/s
                changes[phase.node, phase.gpu, label][start] += rate
                changes[phase.node, phase.gpu, label][end] -= rate
    for (node, gpu, label), steps in sorted(changes.items()):
        level = 0.0
        for at in sorted(steps):
            level += steps[at]
            yield _counter(node, f"GPU {gpu} {label} out", at, {"GB/s": round(max(level, 0.0), 6)})


def _sent(phases: Sequence[Phase]) -> Iterator[Event]:
    """Bytes that a node's GPUs have sent by the end of each phase, all copies of it counted; the last value is the whole."""
    sent: dict[tuple[int, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for phase in phases:
        for label, name in LINKS:
            if getattr(phase, name):
                sent[phase.node, label][_nanoseconds(phase.end_seconds)] += getattr(phase, name) * phase.copies
    for (node, label), steps in sorted(sent.items()):
        yield _counter(node, f"{label} sent", 0, {"bytes": 0})
        total = 0
        for at in sorted(steps):
            total += steps[at]
            yield _counter(node, f"{label} sent", at, {"bytes": total})


def _counter(node: int, name: str, at: int, values: Mapping[str, float]) -> Event:
    return {"ph": "C", "name": name, "pid": node, "tid": 0, "ts": at / 1e3, "args": dict(values)}
