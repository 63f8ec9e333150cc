"""Which held-out text a run is evaluated on: its own corpus', or another's in the run's own tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from research.config import DataConfig, RunConfig
from research.configfile import nearest
from research.data import corpora
from research.data.prepare import PreparedData, prepare
from research.data.tokenizer import END_OF_TEXT
from research.errors import DataError, UserError
from research.exchange import IMPORTED, run_tokenizer

LONGEST_WINDOW = 2048
"""Of an imported run, which may say that it takes a hundred thousand positions."""


@dataclass(frozen=True)
class Reencoded(PreparedData):
    """A prepared corpus whose held-out texts are encoded by another tokenizer; it has no training text in these tokens."""

    held_out: dict[str, np.ndarray]
    sizes: np.ndarray

    @property
    def vocab_size(self) -> int:
        return len(self.sizes)

    def heldout_tokens(self, domain: str) -> np.ndarray:
        return self.held_out[domain]

    def token_bytes(self) -> np.ndarray:
        return self.sizes

    def train_tokens(self, domain: str) -> np.ndarray:
        raise DataError(f"the training text of {domain} was not encoded by the run's tokenizer")


def has_corpus(config: RunConfig) -> bool:
    """False for an imported run, whose training text is not at hand."""
    return config.data.corpus != IMPORTED


def evaluation_data(
    run: Path, config: RunConfig, corpus: str | None = None, announce: Callable[[str], None] = lambda line: None
) -> tuple[PreparedData, DataConfig]:
    """Held-out text for `run`, and how it is cut into windows: that of its own corpus, or of `corpus` in the run's tokens.

    UserError for a name that is no corpus, for an imported run without one, and for a tokenizer whose tokens are not bytes.
    """
    if corpus is None and not has_corpus(config):
        raise UserError(f"{run}: was imported and has no text of its own; name one to evaluate on: --corpus {' or '.join(_choices())}")
    if corpus is None or corpus == config.data.corpus:
        return prepare(config.data, announce), config.data
    if corpus not in _choices():
        raise UserError(f"--corpus = {corpus!r}: no such corpus{nearest(corpus, _choices())}")
    source = prepare(DataConfig(corpus=corpus, sequence_length=2), announce)
    length = config.data.sequence_length if has_corpus(config) else min(config.data.sequence_length, LONGEST_WINDOW)
    return reencode(source, run_tokenizer(run, config), config.model.vocab_size, length), replace(config.data, sequence_length=length)


def heldout_texts(data: PreparedData, domain: str) -> list[str]:
    """The held-out texts of a domain, read back from its tokens (a byte-level tokenizer loses nothing)."""
    return _decoded(data, data.heldout_tokens(domain))


def training_texts(data: PreparedData, domain: str) -> list[str]:
    return _decoded(data, data.train_tokens(domain))


def reencode(data: PreparedData, tokenizer: Tokenizer, vocabulary: int, sequence_length: int) -> Reencoded:
    """`data`'s held-out texts in the tokens of a byte-level `tokenizer`, each followed by its end-of-text token if it has that one.

    UserError when tokens do not spell the bytes of the text, or are beyond the model's `vocabulary`; DataError for too little text.
    """
    sizes, end = _token_bytes(tokenizer), tokenizer.token_to_id(END_OF_TEXT)
    found: dict[str, np.ndarray] = {}
    for domain in data.domains:
        texts = heldout_texts(data, domain)
        encoded = [np.array(e.ids, np.int64) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
        for text, ids in zip(texts, encoded, strict=True):
            if len(ids) and int(ids.max()) >= vocabulary:
                raise UserError(f"tokenizer.json of the run: has the token {int(ids.max())}, the model's vocabulary ends before {vocabulary}")
            if (spelled := int(sizes[ids].sum())) != len(text.encode()):
                raise UserError(
                    f"tokenizer.json of the run: its tokens spell {spelled} bytes of a text of {len(text.encode())}; "
                    "bits per byte need a byte-level tokenizer without normalisation"
                )
        after = [] if end is None else [np.array([end])]
        tokens = np.concatenate([part for ids in encoded for part in (ids, *after)])
        if len(tokens) <= sequence_length:
            raise DataError(f"the held-out text of domain {domain!r} has {len(tokens)} tokens, one window needs {sequence_length + 1}")
        found[domain] = tokens
    return Reencoded(data.directory, held_out=found, sizes=sizes)


def _token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int64: bytes of each token of a byte-level tokenizer, whose ids may have gaps; 0 for the end-of-text token."""
    vocabulary = tokenizer.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, index in vocabulary.items():
        sizes[index] = 0 if token == END_OF_TEXT else len(token)
    return sizes


def _choices() -> list[str]:
    return [name for name in corpora.corpus_names() if name != "files"]


def _decoded(data: PreparedData, tokens: np.ndarray) -> list[str]:
    tokens = np.asarray(tokens)
    tokenizer = data.tokenizer()
    texts = np.split(tokens, np.flatnonzero(tokens == tokenizer.token_to_id(END_OF_TEXT)) + 1)
    return tokenizer.decode_batch([ids[:-1].tolist() for ids in texts if len(ids)], skip_special_tokens=False)
