"""Serving: memory as accounting counts it, an engine that loses no token, closed forms where there is nothing to wait for."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from research import accounting
from research.errors import ConfigError, DataError
from research.presets import PRESETS, preset
from sims import load_cluster, simulate
from sims.__main__ import app
from sims.constants import load_constants
from sims.roofline import Work, attention_operations, embedding_operations, ffn_operations, head_operations, operation_seconds
from sims.serving import Lengths, Serving, generation_ratio, serving, simulate_serving
from sims.serving.capacity import fit
from sims.serving.cost import Cost, lines
from sims.serving.engine import COLUMNS, Engine, Scheduler
from sims.serving.requests import Requests, draw_requests
from sims.serving.simulate import server
from sims.serving.spec import model_config
from sims.serving.steady import means, residents, saturated

SMALL = Serving(model="deepseek-v2-lite", gpus_per_node=2, requests=60, draws=8, lengths=Lengths(prompt=300, output=60))


class Flat:
    """A step costs a millisecond, and a microsecond for every token."""

    def rank_seconds(self, rows):
        return rows[:, 0] + rows[:, 2]

    def step_seconds(self, row):
        return 1e-3 + 1e-6 * (row[0] + row[2])


def run(requests, *, ranks=2, blocks=40, clients=None, **changes):
    scheduler = Scheduler(ranks=ranks, blocks=blocks, block_tokens=4, max_batched_tokens=64, **changes)
    return Engine(requests, scheduler, Flat(), clients=clients).run()


def some(count, seed, rate=None, longest=40):
    random = np.random.default_rng(seed)
    arrival = np.zeros(count) if rate is None else np.cumsum(random.exponential(1 / rate, count))
    return Requests(prompt=random.integers(1, longest, count), output=random.integers(1, longest, count), arrival=arrival)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(20, 60),
    st.booleans(),
    st.sampled_from([None, 1, 5]),
    st.sampled_from([None, 30.0, 3000.0]),
    st.integers(0, 10**6),
)
def test_every_token_is_generated_once_and_every_block_comes_back(count, ranks, blocks, reserve, most, rate, seed):
    requests = some(count, seed, rate)
    scheduler = Scheduler(ranks=ranks, blocks=blocks, block_tokens=4, max_batched_tokens=64, reserve=reserve, max_batch=most)
    engine = Engine(requests, scheduler, Flat(), clients=None if rate else count)
    log = engine.run()
    assert (engine.free == blocks).all()
    assert not engine.residents.any()
    np.testing.assert_array_equal(log.tokens, requests.output)
    assert log.generated.sum() == requests.output.sum()
    # Every position but the last token's passes through the model once, and once more for each time it was thrown away.
    passed = (log.rows[:, COLUMNS.index("tokens")] * log.rows[:, COLUMNS.index("steps")]).sum()
    assert passed == (requests.prompt + requests.output - 1).sum() + log.recomputed_tokens
    if reserve:
        assert log.preemptions == 0
    if not log.preemptions:
        assert log.prompt_tokens.sum() == requests.prompt.sum()
    assert log.residents.max() <= (most or count)
    assert (log.free_blocks >= 0).all()
    assert (log.first_event <= log.last_event).all()
    assert (log.admitted_event <= log.first_event).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 80), st.sampled_from([50.0, 500.0]), st.integers(0, 10**6))
def test_littles_law(count, rate, seed):
    """Integral of those in the system over time = sum of what each stayed: L = lambda W."""
    requests = some(count, seed, rate)
    log = run(requests)
    end = log.start + log.seconds
    stayed = (end[log.last_event] - requests.arrival).sum()
    np.testing.assert_allclose(log.sequence_seconds, stayed, rtol=1e-9)


def test_littles_law_in_a_steady_server():
    """Sequences in the system, mean over time, against rate times mean stay, each measured apart, within the noise of the run."""
    rate, requests = 400.0, some(4000, 1, rate=400.0)
    log = run(requests)
    busy = (log.start > log.start[-1] / 4) & (log.start < 0.9 * log.start[-1])
    in_system = np.average((log.residents + log.waiting)[busy], weights=log.seconds[busy])
    stayed = (log.start + log.seconds)[log.last_event] - requests.arrival
    inside = (requests.arrival > log.start[-1] / 4) & (requests.arrival < 0.9 * log.start[-1])
    utilisation = log.seconds[busy].sum() / (0.65 * log.start[-1])
    assert in_system * utilisation == pytest.approx(rate * stayed[inside].mean(), rel=0.1)


def test_steps_are_folded_and_change_nothing():
    """One sequence: 1 prompt step and 39 like ones, as two events."""
    log = run(Requests(prompt=np.array([10]), output=np.array([40]), arrival=np.zeros(1)), clients=1)
    assert log.rows[:, COLUMNS.index("steps")].tolist() == [1.0, 39.0]
    assert log.rows[:, COLUMNS.index("context")].tolist() == [0.0, 11 + 38 / 2]
    assert log.seconds.sum() == pytest.approx(40 * 1e-3 + (10 + 39) * 1e-6, rel=1e-12)


def test_preemption_computes_again_and_reserving_does_not():
    requests = Requests(prompt=np.full(8, 30), output=np.full(8, 60), arrival=np.zeros(8))
    paged, reserved = (run(requests, ranks=1, blocks=45, clients=8, reserve=reserve) for reserve in (False, True))
    assert paged.preemptions > 0
    assert paged.recomputed_tokens > 0
    assert (reserved.preemptions, reserved.residents.max()) == (0, 1)


def step_by_hand(model, spec, constants, cluster, *, decode, context, prompt):
    """The roofline's own operations of one GPU, each priced by itself."""
    common = {"weight_bytes": spec.weight_bits / 8, "kv_bytes": spec.kv_bits / 8}
    phase, tokens = ("decode", decode) if decode else ("prefill", prompt)
    work = Work(tokens=tokens, context=context, phase=phase, **common)
    total = [*embedding_operations(model, work), *head_operations(model, replace(work, tokens=decode or 1))]
    seconds = sum(operation_seconds(o, cluster, constants) for o in total)
    for layer in range(model.num_hidden_layers):
        seconds = seconds + sum(
            operation_seconds(o, cluster, constants) for o in [*attention_operations(model, work), *ffn_operations(model, layer, work)]
        )
    return seconds + constants["serving_step_overhead_seconds"]


