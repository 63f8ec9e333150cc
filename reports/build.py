"""report.md with its figures, one self-contained report.html, and a manifest: the same bytes from the same store."""

import base64
import hashlib
import json
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt

from reports.figures import Figure, draw_all
from reports.page import markdown
from reports.store import load
from research.atomic import atomic_write, write_text
from sweeps import schema


def build(root: Path, out: Path | None = None) -> Path:
    """Write the report of a study's root into `out` (default: report/ in the root); the HTML page's path comes back.

    UserError if `root` is no study's root.
    """
    record = load(root)
    place = out or root / schema.REPORT_DIRECTORY
    figures, missing = draw_all(record)
    text = markdown(record, figures, missing)
    for figure in figures:
        with atomic_write(place / "figures" / f"{figure.name}.png") as file:
            file.write(figure.png)
    write_text(place / "report.md", text)
    write_text(place / "report.html", html(text, figures, record.study["question"]))
    write_text(place / schema.STUDY_FILE, (root / schema.STUDY_FILE).read_text(encoding="utf-8"))
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.name != "manifest.json")
    hashes = {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    manifest = {"schema": schema.SCHEMA_VERSION, "study": record.study["name"], "runs": [run.name for run in record.runs], "files": hashes}
    write_text(place / "manifest.json", json.dumps(manifest, indent=1))
    return place / "report.html"


def html(text: str, figures: list[Figure], title: str) -> str:
    """The same page for a browser, pictures inside, nothing fetched from anywhere."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for figure in figures:
        inline = f"data:image/png;base64,{base64.b64encode(figure.png).decode()}"
        body = body.replace(f'src="figures/{figure.name}.png"', f'src="{inline}"')
    body = body.replace("<p><img", "<figure><img").replace('" /></p>\n<p><em>', '" /><figcaption>').replace("</em></p>", "</figcaption></figure>")
    body = body.replace("<table>", '<div class="table" tabindex="0" role="region" aria-label="table"><table>').replace("</table>", "</table></div>")
    body = body.replace("<blockquote>", '<blockquote class="notice">')
    environment = Environment(loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=False, keep_trailing_newline=True)
    return environment.get_template("report.html.j2").render(title=escape(title), body=body)
