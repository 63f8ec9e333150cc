"""Tasks on a run: items fetched, shown to the model in its own tokens, scored, and looked for in its training text."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research.config import RunConfig
from research.data.prepare import prepare
from research.evaluation import overlap as overlaps
from research.evaluation.exact_match import greedy, score_problems
from research.evaluation.heldout import LONGEST_WINDOW, has_corpus, training_texts
from research.evaluation.likelihood import log_likelihoods
from research.evaluation.multiple_choice import TaskScore, score_questions
from research.evaluation.tasks import TASKS, Item, Problem, Question, load_task
from research.exchange import run_tokenizer
from research.model.transformer import Transformer


def run_tasks(run: Path, model: Transformer, config: RunConfig, names: Sequence[str], limit: int | None, *, overlap: bool) -> list[dict[str, Any]]:
    """A dict per task: the fields of its TaskScore, what it is, its licence, and `contamination`.

    A model is shown no more tokens than the sequences that it was trained on (an imported one: LONGEST_WINDOW at most).
    """
    tokenizer = run_tokenizer(run, config)
    longest = config.data.sequence_length if has_corpus(config) else min(config.data.sequence_length, LONGEST_WINDOW)
    found = []
    for name in names:
        items = load_task(name, limit, _say)
        questions = [item for item in items if isinstance(item, Question)]
        problems = [item for item in items if isinstance(item, Problem)]
        score: TaskScore
        if questions:
            score = score_questions(name, questions, tokenizer, longest, lambda requests: log_likelihoods(model, requests))
        else:
            score = score_problems(name, problems, greedy(model, tokenizer, longest))
        source = {key: TASKS["tasks"][name][key] for key in ("about", "licence")}
        found.append(dataclasses.asdict(score) | source | {"contamination": contamination(name, items, config, count=overlap)})
    return found


def contamination(task: str, items: Sequence[Item], config: RunConfig, *, count: bool) -> dict[str, Any]:
    """What is known of the task's items in the run's training text: `shared_archives` (None: unknown), `overlapping_items` (None: not
    counted), and a `verdict` in words."""
    shared = overlaps.shared_archives(task, config.data.corpus)
    said = "unknown: its text is not of known packages" if shared is None else ("from other packages" if not shared else f"shares {shared}")
    number = None
    if count and has_corpus(config):
        data = prepare(config.data, _say)
        number = len(overlaps.overlapping(items, (text for domain in data.domains for text in training_texts(data, domain))))
        said = f"{number} of {len(items)} items share {overlaps.WORDS} words in a row"
    return {"shared_archives": shared, "overlapping_items": number, "verdict": said}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
