"""Files that a simulation leaves: valid by their format, complete to the byte, the same bytes each time."""

import gzip
import io
import itertools
import json
import struct
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.errors import ConfigError
from sims.outputs.figures import LimitPoint, limit_csv, limit_png, limit_text
from sims.outputs.files import check_target, write_bytes
from sims.outputs.heatmap import alternative_text, heatmap_png
from sims.outputs.parquet import parquet_bytes
from sims.outputs.perfetto import trace_bytes, trace_events
from sims.quantiles import Quantiles
from sims.timeline import Phase, Timeline


@st.composite
def timelines(draw):
    """Collectives of a few GPUs, forward and backward, some with a phase per link, and compute that may overlap."""
    phases = []
    for gpu in range(draw(st.integers(1, 4))):
        clock = draw(st.floats(0, 1e-3))
        for layer in range(draw(st.integers(1, 3))):
            for direction, names in (("forward", ("dispatch", "experts", "combine")), ("backward", ("combine", "experts", "dispatch"))):
                for name in names:
                    length = draw(st.floats(0, 1e-3))
                    streams = ("compute",) if name == "experts" else draw(st.sampled_from([("all-to-all",), ("nvlink out", "nic out")]))
                    for stream in streams:
                        sent = draw(st.integers(0, 10**9)) if name != "experts" else 0
                        phases.append(
                            Phase(
                                name=name, node=gpu // 2, gpu=gpu, stream=stream, layer=layer, direction=direction, microbatch=0,
                                start_seconds=clock, end_seconds=clock + length * draw(st.floats(0.1, 1)), copies=draw(st.integers(1, 3)),
                                nvlink_bytes=0 if "nic" in stream else sent, infiniband_bytes=sent if "nic" in stream else 0,
                            )
                        )  # fmt: skip
                    clock += length * draw(st.floats(0.5, 1.2))  # below 1 the next phase overlaps this one
    return Timeline(phases)


def bytes_of(timeline, name):
    return sum(getattr(phase, name) * phase.copies for phase in timeline.phases)


@settings(max_examples=60, deadline=None)
@given(timelines())
def test_a_trace_obeys_the_trace_event_format_and_loses_no_byte(timeline):
    document = json.loads(trace_bytes(timeline, {"seed": "0"}))
    assert document["displayTimeUnit"] in ("ms", "ns")
    events = document["traceEvents"]
    for event in events:
        assert {"ph", "pid", "tid", "name"} <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] != "M":
            assert event["ts"] >= 0
            assert float(f"{event['ts']:.3f}") == event["ts"], "whole nanoseconds"
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == len(timeline.phases)
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in slices} == named
    assert {e["pid"] for e in slices} == {e["pid"] for e in events if e["name"] == "process_name"} == {p.node for p in timeline.phases}
    for name, label in (("nvlink_bytes", "NVLink sent"), ("infiniband_bytes", "InfiniBand sent")):
        whole = bytes_of(timeline, name)
        assert sum(e["args"].get(name, 0) * e["args"].get("copies", 1) for e in slices) == whole
        last = {e["pid"]: e["args"]["bytes"] for e in events if e["ph"] == "C" and e["name"] == label}
        assert sum(last.values()) == whole


@settings(max_examples=60, deadline=None)
@given(timelines())
def test_slices_of_a_thread_do_not_overlap_and_counters_go_forward(timeline):
    events = trace_events(timeline)
    threads, counters = defaultdict(list), defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["tid"]].append((round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)))
        elif event["ph"] == "C":
            counters[event["pid"], event["name"]].append((event["ts"], *event["args"].values()))
    for spans in threads.values():
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    for (_, name), values in counters.items():
        times = [at for at, _ in values]
        assert times == sorted(times)
        if name.endswith("out"):
            assert values[-1][1] == pytest.approx(0, abs=1e-3), "a link falls silent"


@settings(max_examples=60, deadline=None)
@given(timelines())
def test_an_arrow_leads_from_each_dispatch_to_its_combine_and_backward_the_other_way(timeline):
    events = trace_events(timeline)
    at = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            at[event["pid"], event["tid"], event["ts"]].append(event)
    begins, ends = ({e["id"]: e for e in events if e["ph"] == ph} for ph in ("s", "f"))
    assert begins.keys() == ends.keys()
    collectives = {(p.gpu, p.layer, p.direction) for p in timeline.phases if p.name in ("dispatch", "combine")}
    assert len(begins) == len(collectives)
    for key, begin in begins.items():
        end = ends[key]
        assert end["bp"] == "e"
        assert begin["ts"] <= end["ts"]
        assert {e["name"] for e in at[begin["pid"], begin["tid"], begin["ts"]]} & {"dispatch", "combine"}
        assert {e["name"] for e in at[end["pid"], end["tid"], end["ts"]]} & {"dispatch", "combine"}


