"""A training step: what it is made of sums up, both tiers agree, and more hardware or less work never slows it."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from research import accounting
from research.configfile import read_yaml
from research.errors import ConfigError
from research.presets import preset
from sims import AllToAll, TrainingStep, plan, synthetic_trace
from sims.__main__ import app
from sims.cluster import load_cluster
from sims.collective import collective_seconds
from sims.constants import load_constants
from sims.simulation import simulate
from sims.traffic import payload_bytes
from sims.training.efficiency import DATA, FITTED, fit, gpu_hours, layout_step
from sims.training.exchange import exchange
from sims.training.layout import gpu_index, stage_layers, stage_parameters
from sims.training.memory import memory, saved_per_token
from sims.training.passes import left_over, side_by_side
from sims.training.prediction import predicted
from sims.training.schedules import SCHEDULES
from sims.training.step import CATEGORIES, closed_form


def small(**changes):
    """16 GPUs, a DeepSeek-V2 of 12 layers, 16 microbatches in each of 8 pipelines of two stages."""
    model = replace(preset("deepseek-v2"), num_hidden_layers=12)
    return TrainingStep(**{"model": model, "nodes": 2, "pipeline_parallel": 2, "batch_size": 128, **changes})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("routing", ["balanced", "gaussian"])
def test_the_breakdown_sums_to_the_step_and_both_tiers_agree(schedule, routing):
    spec = small(schedule=schedule, routing=routing, tier="event", speed={9: 1.2}, nodes=4, pipeline_parallel=4)
    result = simulate(spec)
    assert set(result.breakdown) == {*CATEGORIES, "jitter"}
    np.testing.assert_allclose(sum(result.breakdown.values()), result.seconds, rtol=1e-9)
    assert result.event_seconds == pytest.approx(result.seconds[0], rel=1e-9)
    answer = result.to_dict()
    assert sum(answer["breakdown"].values()) == pytest.approx(answer["step_seconds"]["p50"], rel=1e-9)
    assert all(value >= -1e-9 for value in answer["breakdown"].values())


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(SCHEDULES), st.sampled_from(["none", "partial", "full"]), st.booleans(), st.sampled_from(["packed", "spread"]))
def test_the_breakdown_sums_in_every_set_up(schedule, recompute, overlap, placement):
    spec = small(schedule=schedule, recompute=recompute, shared_expert_overlap=overlap, placement=placement, nodes=8, batch_size=256, draws=5)
    result = simulate(spec)
    np.testing.assert_allclose(sum(result.breakdown.values()), result.seconds, rtol=1e-9)
    assert all((value >= -1e-9).all() for value in result.breakdown.values())


def scaled(cluster, factor, names):
    return replace(cluster, **{name: replace(getattr(cluster, name), value=getattr(cluster, name).value * factor) for name in names})


RATES = ("nvlink_bytes_per_second", "nic_bytes_per_second", "sm_bytes_per_second", "bf16_flops_per_second", "hbm_bytes_per_second")
LATENCIES = ("nvlink_latency_seconds", "network_latency_seconds", "notify_seconds")


@pytest.mark.parametrize("changes", [{}, {"placement": "spread", "nodes": 8, "batch_size": 256}, {"schedule": "dualpipe"}])
def test_doubled_peak_and_bandwidths_halve_all_but_latency(changes):
    spec, cluster = small(**changes), load_cluster("h800")
    constants, still = load_constants(cluster), scaled(cluster, 1e-9, LATENCIES)
    slow, fast = (closed_form(spec, c, constants).seconds for c in (still, scaled(still, 2, RATES)))
    np.testing.assert_allclose(fast, slow / 2, rtol=1e-7)
    assert (closed_form(spec, scaled(cluster, 2, RATES), constants).seconds > closed_form(spec, cluster, constants).seconds / 2).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 15), st.floats(1.01, 3.0), st.sampled_from(SCHEDULES), st.integers(0, 1000))
def test_removing_a_straggler_never_slows(gpu, factor, schedule, seed):
    spec = small(schedule=schedule, routing="gaussian", seed=seed, draws=8, routing_samples=2)
    slow, healthy = simulate(replace(spec, speed={gpu: factor})), simulate(spec)
    assert (slow.seconds >= healthy.seconds - 1e-12).all()
    assert (slow.seconds > healthy.seconds).any()


def test_who_waits_for_whom_is_named():
    result = simulate(small(speed={13: 1.5}))
    assert {wait.culprit for wait in result.waits} == {13}
    assert {wait.stage for wait in result.waits} == {1}
    assert not simulate(small()).waits


def test_a_larger_limit_never_moves_fewer_bytes_nor_takes_less_time():
    cluster, moved, seconds = load_cluster("h800"), [], []
    for limit in range(1, 9):
        spec = small(placement="spread", nodes=8, batch_size=256, routing="gaussian", routing_samples=1)
        spec = replace(spec, model=replace(spec.model, moe=replace(spec.model.moe, device_limit=limit, capacity_factor=None)))
        constants = load_constants(cluster)
        moved.append(exchange(spec, cluster, constants).samples[0].bytes["dispatch"][1])
        seconds.append(closed_form(spec, cluster, constants).seconds[0])
    assert moved == sorted(moved)
    assert moved[0] < moved[2]
    assert seconds[0] < seconds[2]


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-67b"])
def test_without_expert_parallelism_there_is_no_all_to_all(name):
    model = replace(preset(name), num_hidden_layers=4)
    result = simulate(TrainingStep(model=model, nodes=1, pipeline_parallel=2, expert_parallel=1, batch_size=64))
    assert not result.step.communication.any()
    assert np.abs(result.breakdown["exposed_communication"]).max() < 1e-12
    timeline = simulate(TrainingStep(model=model, nodes=1, pipeline_parallel=2, expert_parallel=1, batch_size=64)).timeline()
    assert not any(phase.nvlink_bytes or phase.infiniband_bytes for phase in timeline.phases)


def test_one_gpu_takes_the_time_of_its_operations():
    """No pipeline, no communication: the step is microbatches times what the roofline says, and the optimizer."""
    model = replace(preset("deepseek-67b"), num_hidden_layers=3)
    result = simulate(TrainingStep(model=model, nodes=1, gpus_per_node=1, pipeline_parallel=1, batch_size=8, recompute="none", schedule="1f1b"))
    busy = sum(result.breakdown[kind] for kind in ("attention", "dense_gemm", "memory"))
    np.testing.assert_allclose(busy + result.breakdown["optimizer"], result.seconds, rtol=1e-12)
    least = accounting.train_flops_per_token(model, 4096) * 8 * 4096 / 989e12
    assert (result.seconds > least).all()
    np.testing.assert_allclose(result.mfu, least / result.seconds, rtol=1e-12)


def test_work_beside_work():
    """By hand: 6 s of products beside 4 s of communication, at half the SMs and half the bandwidth."""
    compute, communication = np.array([6.0]), np.array([4.0])
    assert side_by_side(compute, communication, 0.5, 0.5) == [8 + 2]
    assert left_over(compute, communication, 0.5, 0.5) == [2]
    assert side_by_side(np.array([2.0]), communication, 0.5, 0.5) == [4 + 2]
    assert side_by_side(np.array([0.0]), communication, 0.5, 0.5) == [4]
    assert left_over(np.array([2.0]), communication, 0.5, 0.5) == [0]


@pytest.mark.parametrize("nodes", [16, 32])
@pytest.mark.parametrize("placement", ["packed", "spread"])
def test_every_gpu_is_one_rank(nodes, placement):
    spec = TrainingStep(nodes=nodes, placement=placement)
    every = [gpu_index(spec, s, u, d) for s in range(spec.stages) for u in range(spec.units) for d in range(spec.experts_over)]
    assert sorted(every) == list(range(spec.gpus))
    homes = {gpu_index(spec, 3, 0, d) // 8 for d in range(8)}
    assert len(homes) == (1 if placement == "packed" else 8)


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-67b", "mixtral-8x22b", "glam-64b-64e"])
def test_stages_hold_all_layers_and_all_parameters(name):
    model = preset(name)
    devices = 8 if model.moe else 1
    spec = TrainingStep(model=model, nodes=32, expert_parallel=devices, pipeline_parallel=8, batch_size=8192)
    stages = stage_layers(spec)
    assert [layer for stage in stages for layer in stage] == list(range(model.num_hidden_layers))
    parts = [stage_parameters(model, s, first=i == 0, last=i == len(stages) - 1, expert_parallel=devices) for i, s in enumerate(stages)]
    total = accounting.total_parameters(model) + (model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0)
    assert sum(alike + devices * experts for alike, experts in parts) == total


def test_memory_of_published_set_ups():
    """V2 trained without tensor parallelism on 80 GB (V2 section 3.1.3); 67B's whole state is 16 bytes per parameter and rank of ZeRO-1."""
    held = memory(TrainingStep(nodes=128), 80e9)
    assert held.fits
    assert not memory(TrainingStep(nodes=128, recompute="none"), 80e9).fits
    dense = TrainingStep(model=preset("deepseek-67b"), nodes=1, gpus_per_node=1, pipeline_parallel=1, batch_size=8)
    held = memory(dense, 80e9)
    assert held.weights + held.gradients + held.optimizer == 18 * accounting.total_parameters(preset("deepseek-67b"))
    assert not held.fits
    assert "memory: stage 0 needs" in simulate(dense).warnings[0]
    kept = [saved_per_token(preset("deepseek-v2"), 5, how) for how in ("full", "partial", "none")]
    assert kept[0] == 2 * 5120 < kept[1] < kept[2]


