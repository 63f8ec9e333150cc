"""Laws that hold for every simulator: scaling, symmetry, limits, conservation, determinism, and explanations that add up."""

import io
import json
from dataclasses import fields, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from research.presets import preset
from research.routing_trace import RoutingTrace
from sims import AllToAll, TrainingStep, load_cluster, plan, reroute, simulate, synthetic_trace
from sims.__main__ import app
from sims.all_to_all import answer
from sims.cluster import Figure
from sims.collective import collective_seconds, latency_seconds
from sims.constants import load_constants
from sims.explain.all_to_all import explain_all_to_all
from sims.explain.sensitivity import perturbed
from sims.explain.serving import explain_serving
from sims.explain.training import explain_training_step
from sims.outputs.of_results import parquet_of, trace_of
from sims.outputs.parquet import parquet_bytes
from sims.pool import STRIDE
from sims.quantiles import Quantiles
from sims.serving import serving
from sims.training.step import closed_form

RATES = ("_bytes_per_second", "_flops_per_second")
NODES = [(1, 8), (2, 4), (4, 2), (8, 1)]


def small(**changes):
    wanted = {"nodes": 2, "gpus_per_node": 4, "tokens_per_device": 96, "hidden_size": 256, "n_routed_experts": 32, "num_experts_per_tok": 4} | changes
    return AllToAll(**wanted)


def step(**changes):
    """Four stages of the smallest of the scaled family, eight sequences."""
    wanted = {"model": preset("deepseek-v2-micro"), "nodes": 4, "gpus_per_node": 8, "pipeline_parallel": 2, "batch_size": 64, "sequence_length": 256}
    return TrainingStep(**(wanted | changes))


def served(**changes):
    return serving({"model": "deepseek-v2-lite", "requests": 40, "lengths": {"kind": "log-normal", "prompt": 64, "output": 32}} | changes)


def scaled(cluster, factor):
    """Every rate of the cluster times `factor`, every latency divided by it."""
    changes = {}
    for field in fields(cluster):
        figure = getattr(cluster, field.name)
        if isinstance(figure, Figure) and field.name.endswith(RATES):
            changes[field.name] = replace(figure, value=figure.value * factor)
        elif isinstance(figure, Figure) and field.name.endswith("_seconds"):
            changes[field.name] = replace(figure, value=figure.value / factor)
    assert len(changes) >= 7
    return replace(cluster, **changes)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(NODES), st.floats(0.3, 5), st.integers(0, 10**6), st.sampled_from(["random", "gaussian", "power-law"]))
def test_a_cluster_that_is_faster_in_everything_is_faster_by_as_much(shape, factor, seed, routing):
    planned = plan(small(nodes=shape[0], gpus_per_node=shape[1], seed=seed, routing=routing))
    constants = load_constants(planned.cluster, 4)
    faster = scaled(planned.cluster, factor)
    for traffic in (planned.dispatch, planned.combine, planned.backward_combine):
        times = [collective_seconds(traffic, cluster, constants, notify=True) for cluster in (planned.cluster, faster)]
        np.testing.assert_allclose(times[0] / times[1], factor, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_so_is_a_training_step(schedule):
    cluster, spec = load_cluster("h800"), step(schedule=schedule)
    constants = load_constants(cluster, 3)
    slow, fast = closed_form(spec, cluster, constants), closed_form(spec, scaled(cluster, 3.0), constants)
    np.testing.assert_allclose(slow.seconds / fast.seconds, 3.0, rtol=1e-9)
    for name, seconds in slow.breakdown.items():
        np.testing.assert_allclose(seconds, 3 * fast.breakdown[name], rtol=1e-6, atol=1e-9 * slow.seconds[0])


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(NODES), st.integers(0, 10**6))
def test_twice_the_bandwidth_halves_all_but_the_latency(shape, seed):
    planned = plan(small(nodes=shape[0], gpus_per_node=shape[1], seed=seed))
    constants = load_constants(planned.cluster, 4)
    doubled = constants.replaced(**{name: 2 * constants[name] for name in ("nvlink_efficiency", "nic_efficiency", "sm_efficiency")})
    fixed = latency_seconds(planned.dispatch, planned.cluster, constants)
    once, twice = (collective_seconds(planned.dispatch, planned.cluster, c) - fixed for c in (constants, doubled))
    np.testing.assert_allclose(once, 2 * twice, rtol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["random", "gaussian", "power-law", "hot-device"]), st.integers(0, 10**6), st.sampled_from(NODES))
