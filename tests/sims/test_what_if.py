"""Degraded links and constants held at a value, in every question: by hand where a hand can, and alike in closed form and in events."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from research.errors import ConfigError
from sims import AllToAll, simulate
from sims.__main__ import app
from sims.all_to_all import plan
from sims.calibrate import FITTED, calibrate, cases, inputs
from sims.collective import gpu_seconds, latency_seconds, streams
from sims.constants import load_constants
from sims.explain.all_to_all import explain_all_to_all
from sims.explain.training import explain_training_step
from sims.quantiles import Quantiles
from sims.training.door import training_step_spec
from sims.validation.calibration import comparisons

QUESTION = AllToAll(nodes=2, gpus_per_node=4, tokens_per_device=256, hidden_size=512, seed=3)


def test_a_degraded_link_costs_what_its_gpu_has_to_move_over_it():
    """Over the one GPU's own streams by hand: its NIC at a tenth binds, NVLink beside it as before."""
    slow = replace(QUESTION, nic={5: 0.1})
    planned, best = plan(slow), load_constants(plan(slow).cluster, 1)
    healthy = streams(planned.dispatch, planned.cluster, best)
    nic = max(healthy["nic out"][0, 5], healthy["nic in"][0, 5]) * 10
    nvlink = max(healthy["nvlink out"][0, 5], healthy["nvlink in"][0, 5])
    power = best["interference_exponent"][0]
    by_hand = latency_seconds(planned.dispatch, planned.cluster, best)[0] + (nic**power + nvlink**power) ** (1 / power)
    found = simulate(replace(slow, draws=1))
    assert found.dispatch_seconds.p50 == pytest.approx(by_hand, rel=1e-12)
    assert (found.dispatch.straggler, found.dispatch.binds[:3]) == (5, "nic")
    assert found.dispatch.waiting_seconds > simulate(QUESTION).dispatch.waiting_seconds


def test_whole_links_change_nothing_and_all_at_half_double_what_is_no_latency():
    healthy = simulate(QUESTION).to_dict()
    assert simulate(replace(QUESTION, nic={3: 1.0}, nvlink={0: 1.0})).to_dict() == healthy
    half = dict.fromkeys(range(8), 0.5)
    slow = simulate(replace(QUESTION, nic=half, nvlink=half))
    planned = plan(QUESTION)
    constants = planned.load_constants()
    links = gpu_seconds(streams(planned.dispatch, planned.cluster, constants), constants).max(1)
    latency = latency_seconds(planned.dispatch, planned.cluster, constants)
    assert slow.dispatch_seconds.p50 == pytest.approx(np.quantile(latency + 2 * links, 0.5), rel=1e-12)
    assert slow.nvlink_bytes == healthy["nvlink_bytes"]


def test_events_and_the_explanation_know_the_same_links():
    slow = replace(QUESTION, nic={5: 0.2}, nvlink={1: 0.5}, draws=1)
    found = simulate(slow)
    ends = max(phase.end_seconds for phase in found.timeline().phases if phase.name == "combine")
    # A stream alone is over before the p-norm of both lets its GPU go on.
    assert ends <= found.seconds
    assert ends > found.seconds - 0.2 * found.combine_seconds.p50
    assert {phase.waits_for for phase in found.timeline().phases if phase.wait_seconds > 0} == {5}
    assert explain_all_to_all(slow).answer.p50 == pytest.approx(found.seconds, rel=1e-12)


def test_a_link_of_a_gpu_that_is_not_in_the_group_is_refused():
    with pytest.raises(ConfigError, match=r"nic\.4=0\.5: there is no such GPU; valid: 0 to 3"):
        simulate(replace(QUESTION, expert_parallel=4, nic={4: 0.5}))
    with pytest.raises(ConfigError, match=r"nvlink\.1=0\.0: must lie in 0\.\.1, without 0"):
        simulate(replace(QUESTION, nvlink={1: 0.0}))


def test_the_command_takes_links_as_options_and_by_set():
    arguments = ["all-to-all", "--nodes", "2", "--tokens", "64", "--hidden", "64", "--json"]
    by_option, by_set = (
        json.loads(CliRunner().invoke(app, [*arguments, *extra], catch_exceptions=False).stdout)
        for extra in (["--nic", "9=0.25", "--nvlink", "3=0.5"], ["--set", "nic.9=0.25", "--set", "nvlink.3=0.5"])
    )
    assert by_option == by_set
    with pytest.raises(ConfigError, match=r"--nic 9: expected GPU=factor, such as 3=0\.5"):
        CliRunner().invoke(app, [*arguments, "--nic", "9"], catch_exceptions=False)


