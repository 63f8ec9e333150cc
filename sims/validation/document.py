"""A page as Markdown beside its figures, and as one HTML file that holds them."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Template
from markdown_it import MarkdownIt

from sims.quantiles import Quantiles

TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture, its caption, and the text that stands in for it."""

    name: str
    caption: str
    alternative: str
    svg: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A heading, paragraphs and tables in Markdown, and the figures below them."""

    title: str
    blocks: Sequence[str]
    figures: Sequence[Figure] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    title: str
    lead: str
    sections: Sequence[Section]

    def files(self) -> dict[str, bytes]:
        """What the page consists of, by name relative to its folder: `validation.md`, `validation.html`, `figures/*.svg`."""
        markdown = self.markdown()
        files = {"validation.md": markdown.encode(), "validation.html": self.html(markdown).encode()}
        return files | {f"figures/{figure.name}.svg": figure.svg for section in self.sections for figure in section.figures}

    def markdown(self) -> str:
        parts = [f"# {self.title}", self.lead]
        for section in self.sections:
            parts += [f"## {section.title}", *section.blocks]
            for figure in section.figures:
                parts += [f"![{figure.alternative}](figures/{figure.name}.svg)", f"*{figure.caption}*"]
        return "\n\n".join(part for part in parts if part) + "\n"

    def html(self, markdown: str) -> str:
        """Self-contained: figures inlined, nothing fetched."""
        body = MarkdownIt("commonmark").enable("table").render(markdown)
        body = body.replace("<table>", '<div class="table" tabindex="0"><table>').replace("</table>", "</table></div>")
        for section in self.sections:
            for figure in section.figures:
                source = f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode()}"
                body = body.replace(f'src="figures/{figure.name}.svg"', f'src="{source}"')
        return Template(TEMPLATE.read_text(encoding="utf-8")).render(title=html.escape(self.title), body=body)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell begins no column."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


def signed(predicted: float, published: float) -> str:
    """The error in per cent of what was published, with its sign."""
    return f"{100 * (predicted / published - 1):+.1f} %"


def band(values: Quantiles, scale: float = 1.0, digits: int = 1) -> str:
    """P50 with P10 and P90."""
    low, mid, high = (f"{value * scale:,.{digits}f}" for value in values)
    return f"{mid} ({low} to {high})"


def inside(values: Quantiles, published: float) -> str:
    """Whether the published figure lies between P10 and P90."""
    return "inside" if values.p10 <= published <= values.p90 else "**outside**"