def test_a_larger_limit_reaches_no_fewer_devices_and_from_k_on_all_is_as_without(family, seed, shape):
    made = {"tokens": 128, "n_routed_experts": 32, "num_experts_per_tok": 4, "expert_devices": 8, "device_limit": None}
    trace = synthetic_trace(family, **made, seed=seed)
    spec = small(nodes=shape[0], gpus_per_node=shape[1])
    found = {limit: simulate(spec, reroute(trace, limit)) for limit in (1, 2, 3, 4, 6, 8, None)}
    reached = [found[limit].distinct_routing_devices_per_token for limit in found]
    assert reached == sorted(reached)
    assert [found[limit].dispatch.nvlink_logical_bytes for limit in found] == sorted(r.dispatch.nvlink_logical_bytes for r in found.values())
    free = found[None]
    for limit in (4, 6, 8):
        np.testing.assert_array_equal(found[limit].nvlink_matrix, free.nvlink_matrix)
        np.testing.assert_array_equal(found[limit].infiniband_matrix, free.infiniband_matrix)
        assert found[limit].dispatch_seconds == free.dispatch_seconds


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(4)), st.permutations(range(4)))
def test_gpus_of_a_node_may_change_places_with_their_rails(seed, first, second):
    """Experts go along with their GPU, in both nodes alike, so that rails stay rails."""
    spec, order = small(seed=seed), list(first)
    devices = [[0, i] for i in range(4)] + [[1, i] for i in range(4)]
    moved = replace(spec, placement=[[node, order[gpu]] for node, gpu in devices])
    one, other = simulate(replace(spec, placement=devices)), simulate(moved)
    np.testing.assert_array_equal(one.nvlink_matrix, other.nvlink_matrix)
    np.testing.assert_array_equal(one.infiniband_matrix, other.infiniband_matrix)
    assert one.dispatch_seconds == other.dispatch_seconds
    del second


def test_one_gpu_sends_nothing_and_one_node_nothing_over_infiniband():
    alone = simulate(small(nodes=1, gpus_per_node=1))
    assert (alone.seconds, alone.nvlink_bytes, alone.infiniband_bytes) == (0, 0, 0)
    node = simulate(small(nodes=1, gpus_per_node=8))
    assert node.infiniband_bytes == 0 < node.nvlink_bytes
    together, apart = (simulate(step(placement=placement, nodes=8)).timeline() for placement in ("packed", "spread"))
    assert not sum(p.infiniband_bytes for p in together.phases if p.stream == "all-to-all")
    assert sum(p.infiniband_bytes for p in apart.phases if p.stream == "all-to-all") > 0


def test_a_balanced_trace_is_the_closed_form():
    """One node, one expert per token: of 512 tokens 64 go to each GPU, and the time is 448 copies over NVLink and 1,024 through SMs."""
    spec, size = small(nodes=1, gpus_per_node=8, tokens_per_device=512, num_experts_per_tok=1), 2 * 256
    ids = np.zeros((1, 1, 4096, 1), np.int16)
    ids[0, 0, np.arange(4096) * STRIDE % 4096, 0] = np.arange(4096) % 32  # in the order in which tokens are dealt, every expert in turn
    trace = RoutingTrace(
        expert_ids=ids, steps=np.array([0]), layers=np.array([0]), scores=np.zeros((1, 4096, 32), np.float16),
        n_routed_experts=32, expert_devices=8, device_limit=None,
    )  # fmt: skip
    planned = plan(spec, trace)
    result, cluster, constants = simulate(spec, trace), planned.cluster, load_constants(planned.cluster)
    np.testing.assert_array_equal(result.nvlink_matrix, 2 * 64 * size * (1 - np.eye(8, dtype=int)))
    assert result.expert_load_violation == 0
    heavier = 1 + constants["header_bytes"] / size
    nvlink = 448 * size * heavier / (cluster.nvlink_bytes_per_second.value * constants["nvlink_efficiency"])
    sms = cluster.communication_sms.value * cluster.sm_bytes_per_second.value * constants["sm_efficiency"]
    busy = np.maximum(nvlink, 1024 * size * heavier / sms)
    latency = cluster.nvlink_latency_seconds.value * constants["latency_factor"]
    by_hand = latency + constants["unexplained"] * busy
    assert tuple(result.dispatch_seconds) == pytest.approx(tuple(Quantiles.of(by_hand)), rel=1e-9)