def test_a_constant_held_at_a_value_has_it_in_every_draw():
    cluster = plan(QUESTION).cluster
    held = load_constants(cluster, 16, {"nic_efficiency": 0.5})
    assert (held["nic_efficiency"] == 0.5).all()
    assert (held["nvlink_efficiency"] == load_constants(cluster, 16)["nvlink_efficiency"]).all()
    assert held.to_dict()["nic_efficiency"]["source"] == "given in the question"
    for name, value, said in (("nic_eficiency", 1.0, "did you mean 'nic_efficiency'"), ("nic_efficiency", -1.0, "must be > 0")):
        with pytest.raises(ConfigError, match=rf"constants\.{name} = .*{said}"):
            load_constants(cluster, 4, {name: value})


def test_the_explanation_of_a_step_has_the_steps_own_answer():
    """Where nobody says the placement, both pool the draws of both."""
    spec = training_step_spec({"model": "deepseek-v2-lite", "nodes": 16, "batch_size": 256}, ["draws=8", "expert_parallel=8"])
    result = simulate(spec)
    assert len(result.by_placement) == 2
    found = explain_training_step(spec)
    assert found.answer == Quantiles.of(result.seconds)
    assert found.bottleneck.startswith("Of the two placements")
    assert sum(found.parts.values()) == pytest.approx(found.base, rel=1e-9)
    assert not any(sentence.startswith("placement = packed") for sentence in found.switches)


STEP = {"model": "deepseek-v2-lite", "nodes": 2, "gpus_per_node": 4, "batch_size": 16}
SPLIT = ["expert_parallel=2", "pipeline_parallel=2", "draws=4", "gradient_overlap=false", "model.num_hidden_layers=4"]


def test_a_step_with_whole_links_is_the_healthy_step_and_a_worse_link_never_helps():
    healthy = simulate(training_step_spec({**STEP, "placement": "spread"}, SPLIT))
    whole = simulate(training_step_spec({**STEP, "placement": "spread"}, [*SPLIT, "nic.0=1.0", "nvlink.3=1"]))
    assert (whole.seconds == healthy.seconds).all()
    before = healthy.seconds
    for left in (0.5, 0.2, 0.05):
        slow = simulate(training_step_spec({**STEP, "placement": "spread"}, [*SPLIT, f"nic.1={left}"]))
        assert (slow.seconds > before).all()
        assert sum(slow.breakdown.values()) == pytest.approx(slow.seconds, rel=1e-9)
        before = slow.seconds
        first = slow.waits[0]
        assert (first.culprit, first.link[:3]) == (1, "nic")
        assert first.seconds > 0


def test_a_link_that_the_step_does_not_use_costs_nothing():
    """Packed groups talk over NVLink; with one stage and one group in all, no NIC is used."""
    sizes = {**STEP, "nodes": 1, "placement": "packed"}
    alone = ["expert_parallel=4", "pipeline_parallel=1", "draws=2", "model.num_hidden_layers=3"]
    healthy, nic, nvlink = (simulate(training_step_spec(sizes, [*alone, *more])).seconds for more in ([], ["nic.1=0.01"], ["nvlink.1=0.2"]))
    assert (nic == healthy).all()
    assert (nvlink > healthy).all()


def test_a_step_of_degraded_links_is_alike_in_closed_form_and_in_events():
    spec = training_step_spec({**STEP, "placement": "spread", "tier": "event"}, [*SPLIT, "nic.1=0.1", "nvlink.6=0.3", "speed.2=1.2"])
    found = simulate(spec)
    assert found.event_seconds == pytest.approx(float(found.seconds[0]), rel=1e-9)


def test_gradients_and_sends_go_at_the_pace_of_the_worst_link():
    """A fifth of a NIC: the send between the two stages that the GPU is an end of, by hand; and the ring over two nodes."""
    spec = training_step_spec({**STEP, "placement": "packed"}, [*SPLIT, "nic.1=0.2"])
    slow, healthy = simulate(spec), simulate(replace(spec, nic={}))
    link = healthy.cluster.nic_bytes_per_second.value * healthy.constants["nic_efficiency"]
    for unit in slow.step.units:
        for (_, _), seconds in unit.sends.items():
            moved = spec.tokens * spec.model.hidden_size * 2
            np.testing.assert_allclose(seconds, healthy.cluster.network_latency_seconds.value + moved / (0.2 * link), rtol=1e-12)
    touched = [unit.index for unit in slow.step.units if unit.sends]
    assert len(touched) == 1
    across = replace(spec, placement="spread")
    assert (simulate(across).breakdown["gradients"] > simulate(replace(across, nic={})).breakdown["gradients"]).all()


