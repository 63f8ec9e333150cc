"""One module per command of `python -m sims`; each adds itself to `app`."""

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""`python -m sims`: what routing costs on a described cluster.

    Example: python -m sims all-to-all --nodes 2 --model deepseek-v2 --device-limit 3 --formula""",
)