@pytest.mark.parametrize("name", ["dense-nano", "llama3-70b", "deepseek-67b"])
def test_one_sequence_equals_the_closed_form(name):
    """A GPU alone, a prompt and then token by token: the sum of the rooflines of its steps."""
    model, prompt, output = preset(name), 100, 7
    cluster = replace(load_cluster("h800"), hbm_bytes=replace(load_cluster("h800").hbm_bytes, value=1e12))
    spec = Serving(model=name, gpus_per_node=1, requests=1, draws=8, lengths=Lengths(kind="fixed", prompt=prompt, output=output))
    constants = load_constants(cluster, 8)
    split, room = fit(spec, model, cluster)
    cost = Cost(spec, model, split, cluster, constants, None, sms=24)
    log = Engine(
        draw_requests(spec.lengths, 1, rate=None, seed=0),
        Scheduler(ranks=1, blocks=room.tokens_per_rank // 64, block_tokens=64, max_batched_tokens=4096),
        cost,
        clients=1,
    ).run()
    expected = step_by_hand(model, spec, constants, cluster, decode=0, context=(prompt + 1) / 2, prompt=prompt)
    for i in range(1, output):
        expected = expected + step_by_hand(model, spec, constants, cluster, decode=1, context=prompt + i, prompt=0)
    np.testing.assert_allclose(cost.price(log.rows).seconds.sum(0), expected, rtol=1e-9)
    assert log.seconds.sum() == pytest.approx(expected[0], rel=1e-9)


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).moe])
def test_a_step_of_experts_is_that_of_the_roofline(name):
    """Coefficients are taken at 0 and 1: at other sizes the lines add up to the operations, FLOP for FLOP and byte for byte."""
    model, spec = preset(name), Serving(model=name, gpus_per_node=1, weight_bits=8, kv_bits=8)
    split = fit(spec, model, replace(load_cluster("h800"), hbm_bytes=replace(load_cluster("h800").hbm_bytes, value=1e13)))[0]
    b, context, pairs, read = 37.0, 911.0, 37.0 * model.moe.num_experts_per_tok, 5.0
    work = Work(tokens=b, context=context, phase="decode", weight_bytes=1.0, kv_bytes=1.0, routed_tokens=pairs, experts_read=read)
    wanted = [*embedding_operations(model, work), *head_operations(model, work)]
    for layer in range(model.num_hidden_layers):
        wanted += [*attention_operations(model, work), *ffn_operations(model, layer, work)]
    x = np.array([1, 1, 0, 1, b, b * context, 0, 0, 0, b, pairs, read])
    found = lines(model, spec, split)
    np.testing.assert_allclose(sum(line.flops @ x for line in found), sum(o.flops for o in wanted), rtol=1e-12)
    np.testing.assert_allclose(sum(line.bytes @ x for line in found), sum(o.bytes for o in wanted), rtol=1e-12)
    np.testing.assert_allclose(sum(line.written @ x for line in found), sum(o.written for o in wanted), rtol=1e-12)