def test_a_trace_is_routed_as_the_model_is_limited_and_must_have_its_shape():
    trace = synthetic_trace("gaussian", tokens=512, n_routed_experts=160, num_experts_per_tok=6, expert_devices=8, device_limit=None, seed=3)
    limited, wide = (
        simulate(replace(small(), model=replace(small().model, moe=replace(small().model.moe, device_limit=m))), trace) for m in (2, None)
    )
    assert limited.to_dict()["distinct_devices_per_token"] <= 2 < wide.to_dict()["distinct_devices_per_token"]
    other = synthetic_trace("random", tokens=64, n_routed_experts=32, num_experts_per_tok=4, expert_devices=8, device_limit=None)
    with pytest.raises(ConfigError, match=r"trace: has .*\(32, 4, 8\), the model has \(160, 6, 8\)"):
        simulate(small(), other)


def test_the_committed_fit_is_what_the_fit_gives_and_meets_the_published_hours():
    found = fit()
    assert json.loads(FITTED.read_text()) == json.loads(json.dumps(found.to_dict()))
    assert abs(found.residual) < 1e-9
    spec = layout_step(
        {"model": "deepseek-67b", "cluster": "h800", "sequence_length": 4096, "batch_size": 4608},
        {"nodes": 128, "tensor_parallel": 4, "pipeline_parallel": 8},
    )
    cluster = load_cluster("h800")
    assert gpu_hours(spec, closed_form(spec, cluster, load_constants(cluster)).seconds)[0] == pytest.approx(300600, rel=0.02)
    assert all(0 < draw < 1 for draw in found.draws["dense_gemm_efficiency"])


