"""Operations against the closed forms of accounting, against parameters and cache bytes, and the laws of the roofline."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research import accounting
from research.presets import PRESETS, preset
from sims.cluster import load_cluster
from sims.roofline import Operation, Work, embedding_operations, head_operations, layer_operations, operation_seconds, total_flops

CONSTANTS = {
    "attention_efficiency": np.array([0.4, 0.5]),
    "dense_gemm_efficiency": np.array([0.6, 0.7]),
    "grouped_gemm_share": np.array([0.8, 0.9]),
    "grouped_gemm_half_tokens": np.array([64.0, 128.0]),
    "memory_efficiency": np.array([0.8, 0.9]),
    "exposed_write": np.array([0.5, 0.0]),
}


def flops(model, phase, sequence_length, tokens=1, **more):
    work = Work(tokens=tokens, context=sequence_length / 2, phase=phase)
    layers = [
        o
        for i in range(model.num_hidden_layers)
        for o in layer_operations(model, i, tokens=tokens, phase=phase, sequence_length=sequence_length, **more)
    ]
    return total_flops([*embedding_operations(model, work), *layers, *head_operations(model, work)])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sequence_length", [256, 4095])
def test_flops_are_those_of_accounting_to_the_digit(name, sequence_length):
    model = preset(name)
    forward = accounting.forward_flops_per_token(model, sequence_length)
    assert flops(model, "forward", sequence_length) == forward
    assert flops(model, "prefill", sequence_length) == forward
    assert flops(model, "backward-input", sequence_length) + flops(model, "backward-weights", sequence_length) == 2 * forward
    assert flops(model, "forward", sequence_length, tokens=4096) == 4096 * forward


@pytest.mark.parametrize("name", ["deepseek-67b", "deepseek-v2-lite"])
def test_tensor_parallel_gpus_share_the_work(name):
    """All of a plain model's; of MLA's the projections to latents and their norms are repeated on every GPU."""
    model = preset(name)
    a, d = model.attention, model.hidden_size
    whole, shard = (
        sum(o.flops for o in layer_operations(model, 0, tokens=64, phase="forward", sequence_length=512, tensor_parallel=n)) for n in (1, 8)
    )
    repeated = 0
    if a.kind == "mla":
        repeated = 2 * 64 * (d * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank)
    assert 8 * (shard - repeated) == whole - repeated


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-67b", "qwen1.5-72b"])
@pytest.mark.parametrize("bits", [16, 8, 6])
def test_decoding_reads_the_cache_of_accounting_and_every_weight_once(name, bits):
    model = preset(name)

    def moved(context):
        return sum(
            o.bytes
            for i in range(model.num_hidden_layers)
            for o in layer_operations(model, i, tokens=1, phase="decode", context=context, kv_bits=bits, weight_bits=0)
        )

    assert moved(1001) - moved(1) == pytest.approx(1000 * accounting.kv_cache_bytes_per_token(model, bits), rel=1e-12)
    read = [
        sum(
            o.bytes
            for i in range(model.num_hidden_layers)
            for o in layer_operations(model, i, tokens=1, phase="decode", context=1, weight_bits=weight_bits)
        )
        for weight_bits in (16, 0)
    ]
    embeddings = 2 * model.vocab_size * model.hidden_size
    gains = 2 * model.hidden_size * model.num_hidden_layers + model.hidden_size
    if model.attention.kind == "mla":
        gains += model.num_hidden_layers * (model.attention.q_lora_rank + model.attention.kv_lora_rank)
    assert read[0] - read[1] == 2 * (accounting.total_parameters(model) - embeddings - gains)


def test_absorbed_decoding_multiplies_by_what_the_latent_needs():
    """2 h (2 C + R) per position (V2 appendix C, the form of FlashMLA), not 2 h (N + R + V)."""
    model = preset("deepseek-v2")
    (core,) = (o for o in layer_operations(model, 0, tokens=3, phase="decode", context=700) if o.kind == "attention")
    assert core.flops == 3 * 700 * 2 * 128 * (2 * 512 + 64)


@pytest.mark.parametrize("kind", ["attention", "dense_gemm", "grouped_gemm", "memory"])
def test_an_operation_takes_the_longer_of_computing_and_moving(kind):
    cluster = load_cluster("h800")
    rows = 64.0 if kind == "grouped_gemm" else None
    compute, move = Operation("x", kind, 1e15, 1.0, rows), Operation("x", kind, 1.0, 1e12, rows)
    np.testing.assert_allclose(operation_seconds(move, cluster, CONSTANTS), 1e12 / (3.35e12 * CONSTANTS["memory_efficiency"]), rtol=1e-12)
    if kind != "memory":
        efficiency = CONSTANTS["attention_efficiency" if kind == "attention" else "dense_gemm_efficiency"]
        if rows:
            efficiency = efficiency * CONSTANTS["grouped_gemm_share"] * [64 / 128, 64 / 192]
        np.testing.assert_allclose(operation_seconds(compute, cluster, CONSTANTS), 1e15 / 989e12 / efficiency, rtol=1e-12)
        np.testing.assert_allclose(operation_seconds(compute, cluster, CONSTANTS, sms_share=0.5), 2e15 / 989e12 / efficiency, rtol=1e-12)
        fp8 = replace(compute, compute_bits=8)
        np.testing.assert_allclose(operation_seconds(fp8, cluster, CONSTANTS), 1e15 / 1979e12 / efficiency, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PRESETS)), st.integers(1, 4096), st.sampled_from(["forward", "backward-input", "backward-weights", "prefill"]))
def test_more_tokens_never_take_less_time_and_never_more_per_token(name, tokens, phase):
    model, cluster = preset(name), load_cluster("h100")

    def seconds(n):
        operations = layer_operations(model, model.num_hidden_layers - 1, tokens=n, phase=phase, sequence_length=4096)
        return sum(operation_seconds(o, cluster, CONSTANTS) for o in operations)

    assert (seconds(tokens) <= seconds(2 * tokens) * (1 + 1e-12)).all()
    assert (seconds(2 * tokens) <= 2 * seconds(tokens) * (1 + 1e-12)).all()


def test_one_of_sequence_length_and_context_is_given():
    for wrong in ({}, {"sequence_length": 4.0, "context": 2.0}):
        with pytest.raises(ValueError, match="one of the two"):
            layer_operations(preset("deepseek-67b"), 0, tokens=1, phase="forward", **wrong)
