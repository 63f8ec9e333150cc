"""Archives made here and fetched by the real pip, readers, the split, the tokenizer, and a user's own files."""

import hashlib
import io
import json
import multiprocessing
import sqlite3
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.config import DataConfig
from research.data import corpora, prepare
from research.data.archives import Archive, fetch, members
from research.data.corpora import Document, documents
from research.data.tokenizer import END_OF_TEXT, token_bytes, train_tokenizer
from research.errors import DataError

PYTHON_SOURCE = '''"""A module.

{prose}
"""

def f(x):
    """Short."""
    return x + 1
'''.format(prose="It does what it says, at some length. " * 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(folder, files, name="tinytext", version="1.0"):
    """A wheel that pip accepts, with `files` (name: bytes) in it."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in files.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def archive_of(path, name="tinytext", version="1.0"):
    return Archive(package=name, version=version, file=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), megabytes=0.1)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """pip looks into one folder and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_an_archive_is_fetched_checked_and_fetched_once(offline, cache):
    made = write_wheel(offline, {"tinytext/a.txt": b"hello", "tinytext/b.py": b"x = 1"})
    archive, said = archive_of(made), []
    path = fetch([archive], said.append)["tinytext"]
    assert path.read_bytes() == made.read_bytes()
    assert dict(members(path, ["tinytext/*.txt"], [])) == {"tinytext/a.txt": b"hello"}
    made.unlink()
    assert fetch([archive], said.append)["tinytext"] == path
    assert len(said) == 1, "what is there is not fetched again"
    path.write_bytes(b"changed")
    with pytest.raises(DataError, match=rf"{path}: SHA-256 is .* expected {archive.sha256}"):
        fetch([archive], said.append)


def test_another_hash_is_refused_and_nothing_is_left(offline, cache):
    archive = archive_of(write_wheel(offline, {"tinytext/a.txt": b"hello"}))
    write_wheel(offline, {"tinytext/a.txt": b"something else"})
    with pytest.raises(DataError, match=r"could not be fetched.*put the file"):
        fetch([archive], lambda line: None)
    assert not list((cache / "archives").glob("*.whl"))


def test_an_archive_that_is_nowhere_is_named_with_a_remedy(offline, cache):
    missing = Archive(package="tinytext", version="9", file="tinytext-9-py3-none-any.whl", sha256="0" * 64, megabytes=1)
    with pytest.raises(DataError) as caught:
        fetch([missing], lambda line: None)
    assert "tinytext-9-py3-none-any.whl" in str(caught.value)
    assert str(cache / "archives") in str(caught.value)
    assert "Exception:" not in str(caught.value)


def test_a_source_archive_is_read_without_its_top_folder(tmp_path):
    path = tmp_path / "thing-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in ("docs/zh/a.md", "docs/b.md", "setup.py"):
            content = name.encode()
            member = tarfile.TarInfo(f"thing-1/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert [name for name, _ in members(path, ["docs/*.md"], ["docs/zh/*"])] == ["docs/b.md"]


def read(reader, content, source=None):
    return list(corpora.READERS[reader]("m", content, source))


def test_code_and_its_long_docstrings_are_told_apart():
    code, prose = read("python", PYTHON_SOURCE.encode())[0][1], read("docstrings", PYTHON_SOURCE.encode())[0][1]
    assert "return x + 1" in code
    assert '"""Short."""' in code
    assert "It does what it says" not in code
    assert "It does what it says" in prose
    assert "Short." not in prose
    assert read("docstrings", b"def broken(:") == []


def test_the_other_readers(tmp_path):
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table t (law text, body text)")
        connection.executemany("insert into t values (?, ?)", [("one", "a"), ("one", "b"), ("two", "c")])
    connection.close()
    assert read("sqlite", path.read_bytes(), {"query": "select law, body from t"}) == [("one", "a\nb"), ("two", "c")]
    assert read("json_texts", json.dumps([{"q": "why", "n": 3, "steps": ["so", {"x": "then"}]}]).encode(), {}) == [("m#0", "why\nso\nthen")]
    problems = {"notes": ["no"], "items": {"a": {"text": "why", "chat": {"said": "no"}, "steps": [{"text": "so", "id": "no"}]}}}
    only = {"within": "items", "keys": ["text"]}
    assert read("json_texts", json.dumps(problems).encode(), only) == [("m#0", "why\nso")]
    assert read("csv", "id,word\n1,成语\n2,故事\n".encode())[0][1] == "成语\n\n故事"
    assert read("text", b"a\r\nb")[0][1] == "a\nb"


def test_every_source_says_its_licence_and_lies_in_a_pinned_archive():
    for name, source in corpora.SOURCES["sources"].items():
        assert source["licence"], name
        assert source["about"], name
        assert len(corpora.SOURCES["archives"][source["archive"]]["sha256"]) == 64
    for corpus in ("quickstart", "default"):
        domains = {corpora.SOURCES["sources"][name]["domain"] for name in corpora.SOURCES["corpora"][corpus]}
        assert domains == {"en", "zh", "ko", "code", "math"}


def test_the_split_separates_and_depends_on_the_text_alone():
    texts = [Document("en", f"d{i}", f"document {i}\n" + f"line of text number {i}\n" * 400) for i in range(60)]
    train, heldout = prepare.split(texts, None)["en"]
    assert train
    assert heldout
    assert not set(train) & set(heldout)
    again_train, again_heldout = prepare.split(list(reversed(texts)), None)["en"]
    assert set(again_heldout) == set(heldout)
    assert set(again_train) == set(train)
    smaller_train, smaller_heldout = prepare.split(texts, 0.2)["en"]
    assert set(smaller_train) < set(train)
    assert set(smaller_heldout) <= set(heldout)
    twice_train, twice_heldout = prepare.split([*texts, *texts], None)["en"]
    assert len(twice_train) + len(twice_heldout) == len(train) + len(heldout), "exact repeats are dropped"


@pytest.fixture(scope="module")
def tokenizer():
    text = [PYTHON_SOURCE, "臣本布衣，躬耕于南阳。" * 30, "모델을 훈련합니다. " * 30, "The quick brown fox. " * 30]
    return train_tokenizer({"en": text}, 400, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_every_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert int(token_bytes(tokenizer)[ids].sum()) == len(text.encode())


def test_the_special_token_spells_nothing(tokenizer):
    assert token_bytes(tokenizer)[tokenizer.token_to_id(END_OF_TEXT)] == 0


def lines(words):
    return "".join(f"{words} of line {i}\n" for i in range(300))


def own(tmp_path, name="*", **changes):
    settings = {"tokenizer_vocab_size": 280, "sequence_length": 16, **changes}
    return DataConfig(corpus="files", paths=(str(tmp_path / name),), **settings)


def test_a_users_own_text_jsonl_and_parquet(tmp_path):
    (tmp_path / "a.txt").write_text("plain text\n" * 100)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(50)))
    pq.write_table(pa.table({"body": ["parquet text " * 20, None]}), tmp_path / "c.parquet")
    found = documents(own(tmp_path, "[abc].*", text_field="body"), lambda line: None)
    assert len(found) == 1 + 50 + 1
    data = prepare.prepare(own(tmp_path, "[abc].*", text_field="body"))
    assert data.domains == ("text",)
    whole = data.tokenizer().decode(data.train_tokens("text").tolist(), skip_special_tokens=True)
    assert "plain text" in whole


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing.txt", None, ["matches no file"]),
        ("a.txt", b"   \n", ["holds no text"]),
        ("a.txt", b"\xff\xfe\x00bad", ["no UTF-8 text (byte 0)"]),
        ("a.txt", b"a\x00b", ["NUL"]),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', ["a.jsonl:2", "no JSON"]),
        ("a.jsonl", b'{"body": "x"}\n', ["data.text_field = 'text'", "body"]),
        ("a.parquet", b"no parquet", ["no Parquet file"]),
        ("a.txt", b"short", ["sequence_length = 16"]),
    ],
)
def test_files_that_will_not_do_are_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare.prepare(own(tmp_path, name))
    assert all(word in str(caught.value) for word in [*words, name.removesuffix("short") if content != b"short" else "files"])
    assert not list((tmp_path / "cache").glob("prepared/*.new/manifest.json")), "nothing half-written is taken for whole"


def test_a_mixture_of_a_domain_that_is_not_there(tmp_path):
    (tmp_path / "a.txt").write_text(lines("some text"))
    with pytest.raises(DataError, match=r"no domain zh in corpus 'files'; valid: text"):
        prepare.prepare(own(tmp_path, "a.txt", mixture={"zh": 1.0}))


def _prepare(config, path, results):
    lines = []
    data = prepare.prepare(config, lines.append)
    results.put((str(data.directory), len(lines)))


def test_two_processes_at_once_prepare_it_once(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a text\n" for i in range(5000)))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_prepare, args=(own(tmp_path, "a.txt"), tmp_path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert len({directory for directory, _ in found}) == 1
    assert sorted(lines > 0 for _, lines in found) == [False, True], "one made it, the other waited"


def test_changed_text_is_another_corpus(tmp_path):
    (tmp_path / "a.txt").write_text(lines("some text"))
    first = prepare.prepare(own(tmp_path, "a.txt"))
    (tmp_path / "a.txt").write_text(lines("another text"))
    second = prepare.prepare(own(tmp_path, "a.txt"))
    assert first.data_id != second.data_id
    assert np.asarray(first.train_tokens("text")).size
