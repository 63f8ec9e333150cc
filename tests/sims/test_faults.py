"""Faults: closed forms of checkpoints, who waits for whom, and that no removed straggler slows anything."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from research import accounting
from research.configfile import validate
from research.errors import ConfigError
from research.presets import preset
from sims import load_cluster, simulate, synthetic_trace
from sims.__main__ import app
from sims.collective import collective_seconds
from sims.constants import load_constants
from sims.faults import Goodput, SlowLayers, Speeds, simulate_goodput, simulate_layers, slow_step, waits
from sims.faults.attribution import culprits
from sims.faults.goodput import daly, reliability, young
from sims.faults.layers import _trace, _work
from sims.training.door import training_step_spec

RUN = Goodput(nodes=100, node_mtbf_hours=500, checkpoint_seconds=60, restart_seconds=300, work_hours=200, runs=48)
TRACE = synthetic_trace("gaussian", tokens=512, n_routed_experts=160, num_experts_per_tok=6, expert_devices=8, device_limit=3)
LAYERS = SlowLayers(model="deepseek-v2-micro", nodes=2, gpus_per_node=4, tokens_per_device=256, draws=8)


@pytest.mark.parametrize(("mtbf", "checkpoint", "restart"), [(500, 60, 300), (2000, 20, 0), (100, 100, 600)])
def test_goodput_is_the_closed_form_within_the_noise(mtbf, checkpoint, restart):
    found = simulate_goodput(replace(RUN, node_mtbf_hours=mtbf, checkpoint_seconds=checkpoint, restart_seconds=restart, intervals=(600, 1800, 5400)))
    for point in found.points:
        # The last period needs no checkpoint: that of one in all of them.
        spare = checkpoint / (RUN.work_hours * 3600)
        assert abs(point.mean - point.closed_form) < 4 * point.standard_error + spare
        assert point.checkpointing + point.lost + point.restarting + point.waiting == pytest.approx(1 - point.mean, abs=0.01)


@pytest.mark.parametrize(("checkpoint", "mtbf"), [(60, 500), (10, 2000)])
def test_the_best_interval_is_dalys_within_the_noise(checkpoint, mtbf):
    found = simulate_goodput(replace(RUN, checkpoint_seconds=checkpoint, node_mtbf_hours=mtbf))
    low, high = found.best_range_seconds
    assert low / 2**0.5 <= found.daly_seconds <= high * 2**0.5
    means = {point.interval_seconds: point.mean for point in found.points}
    assert means[found.best_seconds] > max(means[min(means)], means[max(means)])
    assert found.daly_seconds == pytest.approx(found.young_seconds, rel=0.1)


def test_young_and_daly_by_hand():
    assert young(50, 10000) == 1000
    assert daly(50, 10000) == pytest.approx(1000 * (1 + 0.05 / 3 + 0.0025 / 9) - 50)
    assert daly(100, 40) == 40


def test_without_failures_only_checkpoints_cost():
    never = simulate_goodput(replace(RUN, node_mtbf_hours=1e12, intervals=(3600.0,))).points[0]
    assert never.failures == 0
    assert never.mean == pytest.approx(200 * 3600 / (200 * 3600 + 199 * 60), rel=1e-12)


def test_checkpoints_in_the_background_and_spares():
    plain, background = (simulate_goodput(replace(RUN, intervals=(1800.0,), stall_seconds=stall)).points[0] for stall in (None, 2.0))
    assert background.mean > plain.mean
    assert background.lost > plain.lost * 0.9
    assert background.closed_form is None
    few, many = (simulate_goodput(replace(RUN, intervals=(1800.0,), spare_nodes=spares)).points[0] for spares in (0, 50))
    assert few.waiting > 0.5
    assert many.waiting == 0
    assert many.mean == plain.mean


def test_a_checkpoint_is_weights_and_optimizer_over_the_nodes_bandwidth():
    found = simulate(Goodput(nodes=64, runs=2))
    assert found.checkpoint_bytes == 14 * accounting.total_parameters(preset("deepseek-v2"))
    assert found.checkpoint_seconds == found.checkpoint_bytes / 64 / reliability()["storage_bytes_per_second"].value
    assert found.mtbf_hours == pytest.approx(6335 / 64)


def test_healthy_layers_are_barriers_collectives_and_rooflines():
    spec = replace(LAYERS, layers=2)
    cluster = load_cluster("h800")
    constants = load_constants(cluster, 8)
    work = _work(spec, preset(spec.model), cluster, constants, _trace(spec, preset(spec.model), None))
    each = work.alone + work.experts.max(1)
    each = each + collective_seconds(work.dispatch, cluster, constants, notify=True) + collective_seconds(work.combine, cluster, constants)
    found = simulate_layers(spec)
    assert found.slowdown.p10 == found.slowdown.p90 == 1
    assert found.seconds.p50 == pytest.approx(np.quantile(2 * each, 0.5), rel=1e-12)
    end = found.timeline().columns()
    assert end["end_seconds"].max() == pytest.approx(2 * each[0])
    assert end["nvlink_bytes"].sum() == 2 * (work.dispatch.nvlink.sum() + work.combine.nvlink.sum())
    assert end["infiniband_bytes"].sum() == 2 * (work.dispatch.infiniband.sum() + work.combine.infiniband.sum())


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.integers(0, 7), st.floats(1.0, 3.0)),
    st.dictionaries(st.integers(0, 7), st.floats(0.1, 1.0)),
    st.dictionaries(st.integers(0, 7), st.floats(0.1, 1.0)),
)
def test_removing_a_straggler_never_slows(speed, nic, nvlink):
    spec = replace(LAYERS, tokens_per_device=64, draws=2, speed=speed, nic=nic, nvlink=nvlink)
    with_all = simulate_layers(spec, TRACE)
    for name in ("speed", "nic", "nvlink"):
        slow = dict(getattr(spec, name))
        if slow:
            slow.pop(min(slow))
            without = simulate_layers(replace(spec, **{name: slow}), TRACE)
            assert without.seconds.p50 <= with_all.seconds.p50 * (1 + 1e-12)
    assert with_all.slowdown.p10 >= 1 - 1e-12


def test_the_straggler_is_named_with_its_link():
    slow = simulate_layers(replace(LAYERS, speed={3: 2.0}))
    assert culprits(slow.waits)[0][:2] == (3, "compute")
    others = {wait.waiter for wait in slow.waits if wait.culprit == 3 and wait.link == "compute"}
    assert others == {0, 1, 2, 4, 5, 6, 7}
    nic = simulate_layers(replace(LAYERS, tokens_per_device=4096, nic={6: 0.2}))
    assert culprits(nic.waits)[0][0] == 6
    assert culprits(nic.waits)[0][1].startswith("nic")
    nvlink = simulate_layers(replace(LAYERS, tokens_per_device=4096, nvlink={1: 0.1}))
    assert culprits(nvlink.waits)[0][0] == 1
    assert culprits(nvlink.waits)[0][1].startswith("nvlink")
    assert nic.slowdown.p50 > 1
    assert nvlink.slowdown.p50 > 1


def test_waits_are_the_gaps_of_the_timeline():
    """What a GPU neither computes nor sends nor spends on latency, it waits, and the table has it all."""
    found = simulate_layers(replace(LAYERS, speed={3: 1.5}, layers=3))
    assert sum(wait.seconds for wait in waits(found.timeline())) == pytest.approx(found.waiting_seconds * found.gpus)
    columns, last = found.timeline().columns(), found.timeline().columns()["end_seconds"].max()
    for gpu in range(found.gpus):
        own = columns["gpu"] == gpu
        busy = (columns["end_seconds"] - columns["start_seconds"])[own].sum()
        assert busy + columns["wait_seconds"][own].sum() == pytest.approx(last)


def test_a_training_step_waits_for_its_slow_gpu():
    spec = training_step_spec({"model": "deepseek-v2", "nodes": 16, "batch_size": 64, "draws": 4})
    slow = slow_step(replace(spec, speed={3: 1.5}))
    assert slow.slowdown.p10 > 1.05
    assert {wait.culprit for wait in slow.groups[:3]} == {3}
    assert slow.groups[0].seconds > 0
    assert slow.pipeline
    assert slow.seconds.p50 >= slow_step(replace(spec, speed={3: 1.2})).seconds.p50 >= slow_step(spec).seconds.p50
    assert slow_step(spec, Speeds(kind="stragglers", count=1, factor=1.5)).speed.popitem()[1] == 1.5


def test_distributions_of_speed():
    assert (Speeds().factors(8, 0) == 1).all()
    normal = Speeds(kind="normal", spread=0.05).factors(4000, 0)
    assert (normal.mean(), normal.std()) == pytest.approx((1, 0.05), rel=0.05)
    few = Speeds(kind="stragglers", count=3, factor=1.5).factors(64, 1)
    assert sorted(few)[-4:] == [1, 1.5, 1.5, 1.5]
    drawn = simulate_layers(replace(LAYERS, speeds=Speeds(kind="stragglers", count=2, factor=1.5), speed={0: 1.0}))
    assert sum(each > 1 for each in drawn.speed) in (1, 2)
    assert drawn.speed[0] == 1


def test_the_same_faults_have_the_same_answer_to_the_byte():
    for spec in (replace(RUN, runs=4), replace(LAYERS, speeds=Speeds(kind="normal"))):
        first, second = (json.dumps(simulate(spec).to_dict()) for _ in range(2))
        assert first == second
        assert first != json.dumps(simulate(replace(spec, seed=1)).to_dict())


@pytest.mark.parametrize(
    ("cls", "mapping", "said"),
    [
        (Goodput, {"node_mtbf_hours": 0}, "node_mtbf_hours=0.0 must be > 0"),
        (Goodput, {"intervals": [0.0]}, "intervals=.* must be > 0"),
        (Goodput, {"spare_node": 1}, "spare_node = 1: unknown key; did you mean 'spare_nodes'"),
        (SlowLayers, {"speed": {8: 1.2}}, "speed.8=1.2: there is no such GPU; valid: 0 to 7"),
        (SlowLayers, {"nic": {1: 1.5}}, "nic.1=1.5: must lie in 0..1"),
        (SlowLayers, {"speeds": {"kind": "gauss"}}, "speeds.kind = 'gauss'"),
    ],
)
def test_what_cannot_be_asked_is_said_at_the_door(cls, mapping, said):
    with pytest.raises(ConfigError, match=said):
        validate(cls, mapping, "faults")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (replace(LAYERS, model="deepseek-67b"), "is dense and has no all-to-all"),
        (replace(LAYERS, nodes=3), "12 GPUs must divide the model's 160 experts"),
        (replace(RUN, stall_seconds=90), "stall_seconds = 90: must be <= the 60 s"),
        (replace(RUN, stall_seconds=1, intervals=(10.0,)), "shorter than the 60 s of a checkpoint"),
        (Goodput(model="nothing"), "model = 'nothing': no such preset or file"),
    ],
)
def test_what_does_not_fit_is_said_with_its_path(spec, said):
    with pytest.raises(ConfigError, match=said):
        simulate(spec)


def test_the_commands():
    runner = CliRunner()
    found = runner.invoke(app, ["faults", "goodput", "--nodes", "64", "--set", "runs=4", "--interval", "1800", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["points"][0]["interval_seconds"] == 1800
    options = ["--model", "deepseek-v2-micro", "--tokens-per-device", "64", "--set", "draws=2"]
    answer = json.loads(runner.invoke(app, ["faults", "waits", *options, "--slow", "3=1.5", "--json"]).output)
    assert answer["culprits"][0]["gpu"] == 3
    assert {"waiter", "culprit", "link", "seconds"} <= set(answer["waits"][0])
    shown = runner.invoke(app, ["faults", "waits", *options, "--set", "speeds.kind=normal"])
    assert shown.exit_code == 0
    assert "Culprits" in shown.output
    step = runner.invoke(app, ["faults", "step", "--slow", "3=1.5", "--set", "batch_size=64", "--set", "draws=2"])
    assert step.exit_code == 0
    assert "slowdown" in step.output
    for command in ("goodput", "waits", "step"):
        assert "Example:" in runner.invoke(app, ["faults", command, "--help"]).output
    wrong = runner.invoke(app, ["faults", "waits", "--slow", "three=1"])
    assert isinstance(wrong.exception, ConfigError)
    assert "--slow three=1" in str(wrong.exception)