def answer(*arguments):
    result = CliRunner().invoke(app, ["training-step", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


FEW = ("--nodes", "2", "--pipeline-parallel", "2", "--batch-size", "128", "--set", "model.num_hidden_layers=8")


def test_the_command_answers_the_same_bytes_twice_and_takes_fields_by_name():
    first = answer(*FEW, "--json")
    assert first == answer(*FEW, "--json")
    for name in ("device_limit=2", "routing.device_limit=2", "model.moe.device_limit=2"):
        assert json.loads(answer(*FEW, "--set", name, "--json"))["spec"]["model"]["moe"]["device_limit"] == 2
    value = json.loads(first)
    assert {"step_seconds", "breakdown", "bubble_share", "mfu", "memory_per_gpu_bytes", "warnings", "constants", "seed"} <= set(value)
    assert value["step_seconds"]["p10"] < value["step_seconds"]["p50"] < value["step_seconds"]["p90"]
    assert value["gpu_hours_per_trillion_tokens"]["p50"] == pytest.approx(1e12 / 3600 / value["tokens_per_second_per_gpu"]["p50"], rel=0.01)
    assert "tokens/s per GPU" in answer(*FEW)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--set", "pipeline_parallel=3"], "pipeline_parallel=3 x tensor_parallel=1 must divide the 16 GPUs"),
        (["--set", "pipeline_parallel=16", "--set", "expert_parallel=1"], "pipeline_parallel=16 must be <= model.num_hidden_layers=8"),
        (["--set", "expert_parallel=3"], "expert_parallel=3 must divide the 8 data-parallel ranks"),
        (["--batch-size", "12"], "batch_size=12 must be a multiple of 8"),
        (["--set", "layers_per_stage=[3, 4]"], "layers_per_stage=[3, 4] must be 2 numbers"),
        (["--placement", "spread"], "expert_parallel=8 GPUs on as many nodes must divide nodes=2"),
        (["--placement", "near"], "placement='near' must be packed or spread"),
        (["--schedule", "gpipe"], "schedule = 'gpipe'"),
        (["--schedule", "dualpipe", "--batch-size", "24"], "batch_size=24 gives 3"),
        (["--set", "device_limt=2"], "did you mean 'device_limit'"),
        (["--set", "device_limit=9"], "device_limit=9 must lie in 1..8"),
        (["--set", "speed.16=2"], "speed.16=2.0: there is no such GPU; valid: 0 to 15"),
        (["--set", "speed.3=-1"], "speed.3=-1.0 must be > 0"),
        (["--routing", "zipf"], "zipf"),
        (["--model", "deepseek-v9"], "model = 'deepseek-v9': no such preset or file; did you mean 'deepseek-v2'"),
        (["--cluster", "h900"], "cluster = 'h900'"),
        (["--gpus-per-node", "16"], "gpus_per_node = 16: a node of"),
        (["--set", "jitter=0.1"], "needs tier=event"),
    ],
)
def test_mistakes_are_one_sentence_with_the_value(wrong, said):
    result = CliRunner().invoke(app, ["training-step", *FEW, *wrong])
    assert isinstance(result.exception, ConfigError), result.output
    assert said in str(result.exception)
    assert len(result.exception.problems) == 1


