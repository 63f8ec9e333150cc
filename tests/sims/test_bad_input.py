"""What a user gets wrong, or asks in a size that nobody tried: one sentence with path, value and what is valid, never a traceback."""

import json
import math

import pytest
from typer.testing import CliRunner

from research.configfile import validate
from research.errors import ConfigError
from sims import AllToAll, Goodput, TrainingStep, simulate
from sims.__main__ import app
from sims.cluster import CLUSTERS, load_cluster
from sims.commands.question import question
from sims.faults import goodput
from sims.faults.goodput import expected_goodput, settle, simulate_goodput
from sims.training.door import training_step_spec

H800 = (CLUSTERS / "h800.yaml").read_text(encoding="utf-8")
SMALL = ["--nodes", "1", "--tokens", "16", "--hidden", "64"]


def refused(*arguments):
    """The one sentence of a command that must fail."""
    with pytest.raises(ConfigError) as caught:
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert len(caught.value.problems) == 1, caught.value.problems
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("gpus_per_node: {value: 8,", "gpus_per_node: {value: 8.5,", "gpus_per_node.value=8.5 must be a whole number"),
        ("sms: {value: 132,", "sms: {value: 131.5,", "sms.value=131.5 must be a whole number"),
        ("communication_sms: {value: 24,", "communication_sms: {value: 200,", "communication_sms.value=200 must be <= sms.value=132"),
        (
            "nic_bytes_per_second: {value: 47.5e9,",
            "nic_bytes_per_second: {value: true,",
            "nic_bytes_per_second.value = True: expected a number",
        ),
        ("way per GPU, basis: physical", "way per GPU, basis: logical", "nvlink_bytes_per_second.basis='logical': must be physical"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_with_path_and_value(old, new, said, tmp_path):
    assert old in H800
    path = tmp_path / "mine.yaml"
    path.write_text(H800.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert f"{path}: {said}" in str(caught.value)


@pytest.mark.parametrize("name", ["", "."])
def test_a_cluster_that_is_no_file_is_no_such_preset(name):
    with pytest.raises(ConfigError, match="no such preset or file; valid: a100"):
        load_cluster(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("devices: []", "devices = []: must be a list"),
        ("devices: 5", "devices = 5: must be a list"),
        ("devices: [[0, 0], [0, 'a']]", "devices.1 = [0, 'a']: must be [node, gpu]"),
        ("devices: [[0, 0], 1]", "devices.1 = 1: must be [node, gpu]"),
        (f"experts: {[0.5] * 160}", "experts.0 = 0.5: must be a whole number"),
        ("experts: [[0, 1]]", "experts.0 = [0, 1]: must be a whole number"),
    ],
)
def test_a_placement_file_names_its_first_mistake(text, said, tmp_path):
    path = tmp_path / "placed.yaml"
    path.write_text(text, encoding="utf-8")
    assert refused("all-to-all", "--placement", str(path)).startswith(f"{path}: {said}")


def test_an_empty_placement_is_a_mistake_in_python_too():
    with pytest.raises(ConfigError, match=r"placement = \[\]"):
        simulate(AllToAll(placement=[]))


@pytest.mark.parametrize(("experts", "chosen", "gpus"), [(60, 4, 4), (7, 3, 7), (1, 1, 1), (66, 6, 6), (9, 9, 3)])
def test_experts_that_eight_does_not_divide_need_no_further_word(experts, chosen, gpus):
    found = simulate(AllToAll(n_routed_experts=experts, num_experts_per_tok=chosen, gpus_per_node=gpus, tokens_per_device=8, hidden_size=64))
    assert found.distinct_routing_devices_per_token <= math.gcd(experts, 8)
    assert (found.nvlink_bytes > 0) == (gpus > 1)


def test_a_limit_on_devices_that_do_not_divide_the_experts_is_refused():
    with pytest.raises(ValueError, match="expert_devices=8 must divide n_routed_experts=60"):
        AllToAll(n_routed_experts=60, num_experts_per_tok=4, device_limit=2)
    assert AllToAll(n_routed_experts=60, num_experts_per_tok=4, device_limit=2, expert_devices=6).routing_devices == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", ""], "nodes = '': expected values"),
        (["--nodes", "1,,2"], "nodes = '1,,2': expected values"),
        (["--nodes", "true"], "nodes = 'true': expected values"),
        (["--nodes", "null"], "nodes = None: input should be a valid integer"),
        (["--nodes", "a"], "nodes = 'a': input should be a valid integer"),
        (["--sms", "12,x"], "sms = 'x': input should be a valid integer"),
        (["--nodes", "1,4", "--expert-parallel", "32"], "expert_parallel=32 must divide nodes=1"),
        (["--top-k", "200"], "num_experts_per_tok=200 must lie in 1..160"),
        (["--nodes", "1", "--set", "nodes=2"], "--set nodes: the option of that name varies it"),
    ],
)
def test_a_sweep_names_the_value_that_cannot_be(arguments, said):
    assert said in refused("sweep", *arguments)


