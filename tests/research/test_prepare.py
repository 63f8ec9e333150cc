"""A preparation is whole or absent: killed, out of disk, on a cache that is no folder; and what text may look like."""

import errno
import json
import multiprocessing
import os
import resource
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import call

from research.config import DataConfig
from research.data import prepare
from research.data.corpora import documents
from research.data.tokenizer import END_OF_TEXT
from research.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def own(folder, name, **changes):
    return DataConfig(corpus="files", paths=(str(folder / name),), **{"tokenizer_vocab_size": 280, "sequence_length": 16, **changes})


def some_text(folder, name="a.txt"):
    (folder / name).write_text("".join(f"line {i * 7919 % 10007} of a text\n" for i in range(4000)))


def silent(line):
    pass


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _killed(config, at):
    """Prepares, and dies by SIGKILL when the shard number `at` is to be encoded."""
    left, encode = [at], prepare._encode

    def dying(*arguments):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return encode(*arguments)

    prepare._encode = dying
    prepare.prepare(config)


@pytest.mark.parametrize("at", [0, 1])
def test_a_killed_preparation_is_made_again_as_if_it_had_not_been(tmp_path, cache, monkeypatch, at):
    some_text(tmp_path)
    config = own(tmp_path, "a.txt")
    child = multiprocessing.get_context("spawn").Process(target=_killed, args=(config, at))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert list((cache / "prepared").glob("*.new")), "it was killed in the middle"
    assert not list((cache / "prepared").glob("*/manifest.json"))
    again = prepare.prepare(config).directory
    assert sorted(p.name for p in (cache / "prepared").iterdir()) == [again.name, f"{again.name}.lock"]
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "other"))
    assert contents(again) == contents(prepare.prepare(config).directory)


def _limited(config, size, results):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        prepare.prepare(config)
    except DataError as error:
        results.put(error.problems)


def test_a_file_that_cannot_grow_is_one_error_and_leaves_nothing(tmp_path, cache):
    """By a limit of the operating system on the size of files, as a full disk would stop a write in its middle."""
    some_text(tmp_path)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=_limited, args=(own(tmp_path, "a.txt"), 30_000, results))
    child.start()
    (problem,) = results.get(timeout=60)
    child.join(30)
    assert str(cache / "prepared") in problem
    assert "cannot be written" in problem
    assert "MB are free" in problem
    assert [path.suffix for path in (cache / "prepared").iterdir()] == [".lock"]


def test_a_full_disk_leaves_what_was_there(tmp_path, cache, monkeypatch):
    some_text(tmp_path)
    whole = prepare.prepare(own(tmp_path, "a.txt")).directory
    before = contents(whole)
    save = np.save

    def full(path, array):
        save(path, array[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\); [\d,]+ MB are free"):
        prepare.prepare(own(tmp_path, "a.txt", tokenizer_vocab_size=290))
    assert contents(whole) == before
    assert [p.name for p in (cache / "prepared").iterdir() if p.is_dir()] == [whole.name]


def test_a_cache_that_is_no_folder(tmp_path, monkeypatch):
    some_text(tmp_path)
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"a\.txt/prepared/.*cannot be written"):
        prepare.prepare(own(tmp_path, "a.txt"))


def test_a_damaged_shard_is_named_with_a_remedy(tmp_path):
    some_text(tmp_path)
    config = own(tmp_path, "a.txt")
    shard = prepare.prepare(config).directory / "train-text.npy"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match=rf"{shard}: is damaged .*; remove {shard.parent} to prepare"):
        prepare.prepare(config)


def test_a_sequence_longer_than_the_shard_leaves_the_corpus(tmp_path, cache):
    some_text(tmp_path)
    directory = prepare.prepare(own(tmp_path, "a.txt")).directory
    before = contents(directory)
    with pytest.raises(DataError, match=r"sequence_length = 1000000 needs 1000001"):
        prepare.prepare(own(tmp_path, "a.txt", sequence_length=1_000_000))
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("*.md", None, "'*.md' matches no file"),
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\x00", "a.txt: is no UTF-8 text (byte 0)"),
        ("a.txt", b"PK\x03\x04\x00\x00", "a.txt: is no text (holds NUL bytes)"),
        ("a.txt", "caf\xe9".encode("latin-1"), "a.txt: is no UTF-8 text (byte 3)"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl:1: has no text under data.text_field = 'text'; found: body"),
        ("a.txt", b"a few words\n" * 3, "needs 257"),
        (".", b"", "is a folder; its files are"),
    ],
)
def test_the_command_says_one_sentence_and_fails(tmp_path, cache, name, content, said):
    if content is not None and name != ".":
        (tmp_path / name).write_bytes(content)
    done = call("data", "prepare", "files", "--set", f"paths=['{tmp_path}/{name}']")
    assert done.returncode == 1
    assert said in done.stderr.replace(f"{tmp_path}/", "")
    assert done.stderr.count("\n") == 1
    assert not list(cache.glob("prepared/*.new"))


def test_a_file_that_cannot_be_read(tmp_path):
    if not os.path.exists("/proc/self/mem"):
        pytest.skip("needs a file that is there and cannot be read, even by root")
    with pytest.raises(DataError, match=r"/proc/self/mem: cannot be read \("):
        prepare.prepare(DataConfig(corpus="files", paths=("/proc/self/mem",)))


def test_lines_of_json_end_at_newlines_alone(tmp_path):
    odd = ["a\u2028b", "c\x85d", "e\u2029f"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in odd)
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + lines).encode())
    assert [d.text for d in documents(own(tmp_path, "a.jsonl"), silent)] == odd


def test_a_column_of_numbers_is_no_text(tmp_path):
    pq.write_table(pa.table({"text": [1, 2], "body": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: data\.text_field = 'text' is a column of int64, not of strings"):
        documents(own(tmp_path, "a.parquet"), silent)
    assert [d.text for d in documents(own(tmp_path, "a.parquet", text_field="body"), silent)] == ["x"]
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert [d.text for d in documents(own(tmp_path, "a.parquet"), silent)] == ["x", "y", "x"]


def test_text_that_spells_the_special_token_ends_no_document(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} ends with {END_OF_TEXT} it says, and goes on {i * i}"}) + "\n" for i in range(200))
    )
    data = prepare.prepare(own(tmp_path, "a.jsonl"))
    sizes = data.manifest["domains"]["text"]
    assert int((data.train_tokens("text") == data.end_of_text).sum()) == sizes["train_blocks"]
    assert int(data.token_bytes()[data.train_tokens("text")].sum()) == sizes["train_bytes"]
    assert all(END_OF_TEXT in text for text in data.blocks("train", "text"))