@pytest.mark.parametrize("bits", accounting.KV_BITS)
@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-67b", "mixtral-8x22b", "qwen1.5-72b"])
def test_capacity_is_accountings(name, bits):
    model, cluster = preset(name), load_cluster("h200")
    spec = Serving(model=name, cluster="h200", weight_bits=8, kv_bits=bits)
    _split, room = fit(spec, model, cluster)
    assert room.kv_bytes_per_token == accounting.kv_cache_bytes_per_token(model, bits)
    stored = fit(replace(spec, kv_as_stored=True), model, cluster)[1]
    assert stored.kv_bytes_per_token == accounting.kv_cache_bytes_per_token_stored(model, bits)
    # Tensor-parallel GPUs divide all weights; MLA's latent is held by each, heads of keys and values are divided.
    tight = fit(replace(spec, tensor_parallel=8), model, cluster)[1]
    assert tight.weights_bytes * 8 == accounting.weights_bytes(model, 8)
    shares = 1 if model.attention.kind == "mla" else 8
    assert tight.kv_bytes_per_token_per_gpu * shares == pytest.approx(room.kv_bytes_per_token)
    left = 0.9 * cluster.hbm_bytes.value - tight.weights_bytes - tight.activation_bytes
    assert 0 <= left - tight.tokens_per_rank * tight.kv_bytes_per_token_per_gpu < 64 * tight.kv_bytes_per_token_per_gpu
    assert room.tokens >= tight.tokens


@pytest.fixture(scope="module")
def found():
    return generation_ratio(draws=4)


def test_the_published_cache_of_a_token(found):
    assert accounting.kv_cache_bytes_per_token(preset("deepseek-v2"), 6) == 25920
    assert found.at.ours.kv_bytes_per_token == 25920
    assert found.ideal_cached_tokens == pytest.approx((15.6e6, 1.30e6), rel=0.005)


def test_more_memory_never_serves_less():
    rates = []
    for share in (0.3, 0.5, 0.7, 0.9):
        host = server(replace(SMALL, memory_utilization=share))
        average = means(draw_requests(SMALL.lengths, 500, rate=None, seed=0), 64)
        rates.append(saturated(average, host.cost, host.spec, residents(average, host.room, host.cost, host.spec)[0]).generated[0])
    assert rates == sorted(rates)


def test_beyond_saturation_the_rate_of_arrivals_does_not_matter():
    base = replace(SMALL, requests=200, max_batch=8, draws=1)
    endless = simulate_serving(base).served.generated_tokens_per_second.p50
    for rate in (2000.0, 8000.0):
        found = simulate_serving(replace(base, rate=rate))
        assert found.served.generated_tokens_per_second.p50 == pytest.approx(endless, rel=0.03)
        assert found.binds != "arrivals"
        assert any("queue grows" in warning for warning in found.warnings)
    slow = simulate_serving(replace(base, rate=1.0, requests=100))
    assert slow.binds == slow.residents_limited_by == "arrivals"


