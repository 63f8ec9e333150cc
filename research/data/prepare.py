"""From a DataConfig to token shards on disk, once: documents, blocks, held-out split, tokenizer, tokens.

Split: documents are cut into blocks at line ends, exact repeats are dropped, and a block is held out
when a hash of its source, document and text falls into the domain's share (10 % of Korean, of which
there is little, 4 % of the rest).  It depends on nothing else, so a text is on the same side of every
corpus that contains it.  Blocks are held out, not documents or works: the neighbours of a held-out block may be
training text, and so may a translation of it with the same code examples.  `python -m research data describe` says
how much of the held-out text occurs in training text.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer

from research.atomic import sync, write_text
from research.config import DataConfig
from research.data import corpora
from research.data.corpora import Document
from research.data.tokenizer import END_OF_TEXT, token_bytes, train_tokenizer
from research.errors import DataError
from research.folders import cache_directory

FORMAT = 1
BLOCK_CHARACTERS = 8000
HELD_OUT = {"ko": 0.10}
HELD_OUT_OTHERWISE = 0.04
TOKENIZER_MEGABYTES = 4.0


@dataclass(frozen=True)
class PreparedData:
    """A prepared corpus on disk; arrays are memory-mapped."""

    directory: Path

    @classmethod
    def open(cls, directory: Path) -> "PreparedData":
        if not (directory / "manifest.json").exists():
            raise DataError(f"{directory}: is no prepared corpus (no manifest.json)")
        return cls(directory)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Sources, sizes in documents, bytes and tokens per domain, split rule."""
        value: dict[str, Any] = json.loads((self.directory / "manifest.json").read_text(encoding="utf-8"))
        return value

    @property
    def data_id(self) -> str:
        return self.directory.name

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.manifest["domains"])

    @property
    def vocab_size(self) -> int:
        return int(self.manifest["vocab_size"])

    def blocks(self, part: Literal["train", "heldout"], domain: str) -> Iterator[str]:
        """The texts of a shard, in order, decoded a few at a time."""
        tokens, tokenizer = self._array(f"{part}-{domain}"), self.tokenizer()
        ends = np.flatnonzero(tokens == self.end_of_text) + 1
        starts = np.concatenate(([0], ends[:-1]))
        for first in range(0, len(ends), 256):
            some = zip(starts[first : first + 256], ends[first : first + 256], strict=True)
            yield from tokenizer.decode_batch([tokens[start:end].tolist() for start, end in some])

    @cached_property
    def end_of_text(self) -> int:
        """The token after each block."""
        token = self.tokenizer().token_to_id(END_OF_TEXT)
        if token is None:
            raise DataError(f"{self.directory}/tokenizer.json: has no token {END_OF_TEXT}")
        return int(token)

    def train_tokens(self, domain: str) -> np.ndarray:
        """uint16 or uint32 (tokens,), blocks separated by the end-of-text token."""
        return self._array(f"train-{domain}")

    def heldout_tokens(self, domain: str) -> np.ndarray:
        return self._array(f"heldout-{domain}")

    def token_bytes(self) -> np.ndarray:
        """int64 (vocabulary,): bytes of text that each token spells; 0 for the end-of-text token."""
        return self._array("token-bytes")

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    def _array(self, name: str) -> np.ndarray:
        cache: dict[str, np.ndarray] = self.__dict__.setdefault("_arrays", {})
        if name not in cache:
            path = self.directory / f"{name}.npy"
            try:
                cache[name] = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: is damaged ({error}); remove {self.directory} to prepare the corpus again") from error
        return cache[name]


