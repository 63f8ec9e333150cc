"""`python -m research data`: what text there is, where it comes from, and making it ready."""

import json
from typing import Annotated

import typer
from rich.table import Table

from research.config import DataConfig
from research.configfile import apply_overrides, validate
from research.data import corpora
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


@app.command()
def prepare(
    corpus: Annotated[str, typer.Argument(help="quickstart, default, installed or files")] = "quickstart", overrides: Overrides = None
) -> None:
    """Fetch, check, split, train the tokenizer, encode.  Example: python -m research data prepare default --set tokenizer_vocab_size=8192"""
    mapping = apply_overrides({"corpus": corpus}, overrides or [])
    data = make(validate(DataConfig, mapping, "data"), lambda line: print(line, flush=True))
    table = Table("domain", "train bytes", "train tokens", "held-out bytes", "held-out tokens", title=f"{corpus}: {data.directory}")
    for domain, size in data.manifest["domains"].items():
        table.add_row(domain, *(f"{size[key]:,}" for key in ("train_bytes", "train_tokens", "heldout_bytes", "heldout_tokens")))
    console().print(table)
