"""A page as blocks, written as Markdown for a code host, as HTML for a browser, and its tables as CSV and TeX.

Text is Markdown within a line (bold, code); what comes from outside goes through `safe` first.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt

from reports.charts import Chart
from reports.svg import svg

TEMPLATES = Path(__file__).with_name("templates")
_MARKDOWN = MarkdownIt("commonmark", {"html": False})
LONG = 20
"""Characters of a cell from which on its column wraps, in a table of prose."""
TALL = 24
"""Rows from which on a table scrolls in its own frame; a shorter one stands whole."""
Cell = str | tuple[str, float]
"""What is shown, with the number to sort by where the text does not say it."""


@dataclass(frozen=True, slots=True)
class Heading:
    text: str


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a reader must not miss."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    chart: Chart


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """`name` is that of its files; `note` stands under it.  `prose`: cells hold sentences, so they wrap, and a phone shows rows as cards."""

    name: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    prose: bool = False


Block = Heading | Text | Notice | Bullets | Picture | Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """`answer` is the sentence under the title; `facts` are the few numbers beside it (label, value)."""

    title: str
    kicker: str
    answer: str
    facts: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]

    def charts(self) -> list[Chart]:
        return [block.chart for block in self.blocks if isinstance(block, Picture)]

    def tables(self) -> list[Table]:
        return [block for block in self.blocks if isinstance(block, Table)]


def safe(text: str) -> str:
    """Text from outside, in which nothing begins markup."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def code(text: str) -> str:
    """Text from outside as a code span, in which nothing is escaped: its fence is longer than any run of backticks within."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{' '.join(text.split())}{pad}{fence}"


def plain(text: str) -> str:
    """Without the marks of Markdown."""
    return unescape(re.sub(r"<[^>]*>", "", _MARKDOWN.renderInline(text)))


def shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def markdown(document: Document) -> str:
    """The whole page; pictures are files under figures/."""
    parts = [f"# {document.title}", document.kicker, f"**{document.answer}**" if "**" not in document.answer else document.answer]
    parts.append("\n".join(f"- {label}: {value}" for label, value in document.facts))
    for block in document.blocks:
        if isinstance(block, Heading):
            parts.append(f"## {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Notice):
            parts.append(f"> **Note.** {block.text}")
        elif isinstance(block, Bullets):
            parts.append("\n".join(f"- {item}" for item in block.items))
        elif isinstance(block, Picture):
            chart = block.chart
            alternative = re.sub(r"([\[\]])", r"\\\1", chart.alternative)
            parts.append(f"![{alternative}](figures/{chart.name}.png)\n\n*{chart.caption}*")
        else:
            lines = [f"| {' | '.join(block.head)} |", f"|{'|'.join([':---'] + ['---:'] * (len(block.head) - 1))}|"]
            lines += [f"| {' | '.join(map(shown, row))} |" for row in block.rows]
            parts += [f"{block.caption}:", "\n".join(lines), block.note]
    return "\n\n".join(part for part in parts if part) + "\n"


def html(document: Document) -> str:
    """One page with everything inside; nothing is fetched from anywhere."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=False, keep_trailing_newline=True)
    sections: list[tuple[str, str, list[str]]] = []
    for block in document.blocks:
        if isinstance(block, Heading):
            sections.append((re.sub(r"[^a-z0-9]+", "-", plain(block.text).lower()).strip("-"), inline(block.text), []))
        else:
            if not sections:
                sections.append(("", "", []))
            sections[-1][2].append(_html_block(block))
    return environment.get_template("report.html.j2").render(
        title=escape(plain(document.title)),
        heading=inline(document.title),
        kicker=inline(document.kicker),
        answer=inline(document.answer),
        facts=[(inline(label), inline(value)) for label, value in document.facts],
        sections=[(anchor, name, "\n".join(parts)) for anchor, name, parts in sections],
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        js=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
    )


def inline(text: str) -> str:
    """HTML of a line; a number stays with its sign and unit."""
    return re.sub(r" (=|±) |(?<=\d) (?=%)", lambda m: f"&nbsp;{m[1]}&nbsp;" if m[1] else "&nbsp;", _MARKDOWN.renderInline(text))


def _html_block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{inline(block.text)}</p>"
    if isinstance(block, Notice):
        return f'<p class="notice" role="note">{inline(block.text)}</p>'
    if isinstance(block, Bullets):
        return f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in block.items)}</ul>"
    if isinstance(block, Picture):
        return _html_chart(block.chart)
    assert isinstance(block, Table)
    return _html_table(block)


def _html_chart(chart: Chart) -> str:
    return (
        f'<figure id="figure-{chart.name}" aria-label="{escape(chart.alternative)}">{svg(chart)}'
        f'<p class="reading" aria-live="polite"></p><figcaption>{inline(chart.caption)}</figcaption></figure>'
    )


def _html_table(table: Table) -> str:
    wraps = {index for row in table.rows for index, cell in enumerate(row) if table.prose and index and len(shown(cell)) > LONG}
    long = [' class="long"' if index in wraps else "" for index in range(len(table.head))]
    head = "".join(f'<th scope="col"{long[i]}><button type="button">{inline(name)}</button></th>' for i, name in enumerate(table.head))
    rows = []
    for row in table.rows:
        cells = []
        for index, cell in enumerate(row):
            # Nine figures: the last ones of a double differ between two kinds of processor, and a page should not.
            sort = f' data-sort="{cell[1]:.9g}"' if isinstance(cell, tuple) else ""
            label = f' data-label="{escape(plain(table.head[index]))}"' if table.prose and shown(cell) else ""
            text = inline(shown(cell))
            cells.append(f"<td{sort}{long[index]}{label}>{text}</td>" if index else f'<th scope="row"{sort}>{text}</th>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="small">{inline(table.note)}</p>' if table.note else ""
    kind = "table prose" if table.prose else "table tall" if len(table.rows) > TALL else "table"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{escape(plain(table.caption))}"><table id="table-{table.name}">'
        f"<caption>{inline(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def csv_text(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Numbers in full; an absent value is an empty field."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return buffer.getvalue()


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "α": r"$\alpha$", "µ": r"$\mu$", "×": r"$\times$",
    "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def tex(table: Table) -> str:
    """A booktabs table for `\\input`."""

    def cell(text: str) -> str:
        return "".join(_TEX.get(c, c) for c in plain(text))

    lines = [r"\begin{table}", r"\centering", rf"\caption{{{cell(table.caption)}}}", rf"\label{{tab:{table.name}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule", " & ".join(map(cell, table.head)) + r" \\", r"\midrule"]
    lines += [" & ".join(cell(shown(c)) for c in row) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
