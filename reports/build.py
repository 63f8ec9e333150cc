"""report.md with its figures, one self-contained report.html, tables, data and a manifest: the same bytes from the same store."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import figures, verdict
from reports.analysis import Analysis, analyse, to_dict
from reports.document import Document, csv_text, html, markdown, tex
from reports.page import page
from reports.png import png
from reports.store import StudyRecord, load
from research.atomic import atomic_write, write_text
from research.errors import DataError
from sweeps import schema

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What was written, and what it says."""

    html: Path
    analysis: Analysis

    @property
    def complete(self) -> bool:
        return not self.analysis.incomplete

    def to_dict(self) -> dict[str, Any]:
        """The analysis, with its sentences and the paths of the files."""
        paths = {"html": self.html, "markdown": self.html.with_name("report.md"), "manifest": self.html.with_name(MANIFEST)}
        return {
            "complete": self.complete,
            "headline": verdict.headline(self.analysis),
            "sentences": verdict.sentences(self.analysis),
            **to_dict(self.analysis),
            "files": {name: str(path) for name, path in paths.items()},
        }


def build(root: Path, out: Path | None = None, sizes: Sequence[float] = ()) -> Built:
    """The report of a study's root in `out` (default: report/ in the root).

    UserError if `root` is no study's root, DataError if nothing in it can be read.
    """
    return build_record(load(root), out or root / schema.REPORT_DIRECTORY, sizes)


def build_record(record: StudyRecord, place: Path, sizes: Sequence[float] = ()) -> Built:
    """The report of a record, wherever it was read; `sizes` as in `analyse`."""
    analysis = analyse(record, sizes)
    charts, missing = figures.draw(analysis)
    document = page(analysis, charts, missing)
    files = render(document)
    files[schema.STUDY_FILE] = record.study_text.encode()
    files["data/runs.csv"] = _runs_csv(analysis).encode()
    files["data/effects.csv"] = _effects_csv(analysis).encode()
    about = {"study": record.name, "runs": [run.name for run in record.runs], "complete": not analysis.incomplete}
    write_folder(place, files, about)
    return Built(html=place / "report.html", analysis=analysis)


def render(document: Document) -> dict[str, bytes]:
    """A page's files by their path in its folder."""
    files = {"report.md": markdown(document).encode(), "report.html": html(document).encode()}
    for chart in document.charts():
        files[f"figures/{chart.name}.png"] = png(chart)
        files[f"data/{chart.name}.csv" if chart.name != "effects" else "data/effects-figure.csv"] = csv_text(*chart.table()).encode()
    files |= {f"tables/{table.name}.tex": tex(table).encode() for table in document.tables()}
    return files


def write_folder(place: Path, files: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
    """Each file whole, the manifest (SHA-256 of every file) last; files that an earlier manifest lists and this one does not are removed."""
    if place.exists() and not place.is_dir():
        raise DataError(f"{place}: is a file; the report needs a folder")
    before = _listed(place / MANIFEST)
    for name, content in sorted(files.items()):
        with atomic_write(place / name) as file:
            file.write(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    write_text(place / MANIFEST, json.dumps({"schema": schema.SCHEMA_VERSION, **about, "files": hashes}, indent=1))
    for name in before - set(files):
        # Only what lies in the folder itself: a manifest is data, not an order to remove files elsewhere.
        if (place / name).resolve().is_relative_to(place.resolve()):
            (place / name).unlink(missing_ok=True)


def _listed(manifest: Path) -> set[str]:
    try:
        return set(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _runs_csv(analysis: Analysis) -> str:
    """One row per run: what it is, its searched settings, every final metric."""
    runs = analysis.record.runs
    settings = sorted({path for run in runs for path in run.parameters})
    metrics = sorted({name for run in runs for name in run.metrics})
    head = ["run", "variant", "trial", "seed", "baseline", "state", "config_id", *settings, *metrics]
    rows = [
        [
            r.name,
            r.variant,
            r.trial,
            r.seed,
            r.baseline,
            r.state,
            r.config_id,
            *(r.parameters.get(p) for p in settings),
            *(r.metrics.get(m) for m in metrics),
        ]
        for r in runs
    ]
    return csv_text(head, rows)


def _effects_csv(analysis: Analysis) -> str:
    names = ("mean", "low", "high", "bootstrap_low", "bootstrap_high", "p", "p_holm", "seeds", "spread", "freedom", "pooled")
    rows = [[v.name, *(getattr(v.effect, name) for name in names), v.effect.shown] for v in analysis.compared if v.effect]
    return csv_text(["variant", *names, "shown"], rows)
