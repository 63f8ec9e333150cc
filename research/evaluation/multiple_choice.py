"""Multiple choice by likelihood: the choice that the model finds most likely behind the context."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from research.data.tokenizer import END_OF_TEXT
from research.evaluation.intervals import wilson_interval
from research.evaluation.likelihood import Request
from research.evaluation.tasks import Question

Scorer = Callable[[Sequence[Request]], list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """Shares of right answers by rule, each with its 95 % interval (Wilson, over items), beside what needs no model.

    `chance` is the expected share of a blind guess; `lines` are rules as blind.  `shortened`: items whose context
    lost its beginning, since the model takes so many tokens.
    """

    task: str
    items: int
    shortened: int
    accuracy: dict[str, float]
    interval_95: dict[str, tuple[float, float]]
    chance: float
    lines: dict[str, float]


def encode_question(tokenizer: Tokenizer, question: Question, longest: int) -> tuple[list[Request], bool]:
    """One request per choice, and whether the context was shortened.

    A choice may change how the end of the context is cut into tokens.  So context + choice is encoded as one text, as
    the model would have read it, and scored from behind the longest token prefix that all choices and the context
    have in common: then every choice of a question is given the same tokens, and none is paid less for characters
    of the context.  The end-of-text token stands before the text as in training, where the tokenizer has it.  Of a prefix
    the last tokens are kept, as many as leave room in `longest` tokens for the longest choice, and one at least.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    start = [] if end is None else [end]
    texts = [question.context, *(question.context + choice for choice in question.choices)]
    context, *whole = [start + tokenizer.encode(text).ids for text in texts]
    common = max(1, _common_prefix([context, *whole]))
    room = max(1, longest - max(len(ids) - common for ids in whole))
    cut = max(0, common - room)
    return [Request(tuple(ids[cut:]), common - cut) for ids in whole], cut > 0


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    length = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length


def score_questions(task: str, questions: Sequence[Question], tokenizer: Tokenizer, longest: int, score: Scorer) -> TaskScore:
    """Accuracy by summed log-likelihood (`sum`) and by that over the choice's bytes (`per_byte`).

    The lines are the shortest and the longest choice in bytes, which the two rules lean to; the position of a choice is
    no line, since the model never sees it.  Choices that tie share the credit.
    """
    requests, sizes, shortened = list[list[Request]](), list[list[int]](), 0
    for question in questions:
        rows, cut = encode_question(tokenizer, question, longest)
        requests.append(rows)
        sizes.append([max(1, len(choice.encode())) for choice in question.choices])
        shortened += cut
    flat = iter(score([request for rows in requests for request in rows]))
    values = [[next(flat) for _ in rows] for rows in requests]
    rules = {"sum": values, "per_byte": [[v / n for v, n in zip(*pair, strict=True)] for pair in zip(values, sizes, strict=True)]}
    blind = {"shortest choice": [[-float(n) for n in row] for row in sizes], "longest choice": [[float(n) for n in row] for row in sizes]}
    right = {name: sum(map(_credit, questions, rows)) for name, rows in rules.items()}
    n = len(questions)
    return TaskScore(
        task=task,
        items=n,
        shortened=shortened,
        accuracy={name: count / n for name, count in right.items()},
        interval_95={name: wilson_interval(count, n) for name, count in right.items()},
        chance=sum(1 / len(question.choices) for question in questions) / n,
        lines={name: sum(map(_credit, questions, rows)) / n for name, rows in blind.items()},
    )


def _credit(question: Question, values: Sequence[float]) -> float:
    best = [i for i, value in enumerate(values) if value == max(values)]
    return 1 / len(best) if question.answer in best else 0.0
