"""Runs as Hugging Face folders, there and back, and the commands for it."""

import dataclasses
import json
import sys

import pytest
import torch
from odd_models import YARN, its_twin, random_model, small
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2ForCausalLM

from research.__main__ import main
from research.config import DataConfig, RunConfig, TrainingConfig
from research.data.tokenizer import train_tokenizer
from research.errors import CheckpointError, ConfigError, UserError
from research.exchange import export_run, import_run, run_tokenizer
from research.training.checkpoint import Resumed, load_model, save

TEXT = "The quick brown fox, 1234 times.\n\ndef f(x):\n    return x\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer({"en": [TEXT * 3]}, 280, 1.0)


def saved_run(folder, tokenizer, model_config):
    config = RunConfig(model=model_config, data=DataConfig(tokenizer_vocab_size=280, sequence_length=48), training=TrainingConfig(train_tokens=1))
    model = random_model(config.model)
    save(folder / "checkpoint", model, torch.optim.AdamW(model.parameters()), config, Resumed(step=1, seconds=0.0, metrics={}, snapshots={}))
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize(
    "config", [small(vocab=283, yarn=YARN, limit=2), small(vocab=283, tied=True, shared=0, q=None), dataclasses.replace(small(vocab=283), moe=None)]
)
def test_export_is_loaded_by_transformers_and_imported_again(tmp_path, tokenizer, config):
    model = saved_run(tmp_path / "run", tokenizer, config)
    hf, again, ids = tmp_path / "hf", tmp_path / "again", torch.randint(0, 283, (2, 40), generator=torch.Generator().manual_seed(2))
    export_run(tmp_path / "run", hf)
    twin, info = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True, experts_implementation="eager")
    assert isinstance(twin, DeepseekV2ForCausalLM)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        wanted = model(ids).logits
        torch.testing.assert_close(twin(ids).logits, wanted, atol=1e-5, rtol=0)
    theirs = AutoTokenizer.from_pretrained(hf)
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT).ids
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT
    assert theirs.eos_token_id == twin.generation_config.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    import_run(hf, again)
    back, run = load_model(again)
    assert torch.equal(back(ids).logits, wanted)
    assert run_tokenizer(again, run).to_str() == run_tokenizer(again / "checkpoint", run).to_str() == tokenizer.to_str()
    export_run(again, tmp_path / "hf2")
    for file in hf.iterdir():
        assert file.read_bytes() == (tmp_path / "hf2" / file.name).read_bytes(), file.name
    twin.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    import_run(tmp_path / "shards", tmp_path / "third")
    assert torch.equal(load_model(tmp_path / "third")[0](ids).logits, wanted)
    with pytest.raises(CheckpointError, match=r"put the model's tokenizer\.json there"):
        run_tokenizer(tmp_path / "third", load_model(tmp_path / "third")[1])


def test_a_folder_is_made_whole_or_not_at_all(tmp_path, tokenizer):
    saved_run(tmp_path / "run", tokenizer, small(vocab=283))
    taken = tmp_path / "taken"
    taken.mkdir()
    export_run(tmp_path / "run", taken)  # an empty folder is as good as none
    for call in (lambda: export_run(tmp_path / "run", taken), lambda: import_run(taken, tmp_path / "run")):
        with pytest.raises(UserError, match="is there already and not an empty folder"):
            call()
    broken = json.loads((taken / "config.json").read_text())
    (taken / "config.json").write_text(json.dumps(broken | {"hidden_size": 24}))
    with pytest.raises(CheckpointError) as caught:
        import_run(taken, tmp_path / "new")
    assert len(caught.value.problems) > 10
    (taken / "config.json").write_text(json.dumps(broken | {"vocab_size": 100}))
    with pytest.raises(ConfigError, match=r"has 280 tokens, more than vocab_size \(100\)"):
        import_run(taken, tmp_path / "new")
    (taken / "config.json").write_text(json.dumps(broken))
    (taken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        import_run(taken, tmp_path / "new")
    (taken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        import_run(taken, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        import_run(tmp_path, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["research", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return call


def test_commands_export_import_and_generate(tmp_path, tokenizer, command):
    run, hf, again = tmp_path / "run", tmp_path / "hf", tmp_path / "again"
    saved_run(run, tokenizer, small(vocab=280))
    assert command("export", run, "--hf", hf)[0] == 0
    code, out, _ = command("import", hf, "--out", again)
    assert code == 0
    assert "parameters" in out
    said = [command("generate", folder, "--prompt", "The quick", "--tokens", 8, "--temperature", 0) for folder in (run, again, again / "checkpoint")]
    assert said[0] == said[1] == said[2]
    assert said[0][0] == 0
    assert said[0][1].startswith("The quick")
    code, _, err = command("export", run, "--hf", hf)
    assert code == 1
    assert err == f"{hf}: is there already and not an empty folder; name another, or remove it\n"
    code, _, err = command("import", tmp_path / "nowhere", "--out", tmp_path / "x")
    assert code == 1
    assert "nowhere/config.json: cannot be read" in err
    for name in ("export", "import"):
        code, out, _ = command(name, "--help")
        assert code == 0
        assert f"python -m research {name}" in " ".join(out.split())


@pytest.mark.parametrize("sizes", [{"nope": 5}, {"latent": 9}])
def test_widths_that_transformers_cannot_run_are_not_exported(tmp_path, tokenizer, sizes):
    config = small(vocab=283, **sizes)
    saved_run(tmp_path / "run", tokenizer, config)
    with pytest.raises(RuntimeError), torch.no_grad():
        its_twin(random_model(config))(torch.zeros(1, 5, dtype=torch.long))  # the day it can, the refusal has lost its reason
    with pytest.raises(ConfigError, match="even widths"):
        export_run(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