def test_tensor_parallel_groups_share_a_degraded_nvlink():
    spec = training_step_spec({**STEP, "model": "deepseek-67b", "nodes": 1, "batch_size": 4, "tensor_parallel": 4}, ["draws=2", "nvlink.2=0.5"])
    assert (simulate(spec).seconds > simulate(replace(spec, nvlink={})).seconds).all()


def test_faults_step_takes_links_and_says_who_is_waited_for():
    arguments = ["faults", "step", "--model", "deepseek-v2-lite", "--nodes", "2", "--gpus-per-node", "4", "--batch-size", "16", "--nic", "1=0.1"]
    sets = [part for each in [*SPLIT, "placement=spread"] for part in ("--set", each)]
    found = json.loads(CliRunner().invoke(app, [*arguments, *sets, "--json"], catch_exceptions=False).stdout)
    assert found["slowdown"]["p50"] > 1.5
    assert (found["groups"][0]["culprit"], found["groups"][0]["link"][:3]) == (1, "nic")
    with pytest.raises(ConfigError, match=r"nic\.9=0\.1: there is no such GPU; valid: 0 to 7"):
        CliRunner().invoke(app, [*arguments[:-1], "9=0.1", *sets], catch_exceptions=False)


def test_calibrate_takes_other_inputs_and_never_writes_them_over_the_committed_ones(monkeypatch):
    def refused(*arguments):
        with pytest.raises(ConfigError) as caught:
            CliRunner().invoke(app, ["calibrate", *arguments], catch_exceptions=False)
        return str(caught.value)

    assert "say with --out FILE" in refused("--set", "draws=8")
    dry = ("--dry-run", "--set")
    assert "did you mean 'nic_efficiency'" in refused(*dry, "priors.nic_eff.best=1")
    assert "priors.nic_efficiency: low=0.92, best=5.0" in refused(*dry, "priors.nic_efficiency.best=5")
    assert "names several values" in refused(*dry, "points.h800-1-node-dispatch=1")
    assert "draws = 1: must be a whole number" in refused(*dry, "draws=1")
    assert "workload" in refused(*dry, "foo=1")
    changed = inputs(["priors.nic_efficiency.best=0.95", "points.h800-1-node-dispatch.value=100e9", "draws=4"])
    first = cases()[0]
    assert changed.cases[0].seconds == pytest.approx(first.seconds * first.point.value / 100e9)
    assert (changed.priors["nic_efficiency"].best, changed.draws) == (0.95, 4)
    monkeypatch.setattr("sims.calibrate.ITERATIONS", 3)
    slower = calibrate(("points.h800-1-node-dispatch.value=100e9", "points.h800-1-node-combine.value=100e9", "draws=4"))
    assert slower["constants"]["nvlink_efficiency"]["best"] < 0.95 < json.loads(FITTED.read_text())["constants"]["nvlink_efficiency"]["best"]


def test_validate_holds_constants_in_a_folder_of_its_own(tmp_path):
    for arguments, said in (
        (["--set", "constants.nic_efficiency=0.9"], "is not the committed page"),
        (["--set", "constants.nic_efficiency=0.9", "--out", str(tmp_path), "--check"], "is not the committed page"),
        (["--set", "nodes=2", "--out", str(tmp_path)], "expected constants.NAME=value"),
        (["--set", "constants.foo=2", "--out", str(tmp_path)], "no such constant"),
    ):
        with pytest.raises(ConfigError, match=said):
            CliRunner().invoke(app, ["validate", *arguments], catch_exceptions=False)
    held = {row.name: row.ours.p50 for row in comparisons((("nic_efficiency", 0.5),))}
    drawn = {row.name: row.ours.p50 for row in comparisons()}
    assert held["h800-1-node-dispatch"] == drawn["h800-1-node-dispatch"]
    assert held["h800-4-nodes-dispatch"] > 1.5 * drawn["h800-4-nodes-dispatch"]


@pytest.mark.parametrize("command", ["all-to-all", "training-step", "serving"])
def test_every_question_takes_constants(command):
    sizes = {
        "all-to-all": ["--nodes", "2", "--tokens", "64"],
        "training-step": ["--model", "deepseek-v2-nano", "--nodes", "1", "--batch-size", "8", "--set", "draws=2"],
        "serving": ["--model", "deepseek-v2-lite", "--requests", "4", "--set", "draws=2"],
    }
    arguments = [command, *sizes[command], "--json", "--set", "constants.unexplained=2"]
    found = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert found["constants"]["unexplained"]["p10"] == found["constants"]["unexplained"]["p90"] == 2
