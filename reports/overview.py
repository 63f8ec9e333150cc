"""All studies on one page: what was asked, what came out, when, and in which state."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reports import verdict
from reports.analysis import analyse
from reports.build import render, write_folder
from reports.document import Block, Bullets, Document, Heading, Notice, Table, plain, safe
from reports.store import load
from research.errors import UserError
from sweeps import schema


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One study; `unreadable` says why there is no verdict."""

    name: str
    question: str
    verdict: str
    state: str
    updated: str
    runs: str
    complete: bool
    report: str | None
    unreadable: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    html: Path
    rows: tuple[Row, ...]

    @property
    def complete(self) -> bool:
        return all(row.unreadable is None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"complete": self.complete, "studies": [asdict(row) for row in self.rows], "files": {"html": str(self.html)}}


def overview(studies: Path, place: Path) -> Overview:
    """The page of all studies below `studies`, newest first, written into `place`.  UserError if there is none."""
    roots = sorted(path.parent for path in studies.glob(f"*/{schema.STUDY_FILE}"))
    if not roots:
        raise UserError(f"{studies}: holds no study (expected NAME/{schema.STUDY_FILE} in it); `python -m sweeps run` makes one")
    rows = sorted((_row(root) for root in roots), key=lambda row: (row.updated, row.name), reverse=True)
    write_folder(place, render(_page(rows, place)), {"studies": [row.name for row in rows]})
    return Overview(html=place / "report.html", rows=tuple(rows))


def _row(root: Path) -> Row:
    built = root / schema.REPORT_DIRECTORY / "report.html"
    report = str(built) if built.exists() else None
    try:
        analysis = analyse(load(root))
    except UserError as error:
        why = error.problems[0].removeprefix(f"{root}: ").removeprefix(f"{root}/")
        return Row(name=root.name, question="", verdict="", state=_state(root), updated="", runs="", complete=False, report=report, unreadable=why)
    record = analysis.record
    return Row(
        name=record.name,
        question=record.question,
        verdict=verdict.headline(analysis),
        state=str(record.state.get("state", "unknown")),
        updated=str(record.state.get("updated", "")),
        runs=f"{sum(run.finished for run in record.runs)} of {record.state.get('planned', len(record.runs))}",
        complete=not analysis.incomplete,
        report=report,
    )


def _state(root: Path) -> str:
    try:
        return str(json.loads((root / schema.STATE_FILE).read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _page(rows: list[Row], place: Path) -> Document:
    unreadable = [row for row in rows if row.unreadable]
    blocks: list[Block] = []
    if unreadable:
        blocks.append(Notice("; ".join(f"{safe(row.name)} cannot be read: {safe(row.unreadable or '')}" for row in unreadable) + "."))
    cells = tuple(
        (
            f"[{safe(row.name)}]({Path(os.path.relpath(row.report, place)).as_posix()})" if row.report else safe(row.name),
            safe(row.updated[:16].replace("T", " ")) or "not recorded",
            safe(row.state) + ("" if row.complete or row.unreadable else " (incomplete)"),
            row.runs or "none",
        )
        for row in rows
    )
    blocks += [
        Heading("Studies"),
        Table(name="studies", caption="Studies, the last written first", head=("study", "last written", "state", "runs finished"), rows=cells),
        Heading("Questions and answers"),
        Bullets(tuple(f"**{safe(row.name)}**: {safe(row.question)} {row.verdict}" for row in rows if not row.unreadable)),
    ]
    done = sum(row.state == "finished" for row in rows)
    answer = f"{len(rows)} {'study' if len(rows) == 1 else 'studies'}: {done} finished, {len(rows) - done - len(unreadable)} not or with failures"
    answer += f", {len(unreadable)} unreadable." if unreadable else "."
    return Document(title="Studies", kicker="moelab", answer=answer, facts=(), blocks=tuple(blocks))


def spoken(row: Row) -> str:
    """A line for the terminal."""
    return f"{row.name}: {row.unreadable or plain(row.verdict)}"
