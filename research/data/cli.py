"""`python -m research data`: what text there is, where it comes from, and making it ready."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from research.config import DataConfig
from research.configfile import apply_overrides, validate
from research.data import corpora
from research.data.describe import heldout_overlap, summary
from research.data.overlap import NGRAM
from research.data.prepare import prepare as make
from research.terminal import console

app = typer.Typer(no_args_is_help=True, help=__doc__)
Overrides = Annotated[list[str] | None, typer.Option("--set", help="path=value of the data configuration, such as tokenizer_vocab_size=4096")]


@app.command("list")
def list_sources(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Corpora, their sources, archives and licences.  Example: python -m research data list"""
    if as_json:
        print(json.dumps(corpora.SOURCES, indent=1, ensure_ascii=False))
        return
    table = Table("source", "domain", "corpora", "archive", "MB", "licence", "what it is", title="Real text, read out of pinned archives")
    for name, source in corpora.SOURCES["sources"].items():
        archive = corpora.SOURCES["archives"][source["archive"]]
        inside = ", ".join(corpus for corpus, names in corpora.SOURCES["corpora"].items() if name in names)
        package = f"{source['archive']} {archive['version']}"
        table.add_row(name, source["domain"], inside, package, f"{archive['megabytes']}", source["licence"], source["about"])
    console().print(table)
    print(
        "Also: corpus `installed` (the standard library's source and docstrings), and `files` (your own text, .jsonl or .parquet by paths or globs)."
    )


CorpusName = Annotated[str, typer.Argument(metavar="CORPUS", help="quickstart, default, installed or files")]


@app.command()
def prepare(corpus: CorpusName = "quickstart", overrides: Overrides = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Fetch, check, split, train the tokenizer, encode.  Example: python -m research data prepare default --set tokenizer_vocab_size=8192"""
    config = _config(corpus, overrides)
    data = make(config, _say if as_json else lambda line: print(line, flush=True))
    if as_json:
        print(json.dumps(summary(data, config), indent=1, ensure_ascii=False))
        return
    table = Table("domain", "train bytes", "train tokens", "held-out bytes", "held-out tokens", title=f"{corpus}: {data.directory}")
    for domain, size in data.manifest["domains"].items():
        table.add_row(domain, *(f"{size[key]:,}" for key in ("train_bytes", "train_tokens", "heldout_bytes", "heldout_tokens")))
    console().print(table)


@app.command()
def describe(
    corpus: CorpusName = "quickstart",
    overrides: Overrides = None,
    with_overlap: Annotated[bool, typer.Option("--overlap/--no-overlap", help="Look for held-out n-grams in the training text")] = True,
    ngram: Annotated[int, typer.Option(min=1, max=1000, help="Words (in Chinese and Japanese: characters) of an n-gram")] = NGRAM,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What each domain holds, where it is from, and how much held-out text is also trained on.  Prepares the corpus first.

    Example: python -m research data describe quickstart --set tokenizer_vocab_size=4096 --json
    """
    config = _config(corpus, overrides)
    data = make(config, _say)
    said = summary(data, config)
    found = heldout_overlap(data, ngram, _say) if with_overlap else {}
    if as_json:
        for domain, value in said["domains"].items():
            value["overlap"] = found.get(domain)
        print(json.dumps({**said, "ngram": ngram if with_overlap else None}, indent=1, ensure_ascii=False))
        return
    _print_sizes(said)
    if with_overlap:
        _print_overlap(found, ngram)
    print(f"Split: {said['split']}")


def _config(corpus: str, overrides: list[str] | None) -> DataConfig:
    return validate(DataConfig, apply_overrides({"corpus": corpus}, overrides or []), "data")


def _say(line: str) -> None:
    """Progress, apart from what a script reads."""
    print(line, file=sys.stderr, flush=True)


def _print_sizes(said: dict[str, Any]) -> None:
    table = Table("domain", "documents", "blocks", "MB", "tokens", "bytes/token", "mixture", title=escape(f"{said['corpus']}: {said['directory']}"))
    table.caption = "training text + held-out text; bytes per token of training text"
    for domain, value in said["domains"].items():
        blocks, tokens = (f"{value[f'train_{what}']:,} + {value[f'heldout_{what}']:,}" for what in ("blocks", "tokens"))
        size = f"{value['train_bytes'] / 1e6:,.2f} + {value['heldout_bytes'] / 1e6:,.2f}"
        documents = "-" if value["documents"] is None else f"{value['documents']:,}"
        table.add_row(domain, documents, blocks, size, tokens, _figure(value["train_bytes_per_token"], ".2f"), f"{value['mixture_share']:.1%}")
    console().print(table)
    sources = Table("domain", "source", "from", "licence", "what it is")
    for domain, value in said["domains"].items():
        for source in value["sources"]:
            cells = source["name"], source["from"], source["licence"] or "not stated", source["about"]
            sources.add_row(domain, *map(escape, cells))  # a glob is no markup
    console().print(sources)


def _print_overlap(found: dict[str, dict[str, Any]], ngram: int) -> None:
    others = list(found)
    table = Table("held out", "n-grams", "in training text", *(f"in {d}" for d in others), "blocks over half", "longest run", "which begins")
    table.title = f"Held-out {ngram}-grams of words that occur in training text"
    for domain, value in found.items():
        shares = (_figure(value["shares"].get(other), ".1%") for other in others)
        heavy = f"{value['heavy_blocks']} of {value['blocks']}"
        longest = f"{value['longest_words']:,} words" if value["longest_words"] else "-"
        # Somebody's text is no markup.
        table.add_row(domain, f"{value['ngrams']:,}", _figure(value["share"], ".1%"), *shares, heavy, longest, escape(value["longest"][:40]))
    console().print(table)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
