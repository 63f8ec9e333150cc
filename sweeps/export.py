"""A study's runs as one tidy table: CSV, Parquet or JSON."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from research.atomic import atomic_write
from research.errors import UserError
from sweeps import schema
from sweeps.status import WAITING, attempts_of, failure_class, read_json

FORMATS = ("csv", "parquet", "json")
ABOUT = ("run", "trial", "variant", "seed", "baseline")
ENDING = ("state", "class", "reason", "attempts", "steps", "tokens", "seconds", "device")
CURVES = pa.schema(
    [
        ("run", pa.string()),
        ("trial", pa.int64()),
        ("variant", pa.string()),
        ("seed", pa.int64()),
        ("step", pa.int64()),
        ("tokens", pa.int64()),
        ("metric", pa.string()),
        ("value", pa.float64()),
    ]
)


def rows(root: Path) -> list[dict[str, Any]]:
    """One row per run, in the order of trials and seeds: what it is, how it ended, each searched setting by its path, each final metric.

    What a run has not got is null, never zero; runs that have not ended are there with state `waiting`.
    """
    found = [_row(path.parent) for path in (root / schema.RUNS_DIRECTORY).glob(f"*/{schema.RUN_FILE}")]
    found.sort(key=lambda row: (row["trial"], row["run"]))
    columns = dict.fromkeys(key for row in found for key in row)
    return [{key: row.get(key) for key in columns} for row in found]


def _row(folder: Path) -> dict[str, Any]:
    about, summary = read_json(folder / schema.RUN_FILE), read_json(folder / schema.SUMMARY_FILE)
    ending = {key: summary.get(key) for key in ENDING}
    ending |= {"state": summary.get("state", WAITING), "class": failure_class(summary)}
    ending["attempts"] = summary.get("attempts", len(attempts_of(folder)))
    own = {"role": about["role"]} if "role" in about else {}
    settings = {path: about["parameters"][path] for path in about["parameters"]}
    return {**{key: about[key] for key in ABOUT}, **own, **ending, **settings, **_provenance(about), **summary.get("metrics", {})}


def _provenance(about: dict[str, Any]) -> dict[str, Any]:
    return {key: about[key] for key in ("config_id", "commit")}


def curves(root: Path) -> Iterator[list[dict[str, Any]]]:
    """The records of each run, long: one row per (step, metric)."""
    for path in sorted((root / schema.RUNS_DIRECTORY).glob(f"*/{schema.METRICS_FILE}")):
        about = read_json(path.with_name(schema.RUN_FILE))
        head = {key: about[key] for key in ("run", "trial", "variant", "seed")}
        text = path.read_text(encoding="utf-8")
        records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        yield [
            {**head, "step": record["step"], "tokens": record["tokens"], "metric": name, "value": float(value)}
            for record in records
            for name, value in record.items()
            if name not in ("step", "tokens")
        ]


def form_of(out: Path | None, given: str | None) -> str:
    """The format asked for, else that of the file's suffix, else csv.  UserError for another."""
    form = given or (out.suffix.lstrip(".").lower() if out is not None else "csv")
    if form not in FORMATS:
        named = f"--format = {given!r}" if given else f"--out = {out}"
        raise UserError(f"{named}: no such format; valid: {', '.join(FORMATS)} (or a file that ends in .csv, .parquet or .json)")
    return form


def write_rows(found: list[dict[str, Any]], out: Path, form: str) -> None:
    """`found` as a file, whole or not at all."""
    with _written(out) as file:
        if form == "json":
            file.write(as_json(found).encode())
        elif form == "parquet":
            pa.parquet.write_table(_table(found), file)
        else:
            pa.csv.write_csv(_table(found), file)


def write_curves(root: Path, out: Path, form: str) -> int:
    """Every record of every run as a file, run by run; how many rows there are comes back."""
    count = 0
    with _written(out) as file:
        if form == "json":
            for number, part in enumerate(curves(root)):
                lines = [json.dumps(_plain(row), ensure_ascii=False) for row in part]
                file.write((("[\n" if not number else ",\n") + ",\n".join(lines)).encode() if lines else b"")
                count += len(lines)
            file.write(b"\n]\n" if count else b"[]\n")
            return count
        writer = pa.parquet.ParquetWriter(file, CURVES) if form == "parquet" else pa.csv.CSVWriter(file, CURVES)
        with writer:
            for part in curves(root):
                writer.write_table(pa.Table.from_pylist(part, schema=CURVES))
                count += len(part)
    return count


def as_json(found: list[dict[str, Any]]) -> str:
    """A JSON array; numbers that are not finite, which JSON has no word for, become null."""
    return json.dumps([_plain(row) for row in found], indent=1, ensure_ascii=False) + "\n"


def as_csv(found: list[dict[str, Any]]) -> str:
    sink = pa.BufferOutputStream()
    pa.csv.write_csv(_table(found), sink)
    return sink.getvalue().to_pybytes().decode()


def _table(found: list[dict[str, Any]]) -> pa.Table:
    """One type per column: a setting that is a word in one run and a number in another is a word in all."""
    return pa.table({key: _column([row[key] for row in found]) for key in (found[0] if found else ())})


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and len(kinds) == 2:
        return pa.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1:
        return pa.array([None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values])
    return pa.array(values)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _written(out: Path) -> Any:
    if out.is_dir():
        raise UserError(f"--out = {out}: is a directory; name a file in it")
    return atomic_write(out)
