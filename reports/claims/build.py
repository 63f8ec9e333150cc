"""The page's files: the same bytes each time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports.build import write_folder
from reports.claims import page
from reports.claims.rows import Row, build_rows
from reports.claims.simulated import simulate_all
from reports.claims.studies import committed, find
from reports.document import Document, csv_text, html, markdown
from reports.png import png

HTML, MARKDOWN, CSV = "claims.html", "claims.md", "data/claims.csv"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """The page before it is written; `unused`: given studies that answer no claim."""

    rows: tuple[Row, ...]
    document: Document
    studies: tuple[str, ...]
    unused: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"answer": self.document.answer, "rows": [row.to_dict() for row in self.rows], "studies": list(self.studies)}

    def files(self) -> dict[str, bytes]:
        """By path in the page's folder."""
        found = {HTML: html(self.document).encode(), MARKDOWN: markdown(self.document).encode(), CSV: _csv(self.rows).encode()}
        return found | {f"figures/{chart.name}.png": png(chart) for chart in self.document.charts()}


def claims(studies: Sequence[str] = (), say: Say = lambda _: None) -> Claims:
    """All rows and the page of them; `studies` come before the committed reports, and stand in for those of the same name.

    UserError if one of them is none.
    """
    given = [find(study) for study in studies]
    read = [*given, *(study for study in committed() if study.name not in {each.name for each in given})]
    rows = build_rows(simulate_all(say), read)
    say(f"{len(rows)} rows; {len(read)} studies read")
    answered = {row.study for row in rows}
    return Claims(
        rows=tuple(rows),
        document=page.document(rows),
        studies=tuple(study.name for study in read),
        unused=tuple(study.name for study in given if study.name not in answered),
    )


def write(found: Claims, out: Path) -> None:
    """Every file whole, the manifest last."""
    write_folder(out, found.files(), {"page": "claims", "studies": list(found.studies)})


def differences(found: Claims, out: Path) -> list[str]:
    """What in `out` is not what would be written, in words; pictures, whose bytes are the font library's too, only have to be there."""
    problems = []
    for name, content in found.files().items():
        path = out / name
        if not path.is_file():
            problems.append(f"{path}: is missing")
        elif path.suffix != ".png" and path.read_bytes() != content:
            problems.append(f"{path}: {_first_difference(path.read_bytes(), content)}")
    return problems


def _first_difference(there: bytes, wanted: bytes) -> str:
    pairs = list(zip(there.decode(errors="replace").splitlines(), wanted.decode().splitlines(), strict=False))
    line = next((number for number, (a, b) in enumerate(pairs, 1) if a != b), len(pairs) + 1)
    return f"line {line} differs from what is computed now"


def _csv(rows: Sequence[Row]) -> str:
    plain = [row.to_dict() for row in rows]
    return csv_text(tuple(plain[0]), [list(row.values()) for row in plain])
