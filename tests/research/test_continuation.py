"""`generate` and `evaluate` on a model that was never trained: what they print does not depend on it."""

import json

import pytest
import torch
from typer.testing import CliRunner

from research import accounting
from research.__main__ import app
from research.configfile import load_run_config
from research.continuation import Sampling, gather_prompts, go_on
from research.data.prepare import prepare
from research.errors import UserError
from research.evaluation.bits_per_byte import evaluate_domains
from research.evaluation.cache_width import evaluate_widths
from research.model.transformer import Transformer
from research.training import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory: two layers, a corpus of one file."""
    folder = tmp_path_factory.mktemp("continuation")
    text = folder / "own.txt"
    text.write_text("".join(f"the quick brown fox number {i * 7919 % 10007} jumps over {i * i % 97} lazy dogs\n" for i in range(1000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CACHE", str(folder / "cache"))
        torch.set_num_threads(1)
        config = load_run_config(
            {
                "model": {"preset": "deepseek-v2-nano", "num_hidden_layers": 2, "vocab_size": 270, "initializer_range": 0.1},
                "data": {"corpus": "files", "paths": [str(text)], "tokenizer_vocab_size": 270, "sequence_length": 32},
                "training": {"train_tokens": 256, "validation_tokens": 512},
            }
        )
        model = Transformer(config.model).initialise(0)
        state = checkpoint.Resumed(step=1, seconds=0.0, metrics={}, snapshots={})
        checkpoint.save(folder / "run" / "checkpoint", model, torch.optim.AdamW(model.parameters()), config, state)
        yield folder / "run"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_batch_says_what_each_prompt_says_alone(run):
    prompts, sampling = ["the quick", "x", "brown fox number 12 jumps"], Sampling(tokens=12, seed=3)
    pieces = []
    together = go_on(run, prompts, sampling, pieces.append)
    assert "".join(pieces) == together[0].prompt + together[0].text
    assert len(pieces) > 3
    assert [go_on(run, [p], sampling)[0] for p in prompts] == together
    assert [len(c.tokens) for c in together] == [12, 12, 12]
    assert go_on(run, prompts, Sampling(tokens=12, seed=4)) != together


def test_generate_prints_every_prompt_with_its_continuation(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the quick\n\n한국어\n", encoding="utf-8")
    options = [run, "--prompt", "lazy", "--prompts", file, "--tokens", 6, "--seed", 2, "--kv-bits", 6]
    plain, as_json = invoke("generate", *options), json.loads(invoke("generate", *options, "--json").stdout)
    assert [c["prompt"] for c in as_json["continuations"]] == ["lazy", "the quick", "한국어"]
    assert as_json["sampling"] == {"tokens": 6, "temperature": 0.8, "top_p": 0.95, "seed": 2, "kv_bits": 6}
    assert plain.stdout == "\n\n".join(c["prompt"] + c["text"] for c in as_json["continuations"]) + "\n"


def test_greedy_does_not_ask_the_seed(run):
    texts = [go_on(run, ["fox"], Sampling(tokens=8, temperature=0.0, seed=seed)) for seed in (0, 1)]
    assert texts[0] == texts[1]


def test_prompts_that_are_none_are_one_sentence(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary"
    empty.write_text("\n  \n")
    binary.write_bytes(b"\xff\xfe\x00")
    for given, file, said in [
        ([""], None, "--prompt = ''"),
        ([], None, "--prompt: is missing"),
        (["a"], empty, f"--prompts = {empty}: holds no prompt"),
        ([], binary, f"--prompts = {binary}: cannot be read as UTF-8"),
        ([], tmp_path / "nowhere", "cannot be read"),
        ([], tmp_path, "cannot be read"),
    ]:
        with pytest.raises(UserError) as caught:
            gather_prompts(given, file)
        assert len(caught.value.problems) == 1
        assert said in caught.value.problems[0]


def test_evaluate_says_what_each_width_costs(run):
    said = json.loads(invoke("evaluate", run, "--kv-bits", 8, "--kv-bits", 4, "--json").stdout)
    assert [w["bits"] for w in said["widths"]] == [None, 8, 4]
    model, config = checkpoint.load_model(run)
    full, eight, four = said["widths"]
    assert eight["bytes_per_token"] == accounting.kv_cache_bytes_per_token_stored(config.model, 8)
    assert full["bytes_per_token"] == 4 * accounting.kv_cache_elements_per_token(config.model)
    data = prepare(config.data)
    (domain,) = data.domains
    assert full["bits_per_byte"][domain] == pytest.approx(evaluate_domains(model, data, config.data, 512)[domain].bits_per_byte)
    assert set(full["bits_per_byte"]) == {domain, "all"}
    assert 0 < abs(eight["difference"]["all"]) < abs(four["difference"]["all"])
    for width in (eight, four):
        assert width["difference"][domain] == pytest.approx(width["bits_per_byte"][domain] - full["bits_per_byte"][domain])
    table = invoke("evaluate", run)
    assert table.exit_code == 0
    assert all(words in table.stdout for words in ("full precision", "16 bits", "8 bits", "6 bits", "4 bits", "bytes/token"))
    with pytest.raises(UserError, match="--kv-bits = 5: no cache has this width; valid: 16, 8, 6, 4"):
        evaluate_widths(model, data, config, [5], 512)
