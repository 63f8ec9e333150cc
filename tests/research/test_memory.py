"""Predicted against measured memory: what layers save, to 1 %; the peak of a step, within 15 %; and what the command says."""

import dataclasses
import json
import time

import pytest
import torch
from test_cli import call

from research import accounting, memory
from research.model.cache import Cache
from research.model.kernels import native
from research.model.transformer import Transformer
from research.presets import PRESETS, preset
from research.training.measured_memory import kernels_in_use, measured_step_bytes


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=["kernels", "plain"])
def kernels(request, monkeypatch):
    """Whether the model runs with the compiled kernels, which "plain" hides."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)
    return kernels_in_use()


def grouped_query():
    config = preset("deepseek-v2-nano")
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, kind="gqa", num_key_value_heads=2, q_lora_rank=None))


def uncompressed_query():
    config = preset("deepseek-v2-nano")
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, q_lora_rank=None))


MODELS = {name: preset(name) for name in PRESETS if name.endswith(("-nano", "-micro"))} | {
    "grouped-query": grouped_query(),
    "uncompressed query": uncompressed_query(),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_save_what_the_table_says(name, kernels):
    """Nothing dropped (as the table has it): the bytes that autograd's graph and the routings hold, each storage once, to 1 %."""
    config, tokens, storages = MODELS[name], 4 * 64, {}
    model = Transformer(config).initialise(0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ids = torch.randint(config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
        _, routings = model.hidden(ids)
    for routing in routings.values():
        for x in routing:
            pack(x)
    found = sum(storage.nbytes() for address, storage in storages.items() if address not in weights)
    predicted = memory.training_memory(config, tokens, kernels=kernels).activations
    assert found == pytest.approx(sum(predicted.values()), rel=0.01)


WIDE, LONG, MICRO = (8, 256, None), (2, 1024, None), (8, 256, 2)
"""Sequences, their length, sequences per forward pass."""


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("deepseek-v2-nano", shape) for shape in (WIDE, LONG, MICRO)),
        *((name, shape) for name in ("grouped-query", "dense-nano") for shape in (WIDE, LONG)),
        *((name, WIDE) for name in ("mixtral-nano", "hash-nano", "deepseek-v2-micro")),
        ("deepseekmoe-nano", MICRO),
    ],
)
def test_the_peak_is_predicted_within_15_percent(name, shape, checkpointed, kernels):
    compare(MODELS[name], shape, checkpointed, kernels)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "checkpointed"), [((8, 256, None), False), ((2, 1024, None), True)])
def test_the_peak_of_a_larger_model_is_predicted_within_15_percent(shape, checkpointed):
    compare(preset("deepseek-v2-mini"), shape, checkpointed, kernels_in_use())


def compare(config, shape, checkpointed, kernels):
    batch, length, micro = shape
    size = micro or batch
    measured = measured_step_bytes(config, batch, length, micro_batch_size=micro, checkpointed=checkpointed)
    predicted = memory.training_memory(config, size * length, micro_batches=batch // size, checkpointed=checkpointed, kernels=kernels)
    assert predicted.peak == pytest.approx(measured, rel=0.15)
    assert predicted.weights == 4 * accounting.total_parameters(config)


def test_the_measurement_counts_weights_and_state_and_frees():
    """A dense model of one layer and one token: weights, gradients, two moments and little more."""
    config = dataclasses.replace(preset("dense-nano"), num_hidden_layers=1, vocab_size=4096)
    four = 16 * accounting.total_parameters(config)
    assert four <= measured_step_bytes(config, 1, 1) <= 1.02 * four
    assert measured_step_bytes(config, 1, 1) == measured_step_bytes(config, 1, 1)


@pytest.mark.parametrize("bits", accounting.KV_BITS)
def test_the_cache_of_decoding_is_what_is_allocated(bits):
    config = grouped_query()
    cache = Cache.allocate(config, 3, 50, bits=bits, dtype=torch.float32, device="cpu")
    found = memory.decoding_memory(config, 3, 50, bits)
    assert found.cache == cache.allocated_bytes
    assert found.peak == found.weights + found.cache + 4 * 3 * config.vocab_size


def test_the_command_says_it_at_once_in_json_and_as_a_table(tmp_path):
    began = time.perf_counter()
    done = call("describe", "deepseek-v2", "--memory", "--batch-size", 16, "--micro-batch-size", 4, "--json")
    assert time.perf_counter() - began < 5  # without torch; half a second where nothing else runs
    found = json.loads(done.stdout)
    plain, checkpointed = found["training"]["none"], found["training"]["blocks"]
    assert (found["micro_batch_size"], found["sequence_length"]) == (4, 4096)
    assert plain["weights"] == 4 * accounting.total_parameters(preset("deepseek-v2"))
    assert plain["peak"] == memory.training_memory(preset("deepseek-v2"), 4 * 4096, micro_batches=4).peak
    assert checkpointed["peak"] < plain["peak"]
    run = tmp_path / "run.yaml"
    run.write_text("model: dense-nano\ndata: {sequence_length: 32}\ntraining: {train_tokens: 64, batch_size: 6, micro_batch_size: 3}\n")
    table = call("describe", run, "--memory", "--measure")
    assert table.returncode == 0, table.stderr
    assert "6 x 32 tokens, 3 sequences at a time" in table.stdout
    assert "measured_peak" in table.stdout
    wrong = call("describe", run, "--memory", "--micro-batch-size", 4)
    assert (wrong.returncode, wrong.stderr) == (1, "--micro-batch-size = 4: must divide --batch-size = 6\n")
