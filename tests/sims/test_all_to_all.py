"""The all-to-all as a whole: placements and copies against a loop over tokens, limits, routing families, tiers."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.errors import ConfigError
from research.routing_trace import select_experts
from sims import AllToAll, load_cluster, plan, simulate, synthetic_trace
from sims.all_to_all import answer
from sims.collective import collective_seconds
from sims.commands.sweep import cells
from sims.constants import load_constants
from sims.placement import Placement, place
from sims.routing import FAMILIES
from sims.sharing import shared_seconds, stretch
from sims.traffic import needed_devices, traffic_of


def small(**changes):
    base = {"nodes": 2, "gpus_per_node": 4, "tokens_per_device": 96, "hidden_size": 200, "n_routed_experts": 32, "num_experts_per_tok": 4}
    return AllToAll(**{**base, **changes})


def token_by_token(ids, source, where, size, dedup):
    """NVLink and InfiniBand bytes (G, G), copy by copy; rails and entries as their definition says."""
    gpus = where.devices
    nvlink, infiniband = np.zeros((gpus, gpus), np.int64), np.zeros((gpus, gpus), np.int64)
    for experts, s in zip(ids, source, strict=True):
        targets = [int(where.expert_device[e]) for e in experts]
        if dedup != "none":
            targets = sorted(set(targets))
        if dedup == "node":
            for node in {int(where.node[d]) for d in targets}:
                entry = s
                if node != where.node[s]:
                    there = sorted((d for d in range(gpus) if where.node[d] == node), key=lambda d: where.rail[d])
                    same = [d for d in there if where.rail[d] == where.rail[s]]
                    entry = same[0] if same else there[where.rail[s] % len(there)]
                    infiniband[s, entry] += size
                for d in targets:
                    if where.node[d] == node and d != entry:
                        nvlink[entry, d] += size
        else:
            for d in targets:
                if d != s:
                    (nvlink if where.node[d] == where.node[s] else infiniband)[s, d] += size
    return nvlink, infiniband


@st.composite
def placements(draw):
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    places = draw(st.permutations(list(itertools.product(range(nodes), range(per_node)))))
    chosen = places[: draw(st.integers(1, len(places)))]
    experts = draw(st.lists(st.integers(0, len(chosen) - 1), min_size=7, max_size=19))
    return place([list(p) for p in chosen], experts, devices=len(chosen), nodes=nodes, gpus_per_node=per_node, n_routed_experts=len(experts))


@settings(max_examples=80, deadline=None)
@given(placements(), st.sampled_from(["node", "device", "none"]), st.integers(1, 30), st.integers(1, 700), st.integers(0, 10**6))
def test_bytes_of_every_placement_and_ragged_sources_equal_the_loop(where, dedup, pool, size, seed):
    random = np.random.default_rng(seed)
    experts = len(where.expert_device)
    ids = np.argsort(random.random((pool, experts)), axis=1)[:, : random.integers(1, 6)]
    counts = random.integers(0, 3, (where.devices, pool))
    needed = needed_devices(ids, where.expert_device, where.devices)
    chosen = np.stack([np.bincount(where.expert_device[row], minlength=where.devices) for row in ids])
    traffic = traffic_of(counts.astype(np.float32), needed, where, size, dedup=dedup, chosen=chosen)
    source = np.repeat(np.arange(where.devices), counts.sum(1))
    tokens = np.concatenate([np.repeat(np.arange(pool), row) for row in counts])
    nvlink, infiniband = token_by_token(ids[tokens], source, where, size, dedup)
    np.testing.assert_array_equal(traffic.nvlink, nvlink)
    np.testing.assert_array_equal(traffic.infiniband, infiniband)
    copies = len(tokens) * ids.shape[1] if dedup == "none" else needed[tokens].sum()
    assert traffic.logical.sum() == copies * size
    node = where.node[where.expert_device[ids]]
    assert traffic.node_logical.sum() == sum(len(set(node[t])) for t in tokens) * size
    back = traffic.reverse(3 * size)
    np.testing.assert_array_equal(back.infiniband, 3 * infiniband.T)
    np.testing.assert_array_equal(back.reverse(size).nvlink, nvlink)


@pytest.mark.parametrize("dedup", ["node", "device", "none"])
def test_the_whole_answer_conserves_bytes(dedup):
    planned = plan(small(dedup=dedup, tokens_per_device=113, n_routed_experts=40, dispatch_bits=8))
    result = simulate(small(dedup=dedup, tokens_per_device=113, n_routed_experts=40, dispatch_bits=8))
    source = np.repeat(np.arange(8), planned.counts.sum(1).astype(int))
    assert len(source) == 8 * 113
    ids = planned.trace.expert_ids[-1].reshape(-1, 4)
    tokens = np.concatenate([np.repeat(np.arange(len(ids)), row.astype(int)) for row in planned.counts])
    nvlink, infiniband = token_by_token(ids[tokens], source, planned.placement, 208, dedup)
    assert (result.dispatch.nvlink_bytes, result.dispatch.infiniband_bytes) == (nvlink.sum(), infiniband.sum())
    assert result.dispatch.bytes_per_token == 200 + 4 * 2
    assert result.combine.infiniband_bytes == infiniband.sum() // 208 * 400
    assert result.backward_combine.infiniband_bytes == result.combine.infiniband_bytes
    assert planned.expert_load.sum() == len(source) * 4


def test_more_copies_are_sent_the_less_they_are_de_duplicated():
    sent = [simulate(small(num_experts_per_tok=8, dedup=dedup)).dispatch.infiniband_bytes for dedup in ("node", "device", "none")]
    assert sent[0] < sent[1] < sent[2]


def test_both_placements_of_the_eight_devices_and_what_lies_between():
    v2 = {"expert_devices": 8, "device_limit": 3, "tokens_per_device": 256}
    packed = simulate(AllToAll(nodes=8, expert_parallel=8, **v2))
    across = simulate(AllToAll(nodes=8, expert_parallel=8, placement="spread", **v2))
    between = simulate(AllToAll(nodes=2, gpus_per_node=4, **v2))
    assert (packed.groups, packed.infiniband_bytes, packed.distinct_nodes_per_token) == (8, 0, 1)
    assert (across.groups, across.nvlink_bytes) == (8, 0)
    assert across.distinct_nodes_per_token == across.distinct_devices_per_token == packed.distinct_devices_per_token
    assert between.nvlink_bytes > 0 < between.infiniband_bytes < across.infiniband_bytes
    pairs = [[d % 8, 3] for d in range(8)]
    explicit = simulate(AllToAll(nodes=8, placement=pairs, **v2))
    np.testing.assert_array_equal(explicit.infiniband_matrix, across.infiniband_matrix)
    assert {p.gpu for p in explicit.timeline().phases} == {8 * d + 3 for d in range(8)}


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 1000))
def test_devices_permuted_inside_a_node_with_their_rails_change_nothing(order, seed):
    plain = simulate(small(seed=seed))
    pairs = [[d // 4, order[d % 4]] for d in range(8)]
    moved = simulate(small(seed=seed, placement=pairs))
    assert moved.to_dict() == plain.to_dict()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(8, 8), (8, 4), (4, 4), (2, 8), (8, 2), (1, 8), (6, 4)]), st.integers(0, 10**6), st.integers(1, 4))
def test_balanced_gives_every_expert_the_same_load(groups, seed, limit):
    devices, nodes = groups
    experts = 48
    trace = synthetic_trace("balanced", tokens=experts * 5, n_routed_experts=experts, num_experts_per_tok=4, expert_devices=devices,
                            device_limit=min(limit, devices) if experts // devices >= 4 else None, seed=seed, node_groups=nodes)  # fmt: skip
    load = np.bincount(trace.expert_ids.ravel(), minlength=experts)
    if max(devices, nodes) % min(devices, nodes) == 0:
        assert set(load) == {5 * 4}
    ids = trace.expert_ids[0, 0]
    np.testing.assert_array_equal(ids, select_experts(trace.scores[0], 4, devices, trace.device_limit))


@pytest.mark.parametrize("limit", [None, 2])
def test_balanced_routing_equals_the_closed_form(limit):
    """Every GPU sends and receives alike: copies per token times tokens, less the share that stays, over the link."""
    spec = small(nodes=1, gpus_per_node=8, tokens_per_device=320, device_limit=limit, routing="balanced")
    result, cluster = simulate(replace(spec, draws=1)), load_cluster("h800")
    constants = load_constants(cluster, 1)
    sent = 320 * result.distinct_devices_per_token * 7 / 8 * result.dispatch.bytes_per_token
    matrix = plan(spec).dispatch.nvlink
    assert set(matrix.sum(0)) == {round(sent)}
    nvlink = (1 + constants["header_bytes"][0] / result.dispatch.bytes_per_token) * sent / (140e9 * constants["nvlink_efficiency"][0])
    assert result.dispatch.stream_seconds["nvlink in"] == pytest.approx([nvlink] * 8, rel=1e-12)
    assert result.expert_load_violation == 0


def test_random_routing_reaches_what_the_hypergeometric_says():
    result = simulate(AllToAll(nodes=8, tokens_per_device=1024, n_routed_experts=256, num_experts_per_tok=8))

    def missed(held):
        return np.prod([(256 - held - i) / (256 - i) for i in range(8)])

    assert result.distinct_devices_per_token == pytest.approx(64 * (1 - missed(4)), rel=5e-3)
    assert result.distinct_nodes_per_token == pytest.approx(8 * (1 - missed(32)), rel=5e-3)


def test_a_node_limit_holds_and_the_two_scores_differ():
    ids = {}
    for score in ("max", "sum"):
        planned = plan(small(nodes=8, gpus_per_node=1, num_experts_per_tok=4, node_limit=2, node_score=score))
        at = planned.placement.node[planned.placement.expert_device[planned.trace.expert_ids[-1, 0]]]
        assert max(len(set(row)) for row in at) == 2
        ids[score] = np.sort(planned.trace.expert_ids[-1, 0])
    different = (ids["max"] != ids["sum"]).any(1).mean()
    assert 0.2 < different < 0.8
    both = plan(small(nodes=4, gpus_per_node=2, expert_devices=8, device_limit=2, node_limit=1))
    assert needed_devices(both.trace.expert_ids[-1, 0], 32, 8).sum(1).max() == 2
    unlimited, all_nodes = (simulate(small(node_limit=n)).to_dict() for n in (None, 2))
    assert {**all_nodes, "node_limit": None} == unlimited


def sorted_choice(scores, chosen, devices, limit):
    """The rule by sorting: best devices by their maximum, then best experts inside; ties to the lower index."""
    found = []
    for row in scores.tolist():
        per = len(row) // devices
        keep = sorted(range(devices), key=lambda d: (-max(row[d * per : (d + 1) * per]), d))[: limit or devices]
        inside = [e for e in range(len(row)) if e // per in keep]
        found.append(sorted(inside, key=lambda e: (-row[e], e))[:chosen])
    return found


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["float16", "float32", "float64"]), st.integers(1, 6), st.sampled_from([None, 1, 2, 3]), st.integers(0, 10**6))
def test_choosing_by_maxima_equals_sorting_ties_included(kind, chosen, limit, seed):
    random = np.random.default_rng(seed)
    scores = (random.integers(-4, 4, (9, 24)) / 4).astype(kind)
    np.testing.assert_array_equal(select_experts(scores, chosen, 4, limit), sorted_choice(scores, chosen, 4, limit))


def test_choosing_where_scores_are_not_finite():
    scores = np.array([[-np.inf, 1.0, -np.inf, -np.inf], [0.5, -np.inf, 2.0, 1.0]], np.float32)
    assert select_experts(scores, 3).tolist() == [[1, 0, 2], [2, 3, 0]]
    assert select_experts(np.array([[np.nan, 1.0, 2.0]]), 2).tolist() == [[2, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_routes_by_the_models_rule_and_the_same_each_time(family):
    made = [
        synthetic_trace(family, tokens=160, n_routed_experts=32, num_experts_per_tok=4, expert_devices=8, device_limit=2, seed=3, steps=3)
        for _ in range(2)
    ]
    assert made[0].expert_ids.tobytes() == made[1].expert_ids.tobytes()
    np.testing.assert_array_equal(made[0].expert_ids[-1, 0], select_experts(made[0].scores[0], 4, 8, 2))
    simulate(small(routing=family, device_limit=3))


def test_scenarios_are_what_their_names_say():
    def loads(family, steps=1, **changes):
        trace = synthetic_trace(family, tokens=2048, n_routed_experts=32, num_experts_per_tok=4, expert_devices=8, device_limit=None, steps=steps)
        return [np.bincount(ids.ravel(), minlength=32) for ids in trace.expert_ids[:, 0]]

    assert loads("hot-expert")[0][0] > 1024 > 2 * loads("hot-expert")[0][1]
    assert loads("unused-expert")[0][-1] == 0
    assert [int(load.reshape(8, 4).sum(1).argmax()) for load in loads("rotating", 3)] == [0, 1, 2]
    quiet, burst = loads("burst", 2)
    assert burst.max() > 2 * quiet.max()
    assert simulate(small(routing="spread")).distinct_devices_per_token == 4
    ragged = plan(small(routing="ragged")).counts.sum(1)
    assert ragged[-1] == 3 * ragged[0]
    assert simulate(small(routing="gaussian")).expert_load_violation > 2 * simulate(small()).expert_load_violation


def test_twice_the_bandwidth_or_the_sms_never_slows_and_a_plain_network_costs():
    spec = small(nodes=4, tokens_per_device=512, draws=1)
    rail = simulate(spec)
    plain = simulate(replace(spec, network="plain"))
    crowded = simulate(replace(spec, network="plain", oversubscription=4.0))
    assert rail.infiniband_bytes == plain.infiniband_bytes == crowded.infiniband_bytes
    assert rail.dispatch.seconds.p50 < plain.dispatch.seconds.p50 < crowded.dispatch.seconds.p50
    for stream in ("nic out", "nic in"):
        np.testing.assert_allclose(crowded.dispatch.stream_seconds[stream], 4 * np.array(rail.dispatch.stream_seconds[stream]))
    by_sms = [simulate(replace(spec, sms=n)).dispatch.seconds.p50 for n in (4, 8, 16, 32)]
    assert by_sms == sorted(by_sms, reverse=True)
    with pytest.raises(ConfigError, match="needs network: plain"):
        simulate(replace(spec, oversubscription=4.0))


def test_more_gpus_than_experts_are_groups_that_are_alike():
    result = simulate(AllToAll(nodes=512, tokens_per_device=64))
    assert (result.expert_parallel, result.groups) == (32, 128)
    assert any("512" in w and "groups of 32 GPUs" in w for w in result.warnings)
    assert result.timeline().phases[0].copies == 128
    uneven = simulate(AllToAll(nodes=3, tokens_per_device=64))
    assert any("does not come out even" in w for w in uneven.warnings)


def test_max_min_sharing_alone_is_the_bound_and_beside_others_never_less():
    cluster = load_cluster("h800")
    constants = load_constants(cluster, 4)
    planned = plan(small(tokens_per_device=512, hidden_size=7168, routing="gaussian"))
    assert stretch([planned.dispatch], cluster, constants)[0] == pytest.approx(1, abs=3e-3)
    alone = np.stack([collective_seconds(t, cluster, constants) for t in (planned.dispatch, planned.combine)])
    together = shared_seconds([planned.dispatch, planned.combine], cluster, constants)
    assert (together >= alone).all()
    twice = stretch([planned.dispatch, planned.dispatch], cluster, constants)
    np.testing.assert_allclose(twice, 2, rtol=0.01)
    late = shared_seconds([planned.dispatch, planned.combine], cluster, constants, starts=[0.0, 1.0])
    np.testing.assert_allclose(late, alone, rtol=3e-3)
    halfway = float(alone[0, 0]) / 2
    partly = stretch([planned.dispatch, planned.dispatch], cluster, constants, starts=[0.0, halfway])
    assert (partly > 1).all()
    assert (partly < twice).all()


def test_a_degraded_link_slows_its_collective_and_only_as_far_as_it_binds():
    cluster = load_cluster("h800")
    constants = load_constants(cluster, 2)
    traffic = plan(small(tokens_per_device=512)).dispatch
    healthy = collective_seconds(traffic, cluster, constants)
    half = {"nic out": np.where(np.arange(8) == 3, 0.1, 1.0)}
    assert (collective_seconds(traffic, cluster, constants, speed=half) > healthy).all()
    np.testing.assert_array_equal(collective_seconds(traffic, cluster, constants, speed={"nic out": np.ones(8)}), healthy)
    latency = collective_seconds(traffic, cluster, constants, contention=0.0)
    np.testing.assert_allclose(collective_seconds(traffic, cluster, constants, contention=2.0) - latency, 2 * (healthy - latency))


def test_a_question_is_answered_in_the_same_way_by_plan_and_answer():
    spec = small()
    planned = plan(spec)
    assert answer(planned, load_constants(planned.cluster, spec.draws)).to_dict() == simulate(spec).to_dict()


def test_the_same_affinities_serve_every_limit_of_a_sweep():
    answers = [cell.result for cell in cells(small(), {"device_limit": [1, 2, 3, 4, None]})]
    reached = [a.distinct_routing_devices_per_token for a in answers]
    assert reached == sorted(reached)
    np.testing.assert_array_equal(answers[-1].nvlink_matrix, answers[-2].nvlink_matrix)


def test_entries_fall_on_the_devices_that_are_there():
    where = Placement(np.array([0, 0, 0, 1]), np.array([0, 1, 2, 5]), np.arange(4))
    assert where.entries().tolist() == [[0, 3], [1, 3], [2, 3], [2, 3]]


def test_sms_move_the_copies_sent_or_taken_in_and_one_per_node():
    """Three tokens of GPU 0: one stays, one goes to GPU 1 beside it, one to both GPUs of the other node by way of GPU 2."""
    where = Placement(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.arange(4))
    needed = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], bool)
    traffic = traffic_of(np.array([[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]], np.float32), needed, where, 10)
    # GPU 0 issues two copies and reads for three nodes; 1 takes one in; 2 issues two copies, its own among them; 3 takes one in.
    assert traffic.sm.tolist() == [50, 10, 20, 10]
    assert traffic.infiniband[0, 2] == traffic.nvlink[0, 1] == traffic.nvlink[2, 3] == 10


def test_the_constant_of_combine_slows_combines_alone():
    planned = plan(small(nodes=4, gpus_per_node=2, hidden_size=7168))
    constants = load_constants(planned.cluster, 3)
    slower = constants.replaced(combine_efficiency=constants["combine_efficiency"] / 2)
    moves = {"dispatch": planned.dispatch, "combine": planned.combine, "backward_combine": planned.backward_combine}
    times = {name: [collective_seconds(t, planned.cluster, c) for c in (constants, slower)] for name, t in moves.items()}
    np.testing.assert_array_equal(*times["dispatch"])
    np.testing.assert_array_equal(*times["backward_combine"])
    assert (times["combine"][1] > 1.5 * times["combine"][0]).all()
