"""The all-to-all as its commands say it: mistakes, trace and cluster files, sweeps."""

import csv
import itertools
import json

import pytest
import yaml
from typer.testing import CliRunner

from research.errors import ConfigError
from sims import AllToAll, load_cluster, simulate, synthetic_trace
from sims.__main__ import app
from sims.cluster import CLUSTERS
from sims.commands.sweep import values


def small(**changes):
    base = {"nodes": 2, "gpus_per_node": 4, "tokens_per_device": 96, "hidden_size": 200, "n_routed_experts": 32, "num_experts_per_tok": 4}
    return AllToAll(**{**base, **changes})


BAD_QUESTIONS = [
    (["--placement", "middle"], "placement = 'middle'"),
    (["--set", "placement=[[0,0],[0,1]]", "--set", "expert_parallel=4"], "placement = 2 entries"),
    (["--set", "placement=[[0,0],[0,9],[0,2],[0,3]]", "--set", "expert_parallel=4"], "placement.1 = [0, 9]"),
    (["--set", "placement=[[0,0],[0,0],[0,2],[0,3]]", "--set", "expert_parallel=4"], "stands there twice"),
    (["--set", "expert_placement=[0,1,2]"], "does not cover the 160 experts"),
    (["--set", "num_experts_per_token=3"], "did you mean 'num_experts_per_tok'"),
    (["--model", "deepseek-v3"], "did you mean 'deepseek-v2'"),
    (["--model", "deepseek-67b"], "no routed experts"),
    (["--routing", "rndom"], "routing='rndom'"),
    (["--nodes", "4", "--node-limit", "1", "--top-k", "64"], "node_limit = 1"),
    (["--nodes", "4", "--node-limit", "2", "--placement", "spread"], "node_limit = 2"),
    (["--ep", "3"], "expert_parallel=3 must divide"),
    (["--sms", "500"], "sms = 500"),
    (["--tokens", "0"], "tokens_per_device=0"),
    (["--gpus-per-node", "16"], "gpus_per_node = 16"),
    (["--dispatch-bits", "7"], "dispatch_bits=7"),
    (["--trace", "/nowhere/routing.npz"], "/nowhere/routing.npz"),
]


@pytest.mark.parametrize(("words", "said"), BAD_QUESTIONS)
def test_a_mistake_is_one_sentence_with_the_path_and_the_value(words, said):
    result = CliRunner().invoke(app, ["all-to-all", *words])
    assert said in str(result.exception)
    assert not isinstance(result.exception, KeyError | TypeError)


def test_a_trace_of_another_shape_than_the_model_is_refused(tmp_path):
    trace = synthetic_trace("random", tokens=64, n_routed_experts=32, num_experts_per_tok=4, expert_devices=8, device_limit=3)
    trace.save(tmp_path / "routing.npz")
    result = CliRunner().invoke(app, ["all-to-all", "--model", "deepseek-v2", "--trace", str(tmp_path / "routing.npz")])
    assert "routing.npz: n_routed_experts = 32: the model deepseek-v2 has 160" in str(result.exception)
    warned = simulate(AllToAll(), trace).warnings
    assert "n_routed_experts = 160: the trace's 32 hold" in warned
    with pytest.raises(ConfigError, match="step = 5: the trace has 1 snapshots"):
        simulate(small(step=5), trace)


def test_units_of_a_cluster_file_are_converted_or_refused(tmp_path):
    text = yaml.safe_load((CLUSTERS / "h800.yaml").read_text())
    path = tmp_path / "mine.yaml"
    text["nic_bytes_per_second"] |= {"value": 400, "unit": "Gb/s line rate"}
    text["nvlink_latency_seconds"] |= {"value": 7.4, "unit": "us"}
    path.write_text(yaml.safe_dump(text))
    cluster = load_cluster(path)
    assert cluster.nic_bytes_per_second.value == 50e9
    assert cluster.nic_bytes_per_second.unit == "bytes/s line rate"
    assert cluster.nvlink_latency_seconds.value == pytest.approx(7.4e-6)
    for change, said in (({"unit": "GB"}, "nic_bytes_per_second.unit = 'GB': does not measure bytes_per_second"), ({"value": -3}, "value=-3"),
                         ({"value": "fast"}, "nic_bytes_per_second.value"), ({"value": float("inf")}, "finite"), ({"unit": ""}, "unit and source")):  # fmt: skip
        path.write_text(yaml.safe_dump(text | {"nic_bytes_per_second": {"value": 50, "basis": "physical", "source": "s", "unit": "GB/s"} | change}))
        with pytest.raises(ConfigError) as caught:
            load_cluster(path)
        assert said in str(caught.value)
        assert str(path) in str(caught.value)
    without = {k: v for k, v in text["nic_bytes_per_second"].items() if k != "unit"}
    path.write_text(yaml.safe_dump(text | {"nic_bytes_per_second": without}))
    with pytest.raises(ConfigError, match=r"nic_bytes_per_second\.unit"):
        load_cluster(path)


