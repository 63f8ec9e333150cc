"""The n-gram overlap against sets of tuples, and `data describe` as a script and a person read it."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import call

from research.config import DataConfig
from research.data import overlap as module
from research.data.describe import heldout_overlap, summary
from research.data.overlap import overlap, words
from research.data.prepare import prepare

texts = st.lists(st.text("ab 法。\n", max_size=14), max_size=4)


def test_what_is_a_word():
    assert words("The cat's 2 法律、카페 x_1!ひらがな") == ["the", "cat", "s", "2", "法", "律", "카페", "x_1", "ひ", "ら", "が", "な"]
    assert words("İzmir") == ["i̇zmir"], "lower-casing moves no border of a word"


def grams(text, n):
    found = words(text)
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from("xy"), texts), st.dictionaries(st.sampled_from("pqr"), texts), st.integers(1, 4), st.integers(1, 20))
def test_it_is_what_sets_of_tuples_say(evaluated, training, n, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        found = overlap(evaluated, training, n)
    known = {domain: {gram for text in group for gram in grams(text, n)} for domain, group in training.items()}
    everything = set().union(*known.values())
    for domain, group in evaluated.items():
        each = [grams(text, n) for text in group]
        flat = [gram for part in each for gram in part]
        assert found[domain].ngrams == len(flat)
        assert found[domain].blocks == len(group)
        if not flat:
            assert (found[domain].share, found[domain].shares) == (None, {})
            continue
        assert found[domain].share == sum(gram in everything for gram in flat) / len(flat)
        assert found[domain].shares == {d: sum(gram in k for gram in flat) / len(flat) for d, k in known.items()}
        assert found[domain].heavy_blocks == sum(bool(part) and 2 * sum(g in everything for g in part) >= len(part) for part in each)
        runs = [run for part in each for run in "".join("1" if g in everything else "0" for g in part).split("0")]
        longest = max(map(len, runs))
        assert found[domain].longest_words == (longest + n - 1 if longest else 0)
        assert words(found[domain].longest) == [] if not longest else len(words(found[domain].longest)) == longest + n - 1


def test_the_longest_run_is_shown_as_it_stands():
    text = "Something new. It's a leak:  of\nten words, said Again. And new."
    (found,) = overlap({"en": [text]}, {"code": ["said it s A LEAK of ten words said again"]}, 3).values()
    assert (found.longest_words, found.longest) == (9, "It's a leak: of ten words, said Again")


def test_there_are_no_0_grams():
    with pytest.raises(ValueError, match="n=0"):
        overlap({}, {}, 0)


@pytest.fixture(scope="module")
def leaking(tmp_path_factory):
    """A corpus a part of which stands in it many times, each time beside other words."""
    folder = tmp_path_factory.mktemp("leaking")
    common = " ".join(f"common{i}" for i in range(20))
    documents = [" ".join(f"w{i}x{j}" for j in range(20)) + (f" {common}" if i % 2 else "") for i in range(400)]
    (folder / "[own].jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CACHE", str(folder / "cache"))
        config = DataConfig(corpus="files", paths=(str(folder / "[[]own].jsonl"),), tokenizer_vocab_size=300, sequence_length=16)
        yield prepare(config), config, folder


def test_the_blocks_of_a_shard_are_the_documents(leaking):
    data, _, folder = leaking
    both = [*data.blocks("train", "text"), *data.blocks("heldout", "text")]
    assert sorted(both) == sorted(json.loads(line)["text"] for line in (folder / "[own].jsonl").read_text().splitlines())
    sizes = data.manifest["domains"]["text"]
    assert sizes["documents"] == 400 == sizes["train_blocks"] + sizes["heldout_blocks"]
    assert sum(len(text.encode()) for text in data.blocks("train", "text")) == sizes["train_bytes"]


def test_a_leak_into_the_held_out_text_is_found(leaking):
    data, _, _ = leaking
    said = []
    found = heldout_overlap(data, 13, said.append)["text"]
    heldout = list(data.blocks("heldout", "text"))
    odd = sum("common" in text for text in heldout)
    assert 0 < odd < len(heldout)
    # 28 13-grams of 40 words of which the last 8 are common; 8 of 20 words, none of them common.
    assert found["share"] == 8 * odd / (28 * odd + 8 * (len(heldout) - odd)) == found["shares"]["text"]
    assert found["longest_words"] == 20
    assert found["longest"].startswith("common0 common1 ")
    assert len(said) == 1


def test_describe_says_it_to_a_script_and_to_a_person(leaking):
    data, config, folder = leaking
    paths = f"paths=[{json.dumps(config.paths[0])}]"
    arguments = ["data", "describe", "files", "--set", paths, "--set", "tokenizer_vocab_size=300", "--set", "sequence_length=16"]
    cache = str(folder / "cache")
    done = call(*arguments, "--ngram", 5, "--json", MOELAB_CACHE=cache)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("ngram") == 5
    assert said["domains"]["text"].pop("overlap") == heldout_overlap(data, 5, lambda line: None)["text"]
    assert said == summary(data, config)
    text = said["domains"]["text"]
    assert text["mixture_share"] == 1
    assert text["train_bytes_per_token"] == text["train_bytes"] / text["train_tokens"]
    assert text["sources"] == [{"name": config.paths[0], "from": config.paths[0], "licence": None, "about": "the user's own text"}]
    person = call(*arguments, MOELAB_CACHE=cache)
    assert person.returncode == 0, person.stderr
    for words_said in ("[[]own].jsonl", "not stated", "20 words", "a hash of its source", f"{text['train_tokens']:,} + {text['heldout_tokens']:,}"):
        assert words_said in person.stdout
    without = json.loads(call(*arguments, "--no-overlap", "--json", MOELAB_CACHE=cache).stdout)
    assert (without["ngram"], without["domains"]["text"]["overlap"]) == (None, None)
    prepared = call(*["data", "prepare", *arguments[2:]], "--json", MOELAB_CACHE=cache)
    assert json.loads(prepared.stdout) == summary(data, config)
    assert Path(said["directory"]) == data.directory
