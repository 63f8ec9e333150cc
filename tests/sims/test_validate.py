"""The validation page: made again to the byte, complete, and readable by itself."""

from html.parser import HTMLParser

import pytest

from sims.quantiles import Quantiles
from sims.validation.comparison import Comparison, comparison_table, mean_absolute_errors, published
from sims.validation.document import Document, Figure, Section, table


def rows():
    band = Quantiles(p10=90, p50=110, p90=120)
    return [
        Comparison(group="a", name="first", unit="us", value=100, ours=band, kind="fitted", baselines={"k_copies": 300}),
        Comparison(group="a", name="second", unit="us", value=200, ours=band, kind="predicted", baselines={"k_copies": 100, "every_node": 200}),
    ]


def test_errors_are_signed_and_misses_shown():
    text = comparison_table(rows())
    assert "| first | 100 us | 110 (90 to 120) | +10.0 % | inside | **FITTED** | +200.0 % |  |" in text
    assert "| second | 200 us | 110 (90 to 120) | -45.0 % | **outside** | predicted | -50.0 % | +0.0 % |" in text
    assert mean_absolute_errors(rows()) == {"ours": pytest.approx(0.275), "k_copies": pytest.approx(1.25), "every_node": 0}
    assert rows()[1].to_dict()["inside_p10_p90"] is False


def test_every_published_figure_has_its_unit_and_source():
    assert all(len(figure.source) > 10 and figure.unit for figure in published().values())


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.fetched, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "img":
            self.images.append(found)
        self.fetched += [value for key, value in attrs if key in ("src", "href") and not value.startswith(("data:", "#", "https://"))]
        if tag in ("script", "link", "iframe"):
            self.fetched.append(tag)


def test_the_html_holds_its_figures_and_their_text():
    figure = Figure(name="one", caption="What it shows.", alternative='Bars of "a" & b', svg=b"<svg/>")
    page = Document(title="A page", lead="Lead.", sections=[Section(title="Part", blocks=[table(["a", "b"], [["x|y", "1"]])], figures=[figure])])
    files = page.files()
    assert set(files) == {"validation.md", "validation.html", "figures/one.svg"}
    seen = Seen()
    seen.feed(files["validation.html"].decode())
    assert [i["alt"] for i in seen.images] == ['Bars of "a" & b']
    assert not seen.fetched
    assert "x|y" in files["validation.html"].decode()
    assert 'name="viewport"' in files["validation.html"].decode()
    assert files == page.files()