def test_the_command_takes_a_model_a_placement_file_and_every_word_of_its_help(tmp_path):
    (tmp_path / "placement.yaml").write_text(yaml.safe_dump({"devices": [[d, 0] for d in range(8)], "experts": [e % 8 for e in range(160)]}))
    words = ["all-to-all", "--nodes", "8", "--model", "deepseek-v2", "--placement", str(tmp_path / "placement.yaml"), "--tokens", "256", "--json"]
    found = json.loads(CliRunner().invoke(app, words).stdout)
    assert (found["expert_parallel"], found["device_limit"], found["num_experts_per_tok"], found["nvlink_bytes"]) == (8, 3, 6, 0)
    # Experts dealt round-robin undo what the limit saves: it counts the model's devices, not GPUs.
    assert found["distinct_devices_per_token"] > 4
    assert found["distinct_routing_devices_per_token"] <= 3
    assert set(found["formulas"]) == {"k_copies", "uniform_single_copy", "single_nic_share", "busbw", "every_node"}
    assert all(source["source"] for source in found["constants"].values())
    same = [*words[:-1], "--set", "model.moe.device_limit=2", "--set", "routing.seed=5", "--json"]
    assert json.loads(CliRunner().invoke(app, same).stdout)["device_limit"] == 2
    table = CliRunner().invoke(app, [*words[:-1], "--formula"]).stdout
    assert "busbw" in table
    assert "backward of combine" in table


def test_a_sweep_has_every_point_in_order_and_the_baselines_in_its_table(tmp_path):
    words = [
        "sweep",
        "--nodes",
        "1,2",
        "--top-k",
        "4,6",
        "--device-limit",
        "1-2,null",
        "--tokens",
        "64",
        "--csv",
        str(tmp_path / "points.csv"),
        "--json",
    ]
    found = json.loads(CliRunner().invoke(app, words).stdout)
    points = [(f["point"]["nodes"], f["point"]["num_experts_per_tok"], f["point"]["device_limit"]) for f in found]
    assert points == list(itertools.product((1, 2), (4, 6), (1, 2, None)))
    rows = list(csv.DictReader((tmp_path / "points.csv").open()))
    assert [float(row["dispatch_seconds_p50"]) for row in rows] == [f["dispatch_seconds"]["p50"] for f in found]
    assert float(rows[0]["busbw_combine_seconds"]) > 0
    by_limit = [f["dispatch_seconds"]["p50"] for f in found if (f["nodes"], f["num_experts_per_tok"]) == (2, 6)]
    assert by_limit == sorted(by_limit)
    left_out = CliRunner().invoke(app, ["sweep", "--experts", "16", "--tokens", "64", "--nodes", "1"]).stdout
    assert "2 points left out" in left_out
    for wrong, said in ((["--nodes", "a-b"], "nodes"), (["--nodes", "0"], "nodes=0"), (["--csv", "/nowhere/x.csv"], "/nowhere")):
        assert said in str(CliRunner().invoke(app, ["sweep", "--tokens", "64", *wrong]).exception)


def test_values_of_a_sweep():
    assert values("1-4,null,8", "x") == [1, 2, 3, 4, None, 8]
    assert values("512-2048:512", "x") == [512, 1024, 1536, 2048]
    assert values("random,hot-device", "routing") == ["random", "hot-device"]
    with pytest.raises(ConfigError, match=r"x = '1\.5'"):
        values("1.5", "x")
