"""`python -m sims`: what routing costs on a described cluster."""

import sys

from research.errors import UserError
from sims.commands import all_to_all, app, calibrate, explain, faults, moved_bytes, serving, sweep, training_step, validate

__all__ = ["all_to_all", "app", "calibrate", "explain", "faults", "moved_bytes", "serving", "sweep", "training_step", "validate"]


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
