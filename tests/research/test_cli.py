"""`python -m research` as a person uses it: what it prints, its exit codes, and that the same seed gives the same text."""

import json
import subprocess
import sys

import pytest

from research.presets import PRESETS
from tests import doors


def call(*arguments, **environment):
    return doors.call("research", *arguments, OMP_NUM_THREADS="1", COLUMNS="200", **environment)


def test_the_door_itself():
    done = subprocess.run([sys.executable, "-m", "research", "describe", "deepseek-v3"], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert "did you mean 'deepseek-v2'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_describe_says_what_the_paper_says():
    done = call("describe", "deepseek-v2", "--kv-bits", "6", "--json")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said["kv_cache_elements_per_token"] == 34_560
    assert said["kv_cache_bytes_per_token"] == 25_920
    assert said["kv_cache_bytes_per_token_stored"] == 26_400
    assert round(said["total_parameters"] / 1e9, 3) == 235.741


def test_presets_are_listed():
    done = call("presets")
    assert done.returncode == 0
    assert all(name in done.stdout for name in PRESETS)


def test_sources_and_licences_are_listed():
    done = call("data", "list")
    assert done.returncode == 0
    for words in ("chinese-law", "BSD-3-Clause", "public domain", "sympy 1.14.0"):
        assert words in done.stdout
    assert set(json.loads(call("data", "list", "--json").stdout)) >= {"archives", "sources", "corpora"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["describe", "deepseek-v3"], 1, "did you mean 'deepseek-v2'?"),
        (["train", "deepseek-v2-nano", "--out", "x", "--set", "training.batch=3"], 1, "did you mean 'batch_size'?"),
        (["train", "deepseek-v2-nano", "--out", "/dev/null/x"], 1, "--out = '/dev/null/x': cannot be written to"),
        (["train", "nowhere.yaml", "--out", "x"], 1, "nowhere.yaml: cannot be read"),
        (["generate", "/nowhere", "--prompt", "a"], 1, "holds no checkpoint"),
        (["generate", "/nowhere", "--prompts", "/nowhere/prompts.txt"], 1, "--prompts = /nowhere/prompts.txt: cannot be read"),
        (["generate", "/nowhere", "--prompt", "a", "--kv-bits", "5"], 1, "--kv-bits = 5: no cache has this width; valid: 16, 8, 6, 4"),
        (["evaluate", "/nowhere"], 1, "holds no checkpoint"),
        (["data", "prepare", "poems"], 1, "no such corpus; valid: default"),
        (["train", "deepseek-v2-nano"], 2, "--out"),
        (["fly"], 2, "fly"),
    ],
)
def test_mistakes_are_named_with_the_right_code(tmp_path, arguments, code, said):
    done = call(*arguments, MOELAB_CACHE=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_train_resume_and_generate(tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("".join(f"the quick brown fox number {i * 7919 % 10007} jumps over {i * i % 97} lazy dogs\n" for i in range(2000)))
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{preset: deepseek-v2-nano, vocab_size: 270}}\n"
        f"data: {{corpus: files, paths: ['{text}'], tokenizer_vocab_size: 270, sequence_length: 32}}\n"
        "training: {train_tokens: 20480, batch_size: 8, validation_tokens: 1024, optimizer: {learning_rate: 0.003, warmup_steps: 5}}\n"
    )
    cache = str(tmp_path / "cache")
    # A mistake that is only found later takes no directory for good.
    wrong = call("train", run, "--out", tmp_path / "out", "--set", "data.paths=[/nowhere.txt]", MOELAB_CACHE=cache)
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (1, False), wrong.stderr
    done = call("train", run, "--out", tmp_path / "out", MOELAB_CACHE=cache)
    assert done.returncode == 0, done.stderr
    assert "finished after 80 steps, 20,480 tokens" in done.stdout
    assert "validation/bits_per_byte" in done.stdout
    first = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    again = call("train", run, "--out", tmp_path / "out", "--prompt", "the quick", "--json", MOELAB_CACHE=cache)
    assert again.returncode == 0, again.stderr
    assert "resumed after step 80 of 80" in again.stderr
    ended = json.loads(again.stdout)
    assert (ended["state"], ended["steps"], ended["tokens"], ended["warnings"]) == ("finished", 80, 20480, [])
    assert ended["samples"][0]["text"]
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == first
    other = call("train", run, "--out", tmp_path / "out", "--set", "seed=3", MOELAB_CACHE=cache)
    assert (other.returncode, other.stderr) == (
        1,
        f"{tmp_path / 'out'}: holds a run of another configuration; differing: seed: 0 -> 3; choose another --out, or remove it\n",
    )
    said = [call("generate", tmp_path / "out", "--prompt", "the quick", "--tokens", 20, "--seed", 3, MOELAB_CACHE=cache).stdout for _ in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("the quick")
    assert len(said[0]) > len("the quick\n")