def test_a_sweep_may_vary_what_its_defaults_would_not_allow(tmp_path):
    runner = CliRunner()
    at_four = runner.invoke(
        app, ["sweep", *SMALL[2:], "--nodes", "4", "--expert-parallel", "32", "--device-limit", "3", "--json"], catch_exceptions=False
    )
    assert [cell["expert_parallel"] for cell in json.loads(at_four.stdout)] == [32]
    few = runner.invoke(app, ["sweep", *SMALL, "--experts", "60", "--top-k", "4", "--json"], catch_exceptions=False)
    assert [cell["point"]["device_limit"] for cell in json.loads(few.stdout)] == [1, 2, 3, 4, None]
    assert f"--csv {tmp_path}: is a folder" in refused("sweep", "--csv", str(tmp_path))


def test_a_figure_of_other_axes_is_refused_before_any_work(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("simulated")

    monkeypatch.setattr("sims.commands.sweep.simulate", never)
    said = refused("sweep", *SMALL[:2], "--tokens", "64,96", "--sms", "12", "--figure", str(tmp_path / "m.png"))
    assert said.endswith("shows M x K x nodes; give one value of tokens_per_device")


def test_matrices_too_large_to_print_are_null_and_all_else_is_there(monkeypatch):
    question = AllToAll(nodes=2, gpus_per_node=4, tokens_per_device=8, hidden_size=64)
    whole = simulate(question).to_dict()
    monkeypatch.setattr("sims.result.PRINTED_GPUS", 7)
    assert simulate(question).to_dict() == whole | {"nvlink_matrix": None, "infiniband_matrix": None}
    assert whole["nvlink_matrix"] is not None


def test_true_is_no_number():
    with pytest.raises(ConfigError, match="all-to-all: nodes = True: expected a number"):
        question({}, None, None, ["nodes=true"])
    with pytest.raises(ConfigError, match=r"speed\.3 = True"):
        training_step_spec({}, ["speed.3=true"])
    with pytest.raises(ConfigError, match=r"model\.attention\.kv_lora_rank = True"):
        training_step_spec({}, ["model.attention.kv_lora_rank=true"])
    assert not validate(TrainingStep, {"gradient_overlap": False}, "step").gradient_overlap


@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_a_speed_must_be_finite(value):
    with pytest.raises(ConfigError, match=r"speed\.3 = (inf|nan): input should be a finite number"):
        training_step_spec({}, [f"speed.3={value}"])


def test_a_mistake_that_concerns_no_single_key_has_no_path_in_front():
    with pytest.raises(ConfigError, match=r"^all-to-all: nodes=0 must be >= 1$"):
        question({"nodes": 0}, None, None, None)


def test_a_run_that_never_ends_is_refused_and_intervals_that_never_end_are_left_out(monkeypatch):
    with pytest.raises(ConfigError, match=r"a failure every 0\.0036 s .* expects e\^\d+ failures"):
        simulate_goodput(Goodput(nodes=100, node_mtbf_hours=0.0001))
    monkeypatch.setattr(goodput, "MOST_FAILURES", 160)
    hours = Goodput(nodes=100, node_mtbf_hours=100, checkpoint_seconds=400, restart_seconds=60, runs=2, work_hours=20)
    found = simulate_goodput(hours)
    assert any("left out" in warning for warning in found.warnings)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="intervals = 90000 s"):
        simulate_goodput(Goodput(nodes=100, node_mtbf_hours=100, checkpoint_seconds=400, restart_seconds=60, intervals=(600.0, 90000.0)))
    setting = settle(hours)[0]
    for point in found.points:
        # Of the closed form: the time of a run over the time between failures.
        assert setting.work / expected_goodput(setting, point.interval_seconds) / setting.mtbf * hours.runs <= 160


@pytest.mark.parametrize("command", [[], ["faults"], ["clusters"], ["bytes"], ["faults", "goodput"], ["faults", "step"]])
def test_every_help_has_an_example(command):
    assert "Example: python -m sims" in " ".join(CliRunner().invoke(app, [*command, "--help"]).stdout.replace("│", "").split())


def test_unknown_keys_list_fields_only():
    said = refused("faults", "goodput", "--set", "zzzzzz=1")
    assert "__" not in said
    assert "node_mtbf_hours" in said
    names = said.partition("valid: ")[2].split(", ")
    assert len(names) == len(set(names))
