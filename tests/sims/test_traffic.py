"""Bytes against a literal loop over tokens, and the laws that no change may break."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from research.errors import ConfigError
from sims import AllToAll, load_cluster, reroute, simulate, synthetic_trace
from sims.__main__ import app
from sims.cluster import cluster_names, figures
from sims.collective import collective_seconds, latency_seconds
from sims.constants import load_constants
from sims.events import play, step
from sims.placement import Placement
from sims.traffic import dispatch, needed_devices, payload_bytes


def literal(needed, source, per_node, size):
    """One token at a time."""
    gpus = needed.shape[1]
    nvlink, infiniband = np.zeros((gpus, gpus), np.int64), np.zeros((gpus, gpus), np.int64)
    for token in range(len(needed)):
        s = source[token]
        for node in range(gpus // per_node):
            wanted = [d for d in range(node * per_node, (node + 1) * per_node) if needed[token, d]]
            entry = s
            if wanted and node != s // per_node:
                entry = node * per_node + s % per_node
                infiniband[s, entry] += size
            for d in wanted:
                if d != entry:
                    nvlink[entry, d] += size
    return nvlink, infiniband


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 500), st.integers(0, 10**6))
def test_byte_matrices_equal_the_loop(nodes, per_node, tokens, size, seed):
    random = np.random.default_rng(seed)
    needed, source = random.random((tokens, nodes * per_node)) < 0.4, random.integers(0, nodes * per_node, tokens)
    traffic = dispatch(needed, source, per_node, size)
    nvlink, infiniband = literal(needed, source, per_node, size)
    np.testing.assert_array_equal(traffic.nvlink, nvlink)
    np.testing.assert_array_equal(traffic.infiniband, infiniband)
    assert traffic.logical.sum() == needed.sum() * size
    back = traffic.reverse(2 * size, of=size)
    np.testing.assert_array_equal(back.nvlink, 2 * nvlink.T)


def test_payloads():
    assert payload_bytes(7168, 8) == 7168 + 4 * 56
    assert payload_bytes(5120, 16) == 10240


def test_deepseek_v2_touches_as_many_devices_as_its_routing_says():
    """Random logits, 160 experts on 8 devices, K = 6; unrestricted is the hypergeometric 8 (1 - C(140, 6) / C(160, 6))."""
    found = [simulate(AllToAll(tokens_per_device=1024, device_limit=m)).distinct_devices_per_token for m in (1, 2, 3, 4, 5, 6, 8)]
    np.testing.assert_allclose(found, [1, 2, 2.995, 3.89, 4.38, 4.46, 4.46], atol=0.03)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["random", "gaussian", "power-law", "hot-device"]), st.integers(0, 10**6))
def test_devices_never_decrease_with_the_limit_and_at_k_nothing_is_restricted(family, seed):
    trace = synthetic_trace(family, tokens=64, n_routed_experts=32, num_experts_per_tok=4, expert_devices=8, device_limit=None, seed=seed)
    reach = [needed_devices(reroute(trace, m).expert_ids[0, 0], 32, 8).sum(1) for m in range(1, 9)]
    assert all((a <= b).all() for a, b in itertools.pairwise(reach))
    for m in range(4, 9):
        np.testing.assert_array_equal(np.sort(reroute(trace, m).expert_ids), np.sort(trace.expert_ids))


def small(**changes):
    return AllToAll(nodes=2, gpus_per_node=4, tokens_per_device=256, hidden_size=512, n_routed_experts=32, num_experts_per_tok=4, **changes)


def test_one_device_has_no_all_to_all_and_one_node_no_infiniband():
    alone = simulate(replace(small(), nodes=1, gpus_per_node=1))
    assert alone.seconds == 0
    node = simulate(replace(small(), nodes=1, gpus_per_node=8))
    assert node.dispatch.infiniband_bytes == 0 < node.dispatch.nvlink_bytes


def test_both_tiers_of_time_agree_and_doubled_bandwidth_halves_all_but_latency():
    cluster = load_cluster("h800")
    constants = load_constants(cluster)
    random = np.random.default_rng(0)
    traffic = dispatch(random.random((500, 8)) < 0.4, random.integers(0, 8, 500), 4, 1000)
    index = np.arange(8)
    played = play([step("dispatch", traffic, cluster, constants, sms=24, notify=True)], Placement(index // 4, index % 4, index), gpus_per_node=4)
    assert played.seconds == pytest.approx(collective_seconds(traffic, cluster, constants, sms=24, notify=True)[0], rel=1e-9)
    doubled = replace(
        cluster,
        **{
            n: replace(getattr(cluster, n), value=2 * getattr(cluster, n).value)
            for n in ("nvlink_bytes_per_second", "nic_bytes_per_second", "sm_bytes_per_second")
        },
    )
    latency = latency_seconds(traffic, cluster, constants)
    once, twice = (collective_seconds(traffic, c, constants, sms=24) for c in (cluster, doubled))
    np.testing.assert_allclose(twice - latency, (once - latency) / 2, rtol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"nodes": 1, "gpus_per_node": 8}, {"routing": "gaussian"}, {"dedup": "device"}])
def test_the_timeline_ends_when_the_closed_form_says_and_holds_every_byte(changes):
    result = simulate(replace(small(), draws=1, **changes))
    phases = result.timeline().phases
    assert max(p.end_seconds for p in phases) == pytest.approx(result.seconds, rel=1e-2)
    assert sum(p.nvlink_bytes for p in phases) == result.nvlink_bytes
    assert sum(p.infiniband_bytes for p in phases) == result.infiniband_bytes
    assert result.timeline().phases is not phases  # Played anew, never kept.
    waits = [p for p in phases if p.waits_for >= 0]
    assert waits
    assert {p.waits_for for p in waits} == {result.dispatch.straggler}


def test_a_hot_device_is_the_straggler():
    trace = synthetic_trace("hot-device", tokens=2048, n_routed_experts=32, num_experts_per_tok=4, expert_devices=8, device_limit=3, seed=1)
    result = simulate(replace(small(), nodes=1, gpus_per_node=8), trace)
    assert result.dispatch.straggler == 0
    assert result.dispatch.binds == "nvlink in"
    assert result.dispatch.waiting_seconds > 0


def test_same_seed_same_answer():
    assert simulate(small()).to_dict() == simulate(small()).to_dict()
    assert simulate(small(seed=1)).to_dict() != simulate(small()).to_dict()


@pytest.mark.parametrize("name", cluster_names())
def test_every_figure_of_a_preset_has_a_source(name):
    assert all(len(figure.source) > 10 and figure.unit for figure in figures(load_cluster(name)).values())


def test_a_cluster_file_without_a_unit_or_with_a_negative_bandwidth_is_refused(tmp_path):
    text = (load_cluster.__globals__["CLUSTERS"] / "h800.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("value: 47.5e9, unit: bytes/s one way per GPU", "value: -1"))
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert "nic_bytes_per_second" in str(caught.value)
    path.write_text(text.replace("47.5e9", "-1"))
    with pytest.raises(ConfigError, match=r"nic_bytes_per_second.*value=-1.0 must be > 0"):
        load_cluster(path)


def test_a_trace_is_rerouted_under_the_limit_asked_for_and_nothing_else_of_it_is_set(tmp_path):
    trace = synthetic_trace("random", tokens=256, n_routed_experts=32, num_experts_per_tok=4, expert_devices=8, device_limit=3)
    trace.save(tmp_path / "routing.npz")
    base = ["all-to-all", "--nodes", "2", "--gpus-per-node", "4", "--trace", str(tmp_path / "routing.npz"), "--json"]
    answers = [
        json.loads(CliRunner().invoke(app, [*base, *more]).stdout) for more in ([], ["--set", "device_limit=2"], ["--set", "device_limit=null"])
    ]
    assert [a["device_limit"] for a in answers] == [3, 2, None]
    assert answers[1]["seconds"] < answers[0]["seconds"] < answers[2]["seconds"]
    assert set(answers[0]["dispatch_seconds"]) == {"p10", "p50", "p90"}
    for wrong, said in (("device_limit=300", "1..8"), ("num_experts_per_tok=3", "comes from the trace"), ("seed=1", "comes from the trace")):
        result = CliRunner().invoke(app, [*base, "--set", wrong])
        assert said in str(result.exception), wrong


@pytest.mark.parametrize("wrong", ["device_limit=300", "device_limit=0", "num_experts_per_tok=199", "expert_devices=7"])
def test_impossible_routings_are_refused(wrong):
    result = CliRunner().invoke(app, ["all-to-all", "--set", wrong])
    assert isinstance(result.exception, ConfigError)