def prepare(config: DataConfig, announce: Callable[[str], None] = lambda line: None) -> PreparedData:
    """The prepared corpus, made if it is not there yet; safe when several processes ask at once.

    DataError for text that will not do, or if it cannot be written; nothing is left half-written.
    """
    wanted = {
        "format": FORMAT,
        "documents": corpora.identity(config),
        "tokenizer_vocab_size": config.tokenizer_vocab_size,
        "max_train_megabytes": config.max_train_megabytes,
    }
    data_id = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_directory() / "prepared" / data_id
    if not (folder / "manifest.json").exists():
        with _written_to(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not (folder / "manifest.json").exists():
                    _write(config, folder, announce)
    data = PreparedData.open(folder)
    _check_lengths(data, config)
    return data


def split(documents: Iterable[Document], max_megabytes: float | None) -> dict[str, tuple[list[str], list[str]]]:
    """Training and held-out blocks by domain, in document order."""
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    total = sum(len(d.text.encode()) for ds in by_domain.values() for d in ds)
    keep = min(1.0, max_megabytes * 1e6 / total) if max_megabytes and total else 1.0
    return {domain: _split_domain(domain, docs, keep) for domain, docs in sorted(by_domain.items())}


def _split_domain(domain: str, documents: list[Document], keep: float) -> tuple[list[str], list[str]]:
    size = sum(len(d.text) for d in documents)
    length = min(BLOCK_CHARACTERS, max(200, size // 100))
    share = HELD_OUT.get(domain, HELD_OUT_OTHERWISE)
    seen: set[bytes] = set()
    blocks: list[tuple[float, str]] = []
    for document in documents:
        for text in _blocks(document.text, length):
            digest = hashlib.sha1(text.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            place = hashlib.sha1(f"{document.name}|{text}".encode()).digest()
            if int.from_bytes(place[4:8], "big") / 2**32 < keep:
                blocks.append((int.from_bytes(place[:4], "big") / 2**32, text))
    if len(blocks) > 1 and not any(p < share for p, _ in blocks):
        share = min(p for p, _ in blocks) + 1e-12
    return [t for p, t in blocks if p >= share], [t for p, t in blocks if p < share]


def _blocks(text: str, length: int) -> Iterable[str]:
    block = ""
    for line in text.splitlines(keepends=True):
        pieces = [line[i : i + length] for i in range(0, len(line), length)]
        for piece in pieces:
            if block and len(block) + len(piece) > length:
                yield block
                block = ""
            block += piece
    if block.strip():
        yield block


@contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        there = next(p for p in folder.parents if p.exists())
        free = shutil.disk_usage(there).free / 1e6
        raise DataError(f"{folder}: cannot be written ({error.strerror or error}); {free:,.0f} MB are free in {there}") from error


def _write(config: DataConfig, folder: Path, announce: Callable[[str], None]) -> None:
    announce(f"preparing corpus {config.corpus!r}: reading")
    documents = corpora.documents(config, announce)
    parts = split(documents, config.max_train_megabytes)
    if not any(train for train, _ in parts.values()):
        raise DataError(f"corpus {config.corpus!r}: holds no text to train on")
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        _fill(new, config, parts, Counter(d.domain for d in documents), announce)
        for path in [*new.iterdir(), new]:
            sync(path)
        new.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _fill(
    new: Path,
    config: DataConfig,
    parts: Mapping[str, tuple[list[str], list[str]]],
    documents: Mapping[str, int],
    announce: Callable[[str], None],
) -> None:
    announce(f"training a byte-level BPE tokenizer of {config.tokenizer_vocab_size} tokens")
    tokenizer = train_tokenizer({d: train for d, (train, _) in parts.items()}, config.tokenizer_vocab_size, TOKENIZER_MEGABYTES)
    tokenizer.save(str(new / "tokenizer.json"))
    np.save(new / "token-bytes.npy", token_bytes(tokenizer))
    domains = {}
    for domain, (train, heldout) in parts.items():
        announce(f"encoding {domain}: {sum(len(t) for t in train) / 1e6:.1f} M characters")
        sizes: dict[str, int] = {"documents": documents[domain]}
        for name, blocks in (("train", train), ("heldout", heldout)):
            tokens = _encode(tokenizer, blocks)
            np.save(new / f"{name}-{domain}.npy", tokens)
            sizes |= {f"{name}_bytes": sum(len(t.encode()) for t in blocks), f"{name}_tokens": int(tokens.size), f"{name}_blocks": len(blocks)}
        domains[domain] = sizes
    manifest = {
        "format": FORMAT,
        "config": asdict(config),
        "identity": corpora.identity(config),
        "vocab_size": tokenizer.get_vocab_size(),
        "domains": domains,
        "split": " ".join((__doc__ or "").split("Split: ")[1].split()),
    }
    write_text(new / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))


def _encode(tokenizer: Tokenizer, blocks: list[str]) -> np.ndarray:
    # A text that spells the special token out is text: it ends nothing.
    tokenizer.encode_special_tokens = True
    kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    rows = [np.array(e.ids + end, kind) for e in tokenizer.encode_batch(blocks, add_special_tokens=False)]
    return np.concatenate(rows) if rows else np.zeros(0, kind)


def _check_lengths(data: PreparedData, config: DataConfig) -> None:
    need = config.sequence_length + 1
    for domain in data.domains:
        for part, tokens in (("training", data.train_tokens(domain)), ("held-out", data.heldout_tokens(domain))):
            if len(tokens) < need:
                raise DataError(
                    f"corpus {config.corpus!r}: the {part} text of domain {domain!r} has {len(tokens)} tokens, "
                    f"one sequence of data.sequence_length = {config.sequence_length} needs {need}: "
                    "give more text (exact repeats are dropped) or shorter sequences"
                )
    unknown = sorted(set(config.mixture) - set(data.domains))
    if unknown:
        raise DataError(f"data.mixture: no domain {', '.join(unknown)} in corpus {config.corpus!r}; valid: {', '.join(data.domains)}")
