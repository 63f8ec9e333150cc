"""Where tables are printed."""

import sys

from rich.console import Console


def console() -> Console:
    """A terminal's own width; elsewhere (a file, a pipe, a job's log) wide enough that no column is cut."""
    return Console() if sys.stdout.isatty() else Console(width=200)
