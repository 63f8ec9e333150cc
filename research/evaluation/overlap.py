"""Did a model read the questions in training?  Runs of 13 words that an item shares with the training text.

13 words are the length that GPT-3's paper used (Brown et al. 2020, appendix C).
"""

import re
from collections.abc import Iterable, Sequence

from research.data import corpora
from research.evaluation.tasks import TASKS, Item, Question

WORDS = 13
_WORD = re.compile(r"\w+")


def overlapping(items: Sequence[Item], texts: Iterable[str]) -> list[int]:
    """Indices of the items whose question or right answer shares a run of WORDS words (or, if shorter, the whole) with one of `texts`.

    Letter case and what is between words do not count.
    """
    owners: dict[tuple[str, ...], set[int]] = {}
    lengths = set()
    for index, item in enumerate(items):
        words = _words(item.context + (item.choices[item.answer] if isinstance(item, Question) else ""))
        size = min(WORDS, len(words))
        lengths.add(size)
        for run in _runs(words, size):
            owners.setdefault(run, set()).add(index)
    found: set[int] = set()
    for text in texts:
        words = _words(text)
        for size in lengths - {0}:
            for run in _runs(words, size):
                if run in owners:
                    found |= owners[run]
    return sorted(found)


def shared_archives(task: str, corpus: str) -> list[str] | None:
    """Packages that a task and a training corpus are both read from; None for a corpus that is no list of packages."""
    if corpus not in corpora.SOURCES["corpora"]:
        return None
    return [archive.package for archive in corpora.archives_of(corpus) if archive.package == TASKS["tasks"][task]["archive"]]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: list[str], size: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(size)), strict=False)