def test_the_prediction_of_deepseek_v2_says_what_it_assumes():
    """More GPUs for the same batch have fewer microbatches each, devices on 8 nodes slower links; not knowing which is in between."""
    found = predicted()
    packed, spread = found["packed"]["by_nodes"], found["spread"]["by_nodes"]
    medians = [np.median(packed[nodes]) for nodes in sorted(packed)]
    assert medians == sorted(medians, reverse=True)
    assert all((packed[nodes] > spread[nodes]).all() for nodes in packed)
    unknown = np.median(found["unknown"]["tokens_per_second_per_gpu"])
    assert np.median(found["spread"]["tokens_per_second_per_gpu"]) < unknown < np.median(found["packed"]["tokens_per_second_per_gpu"])
    assert "172.8" not in json.dumps(read_yaml(DATA))


def test_the_timeline_has_every_phase_of_the_step():
    spec = small(placement="spread", nodes=8, batch_size=256)
    result = simulate(spec)
    rows = result.timeline().phases
    assert max(row.end_seconds for row in rows) == pytest.approx(result.seconds[0], rel=1e-9)
    assert {"attention", "experts", "dispatch", "combine", "shared experts", "gradients", "optimizer", "head", "embedding"} <= {r.name for r in rows}
    assert all(row.copies == spec.experts_over * spec.units for row in rows)
    moved = [row for row in rows if row.name == "dispatch" and row.layer == 3]
    assert len(moved) == spec.microbatches
    assert {row.infiniband_bytes for row in moved} == {result.step.exchange.samples[0].bytes["dispatch"][1]}
    for gpu in {row.gpu for row in rows}:
        mine = [row for row in rows if row.gpu == gpu and row.name != "shared experts"]
        assert all(a.end_seconds <= b.start_seconds + 1e-12 for a, b in itertools.pairwise(mine))


def test_jitter_only_in_the_event_tier_and_only_slows():
    still, moved = simulate(small(tier="event")), simulate(small(tier="event", jitter=0.2))
    np.testing.assert_allclose(moved.seconds / still.seconds, moved.event_seconds / still.event_seconds, rtol=1e-9)
    np.testing.assert_allclose(sum(moved.breakdown.values()), moved.seconds, rtol=1e-9)
    assert moved.event_seconds > still.event_seconds
    assert moved.event_seconds == simulate(small(tier="event", jitter=0.2)).event_seconds


@pytest.mark.parametrize("placement", ["packed", "spread"])
def test_the_four_ways_are_those_of_the_all_to_all(placement):
    """Bytes and seconds against `sims.all_to_all`'s own plan of the same tokens; gradients travel in 16 bits."""
    spec = small(placement=placement, nodes=8, batch_size=256, dispatch_bits=8, routing="random", routing_samples=1)
    cluster = load_cluster("h800")
    constants = load_constants(cluster)
    sample = exchange(spec, cluster, constants).samples[0]
    nodes, each = (1, 8) if placement == "packed" else (8, 1)
    planned = plan(AllToAll(nodes=nodes, gpus_per_node=each, device_limit=3, dispatch_bits=8))
    for name, traffic in (("dispatch", planned.dispatch), ("combine", planned.combine)):
        assert sample.bytes[name] == pytest.approx((traffic.nvlink.sum() / 8, traffic.infiniband.sum() / 8), rel=0.01)
        expected = collective_seconds(traffic, cluster, constants, notify=name == "dispatch")
        np.testing.assert_allclose(sample.seconds[name], expected, rtol=0.02)
    wide = payload_bytes(5120, 16) / payload_bytes(5120, 8)
    assert sum(sample.bytes["combine backward"]) == pytest.approx(wide * sum(sample.bytes["dispatch"]), rel=1e-6)
    assert sample.bytes["dispatch backward"] == sample.bytes["combine"]


def test_pairs_over_the_budget_are_dropped_but_for_the_spared_sequences():
    model = small().model
    moe = replace(model.moe, device_limit=None)
    free, held = (
        exchange(
            replace(small(routing="hot-device", routing_samples=1), model=replace(model, moe=replace(moe, capacity_factor=factor))),
            load_cluster("h800"),
            load_constants(load_cluster("h800")),
        ).samples[0]
        for factor in (None, 1.0)
    )
    budget = free.pairs.mean()
    assert free.pairs.sum() == 8 * 4096 * 6
    assert free.pairs[0] > 1.5 * budget
    np.testing.assert_allclose(held.pairs, np.minimum(free.pairs, np.maximum(budget, 0.1 * free.pairs)))
