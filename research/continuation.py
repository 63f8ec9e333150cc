"""A trained model goes on with texts: prompts in, words out as they come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from research.data.tokenizer import END_OF_TEXT
from research.errors import UserError
from research.exchange import run_tokenizer
from research.model.generation import generate
from research.training.checkpoint import load_model


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy.  kv_bits: width of the cache, None for the model's own precision."""

    tokens: int
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    kv_bits: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """What a model made of one prompt; `tokens` are the ids of `text`."""

    prompt: str
    text: str
    tokens: tuple[int, ...]


def gather_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of `file`, one on each line (empty lines are none).

    UserError for an empty prompt, a file that cannot be read or holds no prompt, and for no prompt at all.
    """
    prompts = list(given)
    if "" in prompts:
        raise UserError("--prompt = '': holds no text to go on from; valid is a text of at least one character")
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts = {file}: cannot be read as UTF-8 text ({error}); valid is a file with one prompt on each line") from error
        prompts += (found := [line for line in lines if line.strip()])
        if not found:
            raise UserError(f"--prompts = {file}: holds no prompt; valid is a file with one prompt on each line")
    if not prompts:
        raise UserError("--prompt: is missing; give a text to go on from, or a file of them with --prompts")
    return prompts


def go_on(run: Path, prompts: Sequence[str], sampling: Sampling, show: Callable[[str], None] = lambda text: None) -> list[Continuation]:
    """Continue all prompts in one batch, each to the end of its text or for `sampling.tokens` tokens; `show` gets the first one's
    text piece by piece, as it comes.

    CheckpointError for a directory without a model.
    """
    model, config = load_model(run)
    tokenizer = run_tokenizer(run, config)
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    end = tokenizer.token_to_id(END_OF_TEXT)
    show(prompts[0])
    steps = generate(
        model,
        [torch.tensor(ids) for ids in encoded],
        sampling.tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        bits=sampling.kv_bits,
        vocabulary=tokenizer.get_vocab_size(),
    )
    rows: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    shown = ""
    for new in steps:
        going -= {row for row in going if int(new[row]) == end}
        for row in going:
            rows[row].append(int(new[row]))
        text = tokenizer.decode(rows[0])
        # A character may be spread over several tokens: it is shown when it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            show(text[len(shown) :])
            shown = text
        if not going:
            break
    result = [_continuation(tokenizer, prompt, tuple(ids)) for prompt, ids in zip(prompts, rows, strict=True)]
    show(result[0].text[len(shown) :])
    return result


def _continuation(tokenizer: Tokenizer, prompt: str, ids: tuple[int, ...]) -> Continuation:
    return Continuation(prompt=prompt, text=tokenizer.decode(list(ids)), tokens=ids)