def test_the_engine_agrees_with_saturation_in_closed_form():
    """One rank, many turnovers: what preemption and chunks cost is a few per cent."""
    found = simulate_serving(replace(SMALL, gpus_per_node=1, max_batch=32, requests=600, draws=4))
    assert found.residents_limited_by == "batch limit"
    assert found.served.residents == pytest.approx(32, rel=0.02)
    assert found.served.generated_tokens_per_second.p50 == pytest.approx(found.saturated_tokens_per_second.p50, rel=0.06)


def test_overlap_hides_communication_and_never_more_than_there_is():
    plain, overlapped = (server(replace(SMALL, gpus_per_node=8, overlap=overlap)) for overlap in (False, True))
    row = np.array([[400.0, 400 * 900.0, 0, 0, 0, 8 * 400.0, 400.0, 1.0]])
    apart, beside = plain.cost.price(row), overlapped.cost.price(row)
    assert (beside.parts["communication"] < apart.parts["communication"]).all()
    assert (beside.parts["attention"] >= apart.parts["attention"]).all()


def test_tensor_parallel_dense_models_and_replicas():
    one = simulate_serving(Serving(model="llama3-70b", weight_bits=8, tensor_parallel=4, requests=40, draws=4, max_batch=8))
    assert (one.replicas, one.tensor_parallel) == (2, 4)
    assert one.served.requests == 80
    assert one.served.step_shares["communication"] > 0
    two = simulate_serving(Serving(model="llama3-70b", weight_bits=8, tensor_parallel=4, requests=40, draws=4, max_batch=16, nodes=2))
    assert two.served.generated_tokens_per_second.p50 == pytest.approx(2 * one.served.generated_tokens_per_second.p50)


def test_more_tokens_touch_more_experts_up_to_all():
    host = server(SMALL)
    work = host.cost.experts
    assert (np.diff(work.experts) >= 0).all()
    assert work.experts[0] == pytest.approx(3, abs=2)
    assert work.experts[-1] == 32
    # Expected distinct experts of b random tokens: E (1 - (1 - K / E)^b) of the GPU's half, of the busier GPU somewhat more.
    b = int(work.tokens[5])
    assert work.experts[5] == pytest.approx(32 * (1 - (1 - 6 / 64) ** b), rel=0.05)


def test_the_prediction_of_the_papers_ratio(found):
    """A law, not a fit: the ratio is its two terms, in every reading."""
    for each in [found.at, *found.sensitivity]:
        assert each.ratio.p50 == pytest.approx(each.residents_ratio * each.step_ratio.p50)
        assert each.residents_ratio == pytest.approx(each.ours.cached_tokens / each.baseline.cached_tokens)
        assert each.ratio.p10 <= each.ratio.p50 <= each.ratio.p90
    assert {each.reading for each in found.sensitivity} == {"FP8 products", "bfloat16 products"}
    assert found.errors["ratio"] == pytest.approx(found.at.ratio.p50 / 5.76 - 1)


def test_the_same_question_has_the_same_answer_to_the_byte():
    first, second = (json.dumps(simulate(replace(SMALL, rate=30.0, draws=4)).to_dict()) for _ in range(2))
    assert first == second
    assert first != json.dumps(simulate(replace(SMALL, rate=30.0, draws=4, seed=1)).to_dict())


def test_the_timeline_is_the_run():
    found = simulate(SMALL)
    columns = found.timeline().columns()
    assert columns["end_seconds"].max() == pytest.approx(found.log.seconds.sum())
    assert (columns["end_seconds"] - columns["start_seconds"]).sum() == pytest.approx(found.log.seconds.sum())
    assert set(columns["stream"]) == {"compute", "all-to-all", "host"}