@pytest.mark.parametrize("question", [small(), small(nodes=1), step(batch_size=64), served()], ids=["2 nodes", "1 node", "training", "serving"])
def test_the_same_question_writes_the_same_bytes(question):
    files = []
    for _ in range(2):
        result = simulate(question)
        files.append((parquet_of(result, {"seed": "0"}), trace_of(result, {"seed": "0"}, compress=False)))
    assert files[0] == files[1]
    assert pq.read_table(io.BytesIO(files[0][0])).num_rows > 10


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(NODES), st.integers(0, 10**6), st.sampled_from(["random", "hot-device", "ragged"]))
def test_the_traces_bytes_are_those_of_the_matrices(shape, seed, routing):
    planned = plan(small(nodes=shape[0], gpus_per_node=shape[1], seed=seed, routing=routing))
    result = answer(planned, load_constants(planned.cluster, 2))
    events = json.loads(trace_of(result, {}, compress=False))["traceEvents"]
    for name, matrix, label in (("nvlink_bytes", result.nvlink_matrix, "NVLink"), ("infiniband_bytes", result.infiniband_matrix, "InfiniBand")):
        slices = [e for e in events if e["ph"] == "X" and e["args"].get(name)]
        assert sum(e["args"][name] * e["args"].get("copies", 1) for e in slices) == matrix.sum()
        last = {e["pid"]: e["args"]["bytes"] for e in events if e["ph"] == "C" and e["name"] == f"{label} sent"}
        assert sum(last.values()) == matrix.sum()
        by_gpu = np.zeros(len(matrix), np.int64)
        for e in slices:
            by_gpu[e["args"]["gpu"]] += e["args"][name]
        np.testing.assert_array_equal(by_gpu, matrix.sum(1))


def test_arrows_join_the_ways_there_and_back_of_a_step_forward_and_backward():
    events = json.loads(trace_of(simulate(step()), {}, compress=False))["traceEvents"]
    at = {(e["pid"], e["tid"], e["ts"]): e["name"] for e in events if e["ph"] == "X" and e["dur"]}
    ends = [{e["id"]: at[e["pid"], e["tid"], e["ts"]] for e in events if e["ph"] == ph} for ph in ("s", "f")]
    pairs = {(ends[0][key], ends[1][key]) for key in ends[0]}
    assert pairs == {("dispatch", "combine"), ("combine backward", "dispatch backward")}
    assert len(ends[0]) == 2 * sum(name == "dispatch" for name in at.values())


def test_a_step_moves_what_its_layers_and_microbatches_move():
    spec = step()
    result = simulate(spec)
    sample = result.step.exchange.samples[0]
    layers = len([i for i in range(spec.model.num_hidden_layers) if spec.model.is_moe_layer(i)])
    each = sum(nvlink for nvlink, _ in sample.bytes.values())
    whole = sum(p.nvlink_bytes * p.copies for p in result.timeline().phases if p.stream == "all-to-all")
    assert whole == each * layers * spec.microbatches * spec.experts_over * spec.units


@pytest.mark.parametrize(
    ("explain", "question"),
    [(explain_all_to_all, small()), (explain_training_step, step(batch_size=64)), (explain_serving, served())],
    ids=["all-to-all", "training-step", "serving"],
)
def test_an_explanation_adds_up(explain, question):
    found = explain(question)
    elasticities = [abs(s.elasticity) for s in found.sensitivities]
    assert elasticities == sorted(elasticities, reverse=True)
    assert len(elasticities) >= 5
    assert found.bottleneck.endswith(".")
    assert found.answer.p10 <= found.answer.p50 <= found.answer.p90
    assert sum(found.to_dict()["shares"].values()) == pytest.approx(1)
    if found.unit == "s":
        assert sum(found.parts.values()) == pytest.approx(found.base, rel=1e-9)
    assert json.loads(json.dumps(found.to_dict()))["question"] == found.question


