"""Decoding over a filled cache, the prefill of a long prompt, and the same greedy words as transformers'."""

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from research import accounting
from research.config import ModelConfig
from research.model.cache import Cache
from research.model.generation import generate
from research.model.kernels.functions import few_rows_product
from research.presets import preset
from tests.bench.common import interleaved, pin, reference, spread_out


def reads() -> tuple[int, dict[str, Callable[[], object]]]:
    """Bytes, and the two ways of reading them: a long sum, and the product that decoding uses.  The faster one is what the core reads."""
    data, one = torch.ones(2**16, 2**10), torch.ones(1, 2**10)
    return data.nbytes, {"sum": data.sum, "product": lambda: few_rows_product(one, data)}


def bandwidth() -> float:
    """Bytes per second that the core reads, by the faster way."""
    size, ways = reads()
    return size / min(interleaved(ways, 5).values())


def measure_decoding(name: str, batch: int, context: int, rounds: int) -> dict[str, object]:
    """Seconds per step of `batch` tokens behind `context` cached positions; the floor is what must be read over the core's bandwidth.

    The step is held against the bandwidth of the same seconds: on a shared machine it changes by half from one minute to the next.
    """
    from transformers import DynamicCache

    config = preset(name)
    model = spread_out(config).eval()
    twin = reference(model, "grouped_mm", 2 * context).eval()
    random = torch.Generator().manual_seed(1)
    cache = Cache.allocate(config, batch, context + 6 * rounds + 8, dtype=torch.float32, device="cpu")
    theirs = DynamicCache(config=twin.config)
    for index, layer in enumerate(cache.layers):
        for rows in (layer.first.rows, layer.second.rows):
            rows[:, :context] = torch.randn(rows[:, :context].shape, generator=random)
        theirs.update(*(rows[:, None, :context].clone() for rows in (layer.first.rows, layer.second.rows)), index)
    cache.lengths[:] = context
    ids = torch.randint(0, config.vocab_size, (batch, 1), generator=random)
    with torch.no_grad():
        said, wanted = model(ids, cache).logits, twin(ids, past_key_values=theirs, use_cache=True).logits
        apart = float((said - wanted).abs().max() / wanted.std())
        forms = {
            "moelab": lambda: model(ids, cache).logits.argmax(-1),
            "transformers": lambda: twin(ids, past_key_values=theirs, use_cache=True).logits.argmax(-1),
        }
        seconds = interleaved(forms, rounds)
        cache.lengths[:] = context
        size, ways = reads()
        beside = interleaved({"moelab": forms["moelab"], **ways}, 5 * rounds)
    read = size / min(beside[way] for way in ways)
    floor = (weights_read(config, batch) + batch * context * cache_bytes(config)) / read
    return {
        "model": name,
        "batch": batch,
        "context": context,
        "seconds": seconds,
        "times": seconds["transformers"] / seconds["moelab"],
        "tokens_per_second": batch / seconds["moelab"],
        "floor_seconds": floor,
        "over_floor": beside["moelab"] / floor,
        "read_bytes_per_second": read,
        "logits_apart": apart,
        "cache_bytes": cache.allocated_bytes,
        "cache_over_closed_form": cache.allocated_bytes / (batch * cache.positions * cache_bytes(config)),
    }


def weights_read(config: ModelConfig, batch: int) -> float:
    """Bytes of weights that a step of `batch` tokens has to read: an expert once, whoever chose it (expected, chosen at random)."""
    moe = config.moe
    assert moe is not None
    expert = 3 * config.hidden_size * moe.moe_intermediate_size * 4
    once = accounting.activated_parameters(config) * 4 - len(config.moe_layers) * moe.num_experts_per_tok * expert
    touched = moe.n_routed_experts * (1 - (1 - moe.num_experts_per_tok / moe.n_routed_experts) ** batch)
    return once + len(config.moe_layers) * touched * expert


def cache_bytes(config: ModelConfig) -> float:
    """Per token, float32."""
    return accounting.kv_cache_bytes_per_token(config, 32)


def same_words(name: str, prompt: int, steps: int) -> int:
    """Greedy steps that both say alike behind the same random prompt, of `steps`."""
    model = spread_out(preset(name)).eval()
    twin = reference(model, "grouped_mm").eval()
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(2))
    ours = torch.stack(list(generate(model, ids, steps)), 1)[0]
    theirs = twin.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, min_new_tokens=steps, do_sample=False)[0, prompt:]
    unequal = (ours != theirs).nonzero()
    return int(unequal[0]) if len(unequal) else steps


def measure_prefill(name: str, length: int) -> dict[str, dict[str, float]]:
    """Seconds and added peak memory of reading a prompt of `length`, each in a process of its own."""
    found = {}
    for who in ("moelab", "transformers"):
        done = subprocess.run([sys.executable, "-m", "tests.bench.decoding", name, str(length), who], capture_output=True, text=True, check=True)
        found[who] = json.loads(done.stdout.splitlines()[-1])
    return found


def _prefill(name: str, length: int, who: str) -> None:
    pin(keep=False)
    model = spread_out(preset(name)).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(2))
    if who == "moelab":

        def read(ids):
            next(iter(generate(model, ids, 1)))
    else:
        twin = reference(model, "grouped_mm", 2 * length).eval()

        def read(ids):
            with torch.no_grad():
                twin(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    read(ids[:, :64])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide what is added
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, began = _status("VmRSS"), time.perf_counter()
    read(ids)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "added_peak_bytes": _status("VmHWM") - before}))


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _prefill(sys.argv[1], int(sys.argv[2]), sys.argv[3])