def test_lengths_of_a_file_and_of_distributions(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("prompt,output\n10,2\n20,3\n")
    drawn = draw_requests(Lengths(kind="file", path=str(path)), 3, rate=5.0, seed=0)
    assert (drawn.prompt.tolist(), drawn.output.tolist()) == ([10, 20, 10], [2, 3, 2])
    many = draw_requests(Lengths(prompt=500, output=200, prompt_sigma=0.5, output_sigma=0.5, maximum=10**5), 20000, rate=4.0, seed=0)
    assert many.prompt.mean() == pytest.approx(500, rel=0.02)
    assert many.arrival[-1] == pytest.approx(20000 / 4, rel=0.03)
    for text, said in (
        ("prompt\n1\n", "no column output"),
        ("prompt,output\n1,x\n", "lengths.csv:2: output = 'x'"),
        ("prompt,output\n", "holds no rows"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=said):
            draw_requests(Lengths(kind="file", path=str(path)), 3, rate=None, seed=0)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"kv_bits": 5}, "kv_bits=5 must be one of 16, 8, 6, 4"),
        ({"model": "deepseek-v3"}, "model.* = 'deepseek-v3': no such preset or file; did you mean 'deepseek-v2'"),
        ({"model": {"preset": "deepseek-v2", "moe": {"device_limits": 2}}}, "model.moe.device_limits = 2: unknown key; did you mean 'device_limit'"),
        ({"max_bach": 2}, "max_bach = 2: unknown key; did you mean 'max_batch'"),
        ({"rate": -1.0}, "rate=-1.0 must be > 0"),
        ({"lengths": {"prompt": 0}}, "lengths: prompt=0.0 must lie in 1"),
        ({"rate": 1.0, "clients": 2}, "give one of the two"),
        ({"routing": "best"}, "routing = 'best'"),
    ],
)
def test_what_cannot_be_asked_is_said_at_the_door(mapping, said):
    with pytest.raises(ConfigError, match=said):
        serving(mapping)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "deepseek-v2", "gpus_per_node": 1}, "weights of .* leave no room"),
        ({"tensor_parallel": 3}, "tensor_parallel = 3: must divide gpus_per_node = 2"),
        ({"nodes": 3}, "64 routed experts cannot be spread evenly over 6 GPUs"),
        ({"gpus_per_node": 16}, "a node of .* has 8"),
        ({"cluster": "a100", "compute_bits": 8}, "compute_bits = 8: .* no FP8"),
        ({"sms": 132}, "sms = 132: must be < 132"),
        ({"device_limit": 2}, "device_limit = 2: must lie in 1..1"),
        ({"lengths": Lengths(kind="fixed", prompt=9e6, output=1)}, "does not fit in the cache"),
    ],
)
def test_what_does_not_fit_is_said_with_its_path(changes, said):
    with pytest.raises(ConfigError, match=said):
        simulate_serving(replace(SMALL, **changes))


def test_the_command(tmp_path):
    result = CliRunner().invoke(
        app,
        [
            "serving",
            "--model",
            "deepseek-v2-lite",
            "--gpus-per-node",
            "2",
            "--requests",
            "40",
            "--set",
            "model.moe.num_experts_per_tok=4",
            "--set",
            "draws=4",
            "--json",
        ],
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output)
    assert answer["seed"] == 0
    assert answer["binds"]
    assert any("outside the calibrated range" in warning for warning in answer["warnings"])
    assert set(answer["generated_tokens_per_second"]) == {"p10", "p50", "p90"}
    assert answer["constants"]["attention_efficiency"]["source"]
    shown = CliRunner().invoke(app, ["serving", "--model", "dense-nano", "--requests", "20", "--set", "draws=2"])
    assert shown.exit_code == 0
    assert "binds" in shown.output
    assert "Example:" in CliRunner().invoke(app, ["serving", "--help"]).output
    path = tmp_path / "model.yaml"
    path.write_text("model: {preset: deepseek-v2-lite, num_hidden_layers: 3}\n")
    assert model_config(str(path)).num_hidden_layers == 3
    assert asdict(serving({"model": str(path)}).model)["num_hidden_layers"] == 3
