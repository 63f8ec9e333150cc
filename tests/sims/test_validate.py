"""The validation page: made again to the byte, complete, and readable by itself."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from research.errors import ConfigError, DataError
from sims.__main__ import app
from sims.commands.validate import OUT, compare
from sims.formulas import FORMULAS
from sims.measured import read_run
from sims.quantiles import Quantiles
from sims.validation import byte_counts
from sims.validation.byte_counts import TOKENS, expected_copies, expected_devices, expert_parallel_traffic
from sims.validation.comparison import Comparison, comparison_table, mean_absolute_errors, published
from sims.validation.document import Document, Figure, Section, table
from sims.validation.page import as_values, build


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


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built():
    return build()


def test_the_committed_page_is_what_validate_writes(built):
    document, rows = built
    for name, data in {**document.files(), "comparisons.json": (json.dumps(as_values(rows), indent=1) + "\n").encode()}.items():
        assert (REPOSITORY / OUT / name).read_bytes() == data, f"{OUT / name}: run `python -m sims validate` and commit"


def test_the_page_holds_every_prediction_its_error_and_the_misses(built):
    document, rows = built
    by_name = {row.name: row for row in rows if row.unit != "tokens/s per GPU"}
    page = document.markdown()
    for name, value in (
        ("DeepSeek-V2, 8 devices in one node, 1,024 GPUs", 172.8), ("DeepSeek-V2, 8 devices on 8 nodes, 1,024 GPUs", 172.8), ("generated tokens/s over DeepSeek 67B's", 5.76),
    ):  # fmt: skip
        row = by_name[name]
        assert (row.value, row.kind) == (value, "predicted")
        assert f"{100 * row.error:+.1f} %" in page
        assert row.baselines
    assert by_name["DeepSeek 67B (one of its layouts)"].kind == "fitted"
    assert all(row.baselines for row in rows if row.group.startswith("all-to-all"))
    assert page.count("**outside**") >= sum(not row.ours.p10 <= row.value <= row.ours.p90 for row in rows)
    for said in ("No public sweep over M", "Term (a), residents", "Term (b)", "| 2 | 5.7", "| 4 | 6.3", "error, point left out"):
        assert said in page


def test_every_picture_of_the_page_has_words_and_nothing_is_fetched(built):
    document, _ = built
    seen = Seen()
    seen.feed(document.files()["validation.html"].decode())
    assert len(seen.images) == 4
    assert all(len(image["alt"]) > 40 and image["src"].startswith("data:image/svg+xml") for image in seen.images)
    assert not seen.fetched


def test_our_errors_are_smaller_than_every_baselines(built):
    for direction in ("dispatch", "combine"):
        means = mean_absolute_errors([row for row in built[1] if row.group == f"all-to-all, {direction}"])
        assert all(means["ours"] < means[name] for name in FORMULAS)


def test_check_says_which_file_differs_and_writes_nothing(tmp_path):
    (tmp_path / "validation.md").write_text("old")
    with pytest.raises(ConfigError, match=r"--check .*validation.md: is not what `python -m sims validate` writes"):
        compare(tmp_path, {"validation.md": b"new"})
    compare(tmp_path, {"validation.md": b"old"})
    assert (tmp_path / "validation.md").read_text() == "old"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        CliRunner().invoke(app, ["validate", "--out", str(tmp_path / "file")], catch_exceptions=False)


def test_copies_of_random_experts_have_a_closed_form():
    """Hypergeometric: devices of 8 for 6 of 160, and copies over both links at 2 nodes, against sampled routing."""
    assert expected_devices(160, 6, 8) == pytest.approx(4.4586, abs=1e-4)
    traffic = expert_parallel_traffic(2)
    per_token = [matrix.sum() / (16 * TOKENS * traffic.bytes_per_token) for matrix in (traffic.nvlink, traffic.infiniband)]
    assert per_token == pytest.approx(expected_copies(2), rel=5e-3)


def test_committed_runs_moved_the_bytes_that_their_routing_predicts(tmp_path, monkeypatch):
    runs = sorted(path for path in byte_counts.MEASURED.iterdir() if path.is_dir())
    assert len(runs) >= 3
    for path in runs:
        run = read_run(path)
        assert run.agrees
        assert {phase.measured for phase in run.phases} == {phase.predicted for phase in run.phases}
        assert run.phases[0].entries == run.workers**2 * run.replicas * run.steps * run.layers
    sent = {path.name: read_run(path).phases[0].measured for path in runs}
    assert sent["8-workers-m3"] < 0.75 * sent["8-workers-m8"]
    # One byte more in one place is seen, in the command's exit code too.
    copy = tmp_path / "runs" / "changed"
    shutil.copytree(runs[0], copy)
    lines = [json.loads(line) for line in (copy / "traffic.jsonl").read_text().splitlines()]
    next(line for line in lines if line["phase"] == "combine")["bytes"][0][1] += 1
    (copy / "traffic.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [phase.different for phase in read_run(copy).phases] == [0, 1, 0, 0]
    assert CliRunner().invoke(app, ["bytes", str(runs[0])]).exit_code == 0
    found = CliRunner().invoke(app, ["bytes", str(copy), "--json"])
    assert found.exit_code == 1
    assert json.loads(found.stdout)["agrees"] is False
    monkeypatch.setattr(byte_counts, "MEASURED", tmp_path / "runs")
    assert "1 of" in byte_counts.measured_section().blocks[1]
    with pytest.raises(DataError, match=r"config.json: is missing"):
        read_run(tmp_path)
