"""Exact match: the model goes on greedily, and the number that it ends on is the right one or not."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from tokenizers import Tokenizer

from research.data.tokenizer import END_OF_TEXT
from research.evaluation.intervals import wilson_interval
from research.evaluation.multiple_choice import TaskScore
from research.evaluation.tasks import Problem
from research.model.generation import generate
from research.model.transformer import Transformer

NEW_TOKENS = 256
"""Of one answer; a worked solution of a school problem takes about half of it."""
ROWS = 16
_MARKED = re.compile(r"####\s*(-?\d[\d,]*(?:\.\d+)?)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said; `shortened` when it was not shown the beginning of the prompt."""

    text: str
    shortened: bool = False


Continue = Callable[[Sequence[str]], list[Answer]]


def final_number(text: str) -> Fraction | None:
    """The number behind the first `####` (GSM8K's mark), else the last number before another question; None without one."""
    text = text.split("\nQuestion:", maxsplit=1)[0]
    found = _MARKED.findall(text)[:1] or _NUMBER.findall(text)[-1:]
    return Fraction(found[0].replace(",", "")) if found else None


def score_problems(task: str, problems: Sequence[Problem], continue_: Continue) -> TaskScore:
    """Share of problems whose continuation ends on the right number.

    Chance is the share of the most frequent answer: the best that saying one and the same number can do, chosen in
    knowledge of this very set, hence a little high.
    """
    answers = continue_([problem.context for problem in problems])
    wanted = [final_number(problem.answer) for problem in problems]
    right = sum(final_number(said.text) == number for said, number in zip(answers, wanted, strict=True))
    n = len(problems)
    return TaskScore(
        task=task,
        items=n,
        shortened=sum(said.shortened for said in answers),
        accuracy={"exact_match": right / n},
        interval_95={"exact_match": wilson_interval(right, n)},
        chance=Counter(wanted).most_common(1)[0][1] / n,
        lines={},
    )


def greedy(model: Transformer, tokenizer: Tokenizer, longest: int, new_tokens: int = NEW_TOKENS) -> Continue:
    """Continuations of `new_tokens` tokens at most, each up to the end of its text, ROWS prompts at a time.

    Of a prompt the last tokens are given, as many as leave room in `longest` for the answer, but half of `longest` at least;
    the answer then gets what is left.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    answer = max(1, min(new_tokens, longest // 2))
    start = [] if end is None else [end]

    def go_on(prompts: Sequence[str]) -> list[Answer]:
        said = []
        for first in range(0, len(prompts), ROWS):
            whole = [start + tokenizer.encode(prompt).ids for prompt in prompts[first : first + ROWS]]
            texts = _batch(model, tokenizer, [ids[-(longest - answer) :] for ids in whole], answer, end)
            said += [Answer(text, len(ids) > longest - answer) for text, ids in zip(texts, whole, strict=True)]
        return said

    return go_on


def _batch(model: Transformer, tokenizer: Tokenizer, rows: list[list[int]], new_tokens: int, end: int | None) -> list[str]:
    found: list[list[int]] = [[] for _ in rows]
    going = set(range(len(rows)))
    for new in generate(model, [torch.tensor(ids) for ids in rows], new_tokens, vocabulary=tokenizer.get_vocab_size()):
        going -= {row for row in going if int(new[row]) == end}
        for row in going:
            found[row].append(int(new[row]))
        if not going:
            break
    return tokenizer.decode_batch(found)