def test_elasticities_are_those_of_one_constant_at_a_time():
    planned = plan(small(nodes=4, gpus_per_node=2))
    constants = load_constants(planned.cluster, 2)
    found = {s.constant: s for s in explain_all_to_all(small(nodes=4, gpus_per_node=2)).sensitivities}
    best = {name: constants[name][0] for name in constants.names}
    for name in ("nic_efficiency", "latency_factor"):
        again = [
            float(sum(
                collective_seconds(way, planned.cluster, constants.replaced(**{**best, name: best[name] * factor}), notify=way is planned.dispatch)[0]
                for way in (planned.dispatch, planned.combine)
            )) for factor in (1.1, 0.9)
        ]  # fmt: skip
        assert (found[name].up, found[name].down) == pytest.approx(again, rel=1e-12)
    tilted = perturbed(constants)
    assert tilted.draws == 1 + 2 * len(constants.names)


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_commands_leave_files_behind_or_say_why_not(tmp_path):
    base = ["all-to-all", "--nodes", 2, "--gpus-per-node", 4, "--tokens", 96, "--experts", 32, "--hidden", 256, "--json"]
    paths = {"--parquet": "p.parquet", "--trace-out": "t.json.gz", "--heatmap": "h.png", "--figure": "f.png"}
    done = invoke(*base, *[word for option, name in paths.items() for word in (option, tmp_path / name)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["nodes"] == 2, "files do not disturb what a script reads"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(paths.values())
    table = pq.read_table(tmp_path / "p.parquet")
    assert json.loads(table.schema.metadata[b"question"])["tokens_per_device"] == 96
    waits = invoke("faults", "waits", "--slow", "3=1.25", "--tokens-per-device", 64, "--trace-out", tmp_path / "w.json")
    assert waits.exit_code == 0, waits.output
    assert any(e["args"].get("waits_for") == 3 for e in json.loads((tmp_path / "w.json").read_text())["traceEvents"] if e["ph"] == "X")
    failed = invoke(*base, "--parquet", tmp_path / "no" / "p.parquet", "--figure", tmp_path / "other.png")
    assert "--parquet" in str(failed.exception)
    assert "no/p.parquet" in str(failed.exception)
    assert not (tmp_path / "other.png").exists()


def test_a_sweeps_figure_is_m_times_k_times_nodes(tmp_path):
    base = ["sweep", "--nodes", "1,2", "--top-k", "2,4", "--device-limit", "1,2,null", "--gpus-per-node", 4, "--experts", 32, "--hidden", 256]
    assert invoke(*base, "--tokens", "96", "--figure", tmp_path / "m.png").exit_code == 0
    lines = (tmp_path / "m.csv").read_text().splitlines()
    assert len(lines) == 1 + 12
    assert "formula_k_copies_seconds" in lines[0]
    twice = invoke(*base, "--tokens", "64,96", "--figure", tmp_path / "n.png")
    assert "shows M x K x nodes" in str(twice.exception)
    assert not (tmp_path / "n.png").exists()


def test_explain_reads_the_options_of_the_question_or_a_file(tmp_path):
    words = ["--nodes", 2, "--gpus-per-node", 4, "--tokens", 96, "--experts", 32, "--hidden", 256]
    by_options = invoke("explain", "all-to-all", *words, "--json")
    assert by_options.exit_code == 0, by_options.output
    (tmp_path / "q.json").write_text(
        json.dumps({"nodes": 2, "gpus_per_node": 4, "tokens_per_device": 96, "n_routed_experts": 32, "hidden_size": 256})
    )
    by_file = invoke("explain", "all-to-all", "--spec", tmp_path / "q.json", "--json")
    assert by_file.stdout == by_options.stdout
    (tmp_path / "q.json").write_text('{"nodez": 2}')
    assert "nodez" in str(invoke("explain", "all-to-all", "--spec", tmp_path / "q.json").exception)
    assert "no such file" in str(invoke("explain", "serving", "--spec", tmp_path / "none.json").exception)
    assert invoke("explain", "all-to-all", "--nodez", 2).exit_code == 2
    shown = invoke("explain", "all-to-all", *words)
    assert "binds" in shown.stdout
    assert "elasticity" in shown.stdout


def test_parquet_of_a_timeline_is_independent_of_how_often_it_is_read():
    timeline = simulate(small()).timeline()
    assert parquet_bytes(timeline) == parquet_bytes(timeline)
