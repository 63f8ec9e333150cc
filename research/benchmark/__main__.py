"""`python -m research.benchmark`: the same command without the rest of the package, where pydantic or pyarrow are not installed."""

import sys

import typer

from research.benchmark.cli import benchmark
from research.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(benchmark)

if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        sys.exit(1)
