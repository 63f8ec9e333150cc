"""Requests: how long their prompts and answers are, and when they come."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from research.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of prompts and answers.

    `fixed`: all alike.  `log-normal`: means `prompt` and `output` with these standard deviations of the logarithm, drawn
    independently, cut at `maximum`.  `file`: rows of a CSV file with the columns prompt and output, in the order of the file,
    from the start again when there are not enough.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    kind: Literal["fixed", "log-normal", "file"] = "log-normal"
    prompt: float = 1024
    output: float = 512
    prompt_sigma: float = 1.0
    output_sigma: float = 1.0
    maximum: int = 4096
    """Longest prompt, and longest answer, of the log-normal distribution."""
    path: str | None = None
    """Of the CSV file."""

    def __post_init__(self) -> None:
        for name in ("prompt", "output"):
            if not 1 <= getattr(self, name) <= 10**7:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 1..10000000 tokens")
        for name in ("prompt_sigma", "output_sigma"):
            if not 0 <= getattr(self, name) <= 3:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0..3 (standard deviation of the logarithm)")
        if self.maximum < 1:
            raise ValueError(f"maximum={self.maximum} must be >= 1")
        if self.kind == "log-normal" and max(self.prompt, self.output) > self.maximum:
            raise ValueError(f"maximum={self.maximum} must be >= the mean prompt={self.prompt} and the mean output={self.output}")
        if (self.kind == "file") != (self.path is not None):
            raise ValueError(f"path={self.path!r} with kind={self.kind!r}: a path goes with kind 'file', and only with it")


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """int64 (N,) prompt and output tokens, float64 (N,) seconds of arrival, ascending."""

    prompt: np.ndarray
    output: np.ndarray
    arrival: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)


def draw_requests(lengths: Lengths, count: int, *, rate: float | None, seed: int) -> Requests:
    """`count` requests; Poisson arrivals at `rate` per second, or all at once (None).  DataError for a file that holds no lengths.

    Prompts, answers and arrivals have a generator each, so that a change of one leaves the others as they are.
    """
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)]
    if lengths.kind == "file":
        assert lengths.path is not None
        rows = _read(Path(lengths.path))[np.arange(count) % len(_read(Path(lengths.path)))]
        prompt, output = rows[:, 0], rows[:, 1]
    else:
        prompt = _draw(streams[0], lengths.prompt, lengths.prompt_sigma, count, lengths)
        output = _draw(streams[1], lengths.output, lengths.output_sigma, count, lengths)
    arrival = np.zeros(count) if rate is None else np.cumsum(streams[2].exponential(1 / rate, count))
    return Requests(prompt=prompt, output=output, arrival=arrival)


def _draw(random: np.random.Generator, mean: float, sigma: float, count: int, lengths: Lengths) -> np.ndarray:
    if lengths.kind == "fixed":
        return np.full(count, round(mean), np.int64)
    # The mean of exp(N(m, s)) is exp(m + s^2 / 2).
    drawn = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(drawn), 1, lengths.maximum).astype(np.int64)


def _read(path: Path) -> np.ndarray:
    """int64 (rows, 2), prompt and output."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := {"prompt", "output"} - set(reader.fieldnames or ()):
                raise DataError(f"{path}: has no column {', '.join(sorted(missing))}; it has {reader.fieldnames}")
            rows = [[_tokens(row[name], name, f"{path}:{reader.line_num}") for name in ("prompt", "output")] for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: lengths cannot be read ({error})") from error
    if not rows:
        raise DataError(f"{path}: holds no rows, expected one per request")
    return np.array(rows, np.int64)


def _tokens(text: str | None, name: str, where: str) -> int:
    try:
        value = int(text or "")
    except ValueError:
        value = 0
    if value < 1:
        raise DataError(f"{where}: {name} = {text!r}: expected a whole number of tokens >= 1")
    return value
