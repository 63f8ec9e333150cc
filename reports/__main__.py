"""`python -m reports`: what was recorded, and what it means."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from reports.build import build as build_report
from research.configfile import read_yaml
from research.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _group() -> None:
    """Reports from a study's store."""


@app.command()
def build(
    study: Annotated[
        str, typer.Argument(help="A study's root directory, its YAML file, or its name under $MOELAB_HOME/studies (.moelab/studies here)")
    ],
    out: Annotated[Path | None, typer.Option(help="Where to write; default: report/ in the study's root")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Paths as one JSON object")] = False,
) -> None:
    """Write report.md, its figures and report.html.  Example: python -m reports build quickstart"""
    name = str(read_yaml(study).get("name")) if Path(study).suffix in (".yaml", ".yml") else study
    root = Path(study) if Path(study).is_dir() else Path(os.environ.get("MOELAB_HOME", ".moelab")).expanduser() / "studies" / name
    page = build_report(root.absolute(), out)
    if as_json:
        print(json.dumps({"html": str(page), "markdown": str(page.with_name("report.md")), "manifest": str(page.with_name("manifest.json"))}))
    else:
        print(f"report: {page}\n        {page.with_name('report.md')}")


def main() -> None:
    """The door: a UserError becomes its sentences on stderr and exit code 1."""
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
