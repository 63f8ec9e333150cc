"""`validate`: the page that holds the model against what was published."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from research.configfile import apply_overrides
from research.configfile import validate as validate_mapping
from research.errors import ConfigError
from sims.cluster import load_cluster
from sims.commands import app
from sims.constants import load_constants
from sims.outputs.files import write_bytes

OUT = Path("reports/generated/simulator")


@dataclass(frozen=True, slots=True)
class Overrides:
    """What `--set` may say."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}

    constants: dict[str, float] = field(default_factory=dict)


@app.command()
def validate(
    out: Annotated[Path, typer.Option(help="Folder of validation.md, validation.html, comparisons.json and figures/")] = OUT,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 if the page in --out is not what would be written")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="constants.NAME=value: hold a calibrated constant at a value; needs a folder of its own (--out)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every comparison as JSON, too")] = False,
) -> None:
    """Make the validation page again from committed data.  Example: python -m sims validate --out reports/generated/simulator

    Exit code 0 when the page was written: misses are on the page, they are no failure.  What if a constant were another:
    python -m sims validate --set constants.nic_efficiency=0.9 --out /tmp/what-if
    """
    held = _held(overrides or [])
    if held and (check or out.resolve() == OUT.resolve()):
        raise ConfigError(f"--set {(overrides or [''])[0]}: is not the committed page; give a folder of its own with --out, without --check")
    # matplotlib and all simulators: a second that no other command should wait for.
    from sims.validation.page import as_values, build  # noqa: PLC0415

    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give the name of a folder")
    document, rows = build(held)
    values = json.dumps(as_values(rows), indent=1) + "\n"
    files = document.files() | {"comparisons.json": values.encode()}
    if check:
        compare(out, files)
    else:
        for name, data in files.items():
            write_bytes(out / name, data)
        for stale in sorted({p.relative_to(out).as_posix() for p in (out / "figures").glob("*.svg")} - set(files)):
            (out / stale).unlink()
    if as_json:
        print(values, end="")
    elif not check:
        print(f"{out / 'validation.md'}\n{out / 'validation.html'}")


def _held(overrides: list[str]) -> tuple[tuple[str, float], ...]:
    """Name and value of each `constants.NAME=value`; ConfigError for anything else."""
    for override in overrides:
        if not override.strip().startswith("constants."):
            raise ConfigError(f"--set {override}: expected constants.NAME=value, such as constants.nic_efficiency=0.9")
    found = validate_mapping(Overrides, apply_overrides({}, overrides), "validate").constants
    load_constants(load_cluster("h800"), 1, found)
    return tuple(found.items())


def compare(out: Path, files: dict[str, bytes]) -> None:
    """ConfigError that names every file that is missing or holds other bytes."""
    differing = [name for name, data in files.items() if not (out / name).is_file() or (out / name).read_bytes() != data]
    if differing:
        raise ConfigError(*(f"--check {out / name}: is not what `python -m sims validate` writes; run it and commit" for name in differing))
