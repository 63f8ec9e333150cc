"""How much of a text occurs in another: the n-gram overlap between held-out (or any evaluation) and training text.

Words are compared in runs of 13, lower-cased and without punctuation, as GPT-3 was checked (Brown et al. 2020,
appendix C).  A word is a run of letters, digits and underscores; each Han character and kana is a word of its
own, as Chinese and Japanese do not write the spaces between words.  Thirteen of those are a clause and not a
sentence, so the share in Chinese is an upper bound beside the others.  An overlap is not always a leak: licence
headers, set phrases of statutes and generated mathematics repeat themselves wherever they are cut.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NGRAM = 13
HEAVY = 0.5
"""A block with at least this share of its n-grams in the training text counts as heavily overlapping."""
_ALONE = r"\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_CHUNK = 1_000_000
"""Words that are looked up at once: bounds the memory, whatever the training text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Of the texts of one domain, by n-grams with repeats.

    `share` is None where there are no n-grams, since no text has n words.  `shares` says how much each training domain
    has by itself; as several can have the same n-gram they may add up to more than `share`.
    """

    ngrams: int
    share: float | None
    shares: dict[str, float]
    blocks: int
    heavy_blocks: int
    longest_words: int
    """The longest run of words in one text whose n-grams all occur in training text."""
    longest: str
    """Where that run begins, as it stands in the text."""


def words(text: str) -> list[str]:
    """What is compared: `words("The cat's 2 法律") == ["the", "cat", "s", "2", "法", "律"]`."""
    return [word.lower() for word in _WORD.findall(text)]


def overlap(
    evaluated: Mapping[str, Sequence[str]],
    training: Mapping[str, Iterable[str]],
    n: int = NGRAM,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Overlap]:
    """Texts by domain against training texts by domain; n-grams do not cross texts.

    The training texts are read once, in pieces, so that memory holds the evaluated ones only.  N-grams are compared
    by 64-bit hashes.  ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be >= 1")
    vocabulary: dict[str, int] = {}
    rows = {domain: [_numbers(text, vocabulary) for text in texts] for domain, texts in evaluated.items()}
    hashes = {domain: [_hashes(row, n) for row in found] for domain, found in rows.items()}
    wanted = np.unique(np.concatenate([h for found in hashes.values() for h in found] or [np.zeros(0, np.uint64)]))
    seen = {}
    for domain, texts in training.items():
        announce(f"looking for {len(wanted):,} {n}-grams in the training text of {domain}")
        seen[domain] = _seen(wanted, texts, vocabulary, n)
    return {domain: _score(evaluated[domain], found, wanted, seen, n) for domain, found in hashes.items()}


def _numbers(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    """Words as numbers from 1, new ones added to the vocabulary."""
    return np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words(text)], np.uint64)


def _hashes(numbers: np.ndarray, n: int) -> np.ndarray:
    """uint64 (max(words - n + 1, 0),): each run of n numbers as a polynomial of mixed numbers, modulo 2^64."""
    mixed = _mix(numbers)
    count = max(len(numbers) - n + 1, 0)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total = total * np.uint64(0x9E3779B97F4A7C15) + mixed[offset : offset + count]
    return total


def _mix(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele et al. 2014): small numbers spread over 64 bits."""
    z = numbers * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _seen(wanted: np.ndarray, texts: Iterable[str], vocabulary: Mapping[str, int], n: int) -> np.ndarray:
    """bool (wanted,): which of the sorted hashes occur in the texts."""
    found = np.zeros(len(wanted), bool)
    if not len(wanted):
        return found
    for numbers in _chunks(texts, vocabulary):
        hashes = _hashes(numbers, n)
        place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
        found[place[wanted[place] == hashes]] = True
    return found


def _chunks(texts: Iterable[str], vocabulary: Mapping[str, int]) -> Iterator[np.ndarray]:
    """Whole texts, each followed by a 0.  0 also stands for words that no evaluated text has: nothing with one is found."""
    gathered: list[int] = []
    for text in texts:
        gathered += [vocabulary.get(word, 0) for word in words(text)]
        gathered.append(0)
        if len(gathered) >= _CHUNK:
            yield np.array(gathered, np.uint64)
            gathered = []
    yield np.array(gathered, np.uint64)


def _score(texts: Sequence[str], hashes: list[np.ndarray], wanted: np.ndarray, seen: Mapping[str, np.ndarray], n: int) -> Overlap:
    places = [np.searchsorted(wanted, h) for h in hashes]
    anywhere = np.any(list(seen.values()), 0) if seen else np.zeros(len(wanted), bool)
    hits = [anywhere[p] for p in places]
    total = sum(map(len, places))
    runs = [_longest_run(h) for h in hits]
    best = max(range(len(runs)), key=lambda i: runs[i][1], default=0)
    start, length = runs[best] if runs else (0, 0)
    return Overlap(
        ngrams=total,
        share=sum(int(h.sum()) for h in hits) / total if total else None,
        shares={domain: sum(int(s[p].sum()) for p in places) / total for domain, s in seen.items()} if total else {},
        blocks=len(texts),
        heavy_blocks=sum(bool(len(h) and h.mean() >= HEAVY) for h in hits),
        longest_words=length + n - 1 if length else 0,
        longest=_excerpt(texts[best], start, length + n - 1) if length else "",
    )


def _longest_run(hits: np.ndarray) -> tuple[int, int]:
    """(start, length) of the first longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], hits, [False])).astype(np.int8)))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    if not len(starts):
        return 0, 0
    best = int(np.argmax(lengths))
    return int(starts[best]), int(lengths[best])


def _excerpt(text: str, start: int, count: int, most: int = 80) -> str:
    """The text from word `start` on, `count` words and `most` characters at the most, on one line."""
    found = list(_WORD.finditer(text))[start : start + count]
    return " ".join(text[found[0].start() : found[-1].end()].split())[:most]