def test_a_trace_reads_like_the_story_it_tells():
    """One GPU sends 1,000 bytes in 1 us, works, and gets them back."""
    story = Timeline(
        [
            Phase(name="dispatch", node=0, gpu=0, stream="nvlink out", start_seconds=0, end_seconds=1e-6, nvlink_bytes=1000, layer=3, direction="forward"),
            Phase(name="experts", node=0, gpu=0, stream="compute", start_seconds=1e-6, end_seconds=4e-6, layer=3, waits_for=1, wait_seconds=5e-7, wait_link="nic in"),
            Phase(name="combine", node=0, gpu=0, stream="nvlink out", start_seconds=4e-6, end_seconds=5e-6, nvlink_bytes=2000, layer=3, direction="forward"),
        ]
    )  # fmt: skip
    events = trace_events(story)
    assert [(e["ph"], e["name"], e["ts"]) for e in events if e["ph"] != "M"] == [
        ("X", "dispatch", 0.0), ("X", "experts", 1.0), ("X", "combine", 4.0), ("s", "tokens", 0.0), ("f", "tokens", 4.0),
        ("C", "GPU 0 NVLink out", 0.0), ("C", "GPU 0 NVLink out", 1.0), ("C", "GPU 0 NVLink out", 4.0), ("C", "GPU 0 NVLink out", 5.0),
        ("C", "NVLink sent", 0.0), ("C", "NVLink sent", 1.0), ("C", "NVLink sent", 5.0),
    ]  # fmt: skip
    assert [e["args"]["GB/s"] for e in events if e["name"] == "GPU 0 NVLink out"] == [1.0, 0.0, 2.0, 0.0]
    assert [e["args"] for e in events if e["name"] == "experts"] == [{"gpu": 0, "layer": 3, "waits_for": 1, "wait_us": 0.5, "wait_link": "nic in"}]
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == ["GPU 0 compute", "GPU 0 nvlink out"]


@settings(max_examples=20, deadline=None)
@given(timelines())
def test_parquet_holds_every_phase_and_is_the_same_to_the_byte(timeline):
    data = parquet_bytes(timeline, {"seed": "7"})
    assert data == parquet_bytes(timeline, {"seed": "7"})
    table = pq.read_table(io.BytesIO(data))
    assert table.column_names == [f.name for f in fields(Phase)]
    assert table.to_pylist() == [{f.name: getattr(p, f.name) for f in fields(Phase)} for p in timeline.phases]
    assert table.schema.metadata[b"seed"] == b"7"
    assert table.schema.field("start_seconds").metadata == {b"unit": b"s"}


def test_nothing_simulated_is_an_empty_file_not_a_crash():
    assert pq.read_table(io.BytesIO(parquet_bytes(Timeline()))).num_rows == 0
    assert json.loads(trace_bytes(Timeline()))["traceEvents"] == []


def test_a_compressed_trace_holds_no_time_of_its_making():
    timeline = Timeline([Phase(name="x", node=0, gpu=0, stream="compute", start_seconds=0, end_seconds=1)])
    data = trace_bytes(timeline, compress=True)
    assert data[4:8] == bytes(4), "gzip's modification time"
    assert gzip.decompress(data) == trace_bytes(timeline)


def chunks(png: bytes) -> dict[bytes, bytes]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = {}, 8
    while at < len(png):
        (size,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        found[kind] = found.get(kind, b"") + png[at + 8 : at + 8 + size]
        at += 12 + size
    return found


def test_heat_maps_are_repeatable_and_say_in_words_what_they_show():
    random = np.random.default_rng(0)
    nvlink = random.integers(0, 10**6, (8, 8))
    nvlink[2, 5] = 10**7
    nothing = np.zeros((8, 8), np.int64)
    first = heatmap_png(nvlink, nothing, 8, "one node")
    assert first == heatmap_png(nvlink, nothing, 8, "one node")
    assert first != heatmap_png(nvlink.T, nothing, 8, "one node")
    text = alternative_text(nvlink, nothing, "one node")
    assert f"NVLink: {nvlink.sum():,} in all, most (10,000,000) from GPU 2 to GPU 5" in text
    assert "InfiniBand: none" in text
    assert text.encode() in chunks(first)[b"tEXt"]


def points():
    return [
        LimitPoint(
            nodes=n, num_experts_per_tok=k, device_limit=m, seconds=Quantiles(p10=1e-4 * n, p50=1.1e-4 * n * (m or 5), p90=1e-3 * n),
            formulas={"k_copies": 1e-3 * k, "every_node": 1e-3}, distinct_devices_per_token=min(m or k, k),
        )
        for n in (1, 2) for k in (4, 6) for m in (1, 2, 4, None)
    ]  # fmt: skip


def test_the_limit_figure_comes_with_its_data():
    first = limit_png(points())
    assert first == limit_png(points())
    lines = limit_csv(points()).splitlines()
    assert lines[0].startswith("nodes,num_experts_per_tok,device_limit,seconds_p10,seconds_p50,seconds_p90")
    assert lines[0].endswith("formula_k_copies_seconds,formula_every_node_seconds")
    assert len(lines) == 1 + len(points())
    assert lines[4].split(",")[2] == "", "unrestricted is an empty cell"
    assert "1, 2 nodes and K = 4, 6" in limit_text(points())
    assert limit_text(points()).encode() in chunks(first)[b"tEXt"]


def test_a_target_that_cannot_be_written_is_one_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--parquet .*missing/phases.parquet: there is no folder .*missing; make it first"):
        check_target(tmp_path / "missing" / "phases.parquet", "--parquet")
    with pytest.raises(ConfigError, match=r"is a folder"):
        check_target(tmp_path, "--trace-out")
    check_target(tmp_path / "new.json", "--trace-out")
    write_bytes(tmp_path / "new.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["new.json"]
