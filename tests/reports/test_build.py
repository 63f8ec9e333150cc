"""The page says what the store holds, the same bytes each time; what is missing is said and never filled in."""

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict

import planted
import pytest
import yaml

from reports import document, verdict
from reports.__main__ import main
from reports.analysis import analyse, pareto
from reports.build import build
from reports.charts import MOST_POINTS
from reports.comparison import compare_records
from reports.figures import importance_bars
from reports.overview import overview
from reports.page import page
from reports.store import load
from research.errors import UserError
from research.routing_trace import RoutingTrace
from sweeps import schema


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("build", root, ..., home=...) -> (exit code, stdout, stderr) of the command, in this process."""

    def run(*words, home=None):
        monkeypatch.setattr(sys, "argv", ["reports", *map(str, words)])
        if home:
            monkeypatch.setenv("MOELAB_HOME", str(home))
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def markdown(built):
    return built.html.with_name("report.md").read_text()


def said(root):
    """The page's text and whether the study is complete, without drawing anything."""
    analysis = analyse(load(root))
    return document.markdown(page(analysis, {}, defaultdict(lambda: "not drawn"))), not analysis.incomplete


def untraced(root):
    """The store without routing traces, whose figures take the time of a build."""
    for path in root.glob(f"{schema.RUNS_DIRECTORY}/*/{schema.ROUTING_FILE}"):
        path.unlink()
    return root


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# What a whole study says.


def test_the_page_holds_every_section_and_every_number_of_the_verdict(whole):
    text = markdown(whole)
    for words in (
        "# Does it matter?",
        "**KV latent = 16** costs 0.20",
        "against KV latent = 64, and saves 75 % of the KV cache",
        "**M = 2** gains 0.09",
        "against M = 3, and saves 33 % of the sends",
        "no difference that 5 seeds can show",
        "Noise floor: the baseline's standard deviation over 5 seeds is 0.07",
        "an order-2 Kneser-Ney",
        "Held-out bits per byte by domain",
        "Equal within 2 %: training tokens, ",
        "KV cache (-75% to +0%)",
        "differ from the baseline's only in the searched settings and the seed",
        "a one-factor design changes each setting alone",
        "Nothing: every planned run finished",
        "last written 2026-11-24T10:30:00",
        "`d1`, corpus `quickstart`; SHA-256 tinytext `0123456789ab`",
        "| en | 9,000 | 4,000 | 900 | 400 |",
        "20 of 20 runs finished",
    ):
        assert words in text, words
    assert whole.complete
    table = text[text.index("Variants by their effect") :].split("\n\n")[1].splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in table] == ["M = 2", "unrestricted (M = 8)", "baseline", "KV latent = 16"]


def test_what_is_written_is_listed_and_whole(whole):
    place = whole.html.parent
    written = files(place)
    manifest = json.loads(written.pop("manifest.json"))
    assert manifest["files"] == {name: hashlib.sha256(content).hexdigest() for name, content in written.items()}
    names = {"effects", "loss-curves", "pareto", "simulated", "distinct-devices", "device-load", "expert-load"}
    assert {n.removeprefix("figures/").removesuffix(".png") for n in written if n.startswith("figures/")} == names
    text = markdown(whole)
    for name in names:
        assert f"](figures/{name}.png)" in text
        assert len(written[f"figures/{name}.png"]) > 5000
    assert sum(map(len, written.values())) < 3_000_000
    html = written["report.html"].decode()
    assert "<script src" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    assert html.count("<figure") == len(names)
    tex = written["tables/effects.tex"].decode()
    assert r"\toprule" in tex
    assert r"KV latent = 16" in tex
    assert "_" not in tex.replace(r"\_", "").split(r"\begin{tabular}")[1]


def test_data_files_hold_the_numbers_in_full(whole):
    place = whole.html.parent / "data"
    rows = {row["variant"]: row for row in csv.DictReader((place / "effects.csv").open())}
    effect = next(v.effect for v in whole.analysis.variants if v.name == "kv_lora_rank=16")
    assert float(rows["kv_lora_rank=16"]["mean"]) == effect.mean
    assert rows["kv_lora_rank=16"]["shown"] == "True"
    runs = list(csv.DictReader((place / "runs.csv").open()))
    assert len(runs) == 20
    assert float(runs[0][schema.BITS_PER_BYTE]) == whole.analysis.record.runs[0].metrics[schema.BITS_PER_BYTE]
    curves = list(csv.DictReader((place / "loss-curves.csv").open()))
    assert {row["series"] for row in curves} == {"baseline", "KV latent = 16", "M = 2", "unrestricted (M = 8)"}


def test_the_same_store_gives_the_same_bytes_wherever_it_lies(whole, tmp_path):
    root = whole.html.parent.parent
    first = files(whole.html.parent)
    shutil.copytree(root, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("report"))
    assert files(build(tmp_path / "elsewhere").html.parent) == first


def test_files_of_an_earlier_report_go_and_files_of_others_stay(write_store, tmp_path):
    root = untraced(write_store(tmp_path / "s", seeds=(0, 1)))
    place = build(root).html.parent
    assert (place / "figures" / "loss-curves.png").exists()
    (place / "notes.txt").write_text("mine")
    for path in root.glob(f"{schema.RUNS_DIRECTORY}/*/{schema.METRICS_FILE}"):
        path.unlink()
    manifest = json.loads((place / "manifest.json").read_text())
    (tmp_path / "precious").write_text("x")
    (place / "manifest.json").write_text(json.dumps({**manifest, "files": {**manifest["files"], "../../precious": "0"}}))
    text = markdown(build(root))
    assert not (place / "figures" / "loss-curves.png").exists()
    assert (place / "notes.txt").exists()
    assert (tmp_path / "precious").exists()
    assert "Not shown. Loss curves: no run has recorded any." in text
    assert "Not shown. Expert load: no run has left a routing trace." in text


def test_a_report_of_many_long_runs_stays_small(write_store, tmp_path):
    """Ten times the records of `whole`: the lines keep as many points, both ends among them, and say that they are thinned."""
    root = untraced(write_store(tmp_path / "s", seeds=(0, 1), records=1500))
    place = build(root).html.parent
    rows = [
        r for r in csv.DictReader((place / "data" / "loss-curves.csv").open()) if r["panel"].startswith("training loss") and r["series"] == "M = 2"
    ]
    assert len(rows) == MOST_POINTS
    assert float(rows[-1]["x"]) == 0.15
    assert f"Of each line {MOST_POINTS} points are kept; the runs' metrics.jsonl hold all." in (place / "report.md").read_text()
    assert sum(map(len, files(place).values())) < 1_200_000


def test_heat_maps_count_what_the_trace_holds(whole):
    trace = RoutingTrace.load(whole.html.parent.parent / schema.RUNS_DIRECTORY / "002-0" / schema.ROUTING_FILE)
    rows = [r for r in csv.DictReader((whole.html.parent / "data" / "device-load.csv").open()) if r["panel"] == "M = 2"]
    last = [float(r["value"]) for r in rows if r["row"] == "layer 2, step 10"]
    counted = [int((trace.device_ids()[-1, 1] == d).sum()) for d in range(8)]
    assert last == pytest.approx([c / (sum(counted) / 8) for c in counted])


def test_the_simulated_figure_is_the_trained_routing_re_routed(whole):
    from sims import AllToAll, reroute, simulate

    trace = RoutingTrace.load(whole.html.parent.parent / schema.RUNS_DIRECTORY / "000-0" / schema.ROUTING_FILE)
    rows = list(csv.DictReader((whole.html.parent / "data" / "simulated.csv").open()))
    assert {r["panel"] for r in rows} == {"1 node of 4 GPUs", "2 nodes of 4 GPUs", "4 nodes of 4 GPUs", "8 nodes of 4 GPUs"}
    found = next(float(r["y"]) for r in rows if r["panel"] == "2 nodes of 4 GPUs" and r["series"] == "K = 4" and float(r["x"]) == 2)
    spec = AllToAll(nodes=2, gpus_per_node=4, tokens_per_device=64, hidden_size=512, n_routed_experts=32, num_experts_per_tok=4, device_limit=2)
    assert found == pytest.approx(simulate(spec, reroute(trace, 2)).seconds * 1e6)
    assert {r["series"] for r in rows} == {"K = 2", "K = 4", "K = 8"}


def test_pareto():
    assert pareto({"a": (1.0, 2.0), "b": (2.0, 1.0), "c": (2.0, 2.0), "d": (1.0, 2.0)}) == {"a", "b", "d"}


def test_importances_stand_where_a_search_makes_them_meaningful(write_store, tmp_path):
    cells = {"baseline": planted.BASELINE} | {
        f"kv_lora_rank={latent}, device_limit={limit}": {planted.LATENT: latent, planted.LIMIT: limit}
        for latent in (16, 32, 64)
        for limit in (2, 3)
        if (latent, limit) != (64, 3)
    }
    effects = {name: 0.3 if "=16" in name else 0.1 if "=32" in name else 0.0 for name in cells}
    root = write_store(tmp_path / "s", effects, variants=cells, sampler="grid", seeds=(0, 1))
    found = analyse(load(root)).importances
    assert found.missing is None
    assert found.fanova[planted.LATENT] > 0.8
    assert set(found.ped_anova) == {planted.LATENT, planted.LIMIT}
    chart = importance_bars(analyse(load(root)))
    assert "Importance of the searched settings by two evaluators" in chart.caption
    assert ("Both name KV latent first" in chart.alternative) == (found.ped_anova[planted.LATENT] > found.ped_anova[planted.LIMIT])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((2.0, 2.25), "10.0% to 20.0% below an order-2"),
        ((3.0, 2.75), "10.0% to 20.0% above an order-2"),
        ((2.0, 2.75), "above to 20.0% below an order-2"),
    ],
)
def test_the_distance_to_the_yardstick_has_a_direction(write_store, tmp_path, found, words):
    record = load(write_store(tmp_path / "s", seeds=(0, 1)))
    for index, run in enumerate(record.runs):
        run.metrics[schema.BITS_PER_BYTE] = found[index % 2]
    assert words in verdict.reference_sentence(analyse(record))


# What was not held equal.


def test_a_confound_is_named_and_a_matched_knob_is_not_one(write_store, tmp_path):
    root = write_store(tmp_path / "s", seeds=(0, 1))
    for seed in (0, 1):
        path = root / schema.RUNS_DIRECTORY / f"001-{seed}" / schema.CONFIG_FILE
        config = json.loads(path.read_text())
        config["training"]["train_tokens"] = 1234
        config["training"]["optimizer"]["learning_rate"] = 0.5
        path.write_text(json.dumps(config))
        rewrite(
            root / schema.RUNS_DIRECTORY / f"001-{seed}" / schema.RUN_FILE,
            matched={"quantity": "training_flops", "requested": 1.6e9, "achieved": 1.5e9, "adjusted": "training.train_tokens", "value": 1234},
        )
        rewrite(root / schema.RUNS_DIRECTORY / f"002-{seed}" / schema.RUN_FILE, commit="def")
    text, _ = said(root)
    assert "kv\\_lora\\_rank=16: 1.5e+09 training FLOPs of 1.6e+09 asked (-6.2 %), by training.train\\_tokens = 1,234" in text
    assert "`training.train_tokens` (turned to match the budget): kv\\_lora\\_rank=16 has 1234, the baseline 1000" in text
    assert "**Confound:** `training.optimizer.learning_rate` also differs: kv\\_lora\\_rank=16 has 0.5" in text
    assert "**Confound:** runs were made by 2 commits: abc, def" in text
    assert "only in the searched settings" not in text


def test_named_variants_are_a_table_and_no_confound(write_store, tmp_path):
    """Whole models by name: what they set stands in a table; what was matched alike is one line, and a stranger is still a confound."""
    root = write_store(tmp_path / "s", seeds=(0, 1))
    path = root / schema.STUDY_FILE
    study = yaml.safe_load(path.read_text())
    path.write_text(
        yaml.safe_dump({**study, "variants": {"wide": {"model": {"attention": {"num_attention_heads": 2}}}}, "budget": {"matched": "none"}})
    )
    for folder in (root / schema.RUNS_DIRECTORY).iterdir():
        matched = {"quantity": "tokens", "requested": 1000.0, "achieved": 1010.0, "adjusted": None, "value": None, "difference": 0.01}
        rewrite(folder / schema.RUN_FILE, matched=matched)
    for seed in (0, 1):
        path = root / schema.RUNS_DIRECTORY / f"002-{seed}" / schema.CONFIG_FILE
        config = json.loads(path.read_text())
        config["model"]["attention"]["num_attention_heads"] = 2
        config["training"]["batch_size"] = 77
        path.write_text(json.dumps(config))
    text, _ = said(root)
    assert "| setting | baseline | M = 2 |" in text
    assert "| `model.attention.num_attention_heads` | 4 | 2 |" in text
    assert "**Confound:** `training.batch_size` also differs: device\\_limit=2 has 77" in text
    assert "num_attention_heads` (" not in text
    assert "- every variant: 1,010 training tokens of 1,000 asked (+1.0 %)" in text
    assert "The study asked for no equal budget." in text


def test_runs_that_chose_a_learning_rate_are_no_replicates(write_store, tmp_path):
    root = write_store(tmp_path / "s", seeds=(0, 1))
    before = analyse(load(root))
    shutil.copytree(root / schema.RUNS_DIRECTORY / "001-0", root / schema.RUNS_DIRECTORY / "001-0-retune-0")
    rewrite(root / schema.RUNS_DIRECTORY / "001-0-retune-0" / schema.RUN_FILE, role="retune", run="001-0-retune-0")
    summary = root / schema.RUNS_DIRECTORY / "001-0-retune-0" / schema.SUMMARY_FILE
    rewrite(summary, metrics={schema.BITS_PER_BYTE: 99.0})
    after = analyse(load(root))
    assert [v.effect for v in before.variants] == [v.effect for v in after.variants]
    assert "1 short runs chose settings for others (retune)" in said(root)[0]


# Bad input: said at its place and in the exit code, never filled in.


def test_failures_missing_seeds_and_an_unfinished_study_are_said(write_store, tmp_path, cli):
    states = {("device_limit=2", 1): schema.FAILED, ("device_limit=8", 0): schema.DIVERGED, ("kv_lora_rank=16", 2): "running"}
    root = untraced(write_store(tmp_path / "s", states=states, state="running"))
    (root / schema.RUNS_DIRECTORY / "002-1" / "attempts.json").write_text(
        json.dumps([{"failure": "died"}, {"failure": "out-of-memory", "text": "no room"}])
    )
    code, _, errors = cli("build", root)
    assert code == 3
    assert "has not finished (state: running)" in errors
    text = (root / "report" / "report.md").read_text()
    assert "This report is incomplete" in text
    assert "`002-1` (device\\_limit=2, seed 1): failed (out-of-memory): ValueError: planted" in text
    assert "`003-0` (device\\_limit=8, seed 0): diverged" in text
    assert "`001-2` (kv\\_lora\\_rank=16, seed 2): not finished" in text
    assert "Not every variant has every seed" in text
    found = {v.name: v.effect.seeds for v in analyse(load(root)).variants if v.effect}
    assert found == {"kv_lora_rank=16": 2, "device_limit=2": 2, "device_limit=8": 2}


@pytest.mark.parametrize(
    ("finished", "words"), [(0, "There is no finished baseline"), (1, "the baseline has one finished seed: there is no noise floor")]
)
def test_a_baseline_without_seeds(write_store, tmp_path, finished, words):
    states = {("baseline", seed): schema.FAILED for seed in range(finished, 3)}
    text, complete = said(write_store(tmp_path / "s", states=states, state="finished-with-failures"))
    assert not complete
    assert words in text
    assert "there is no noise floor" in text
    assert "| Noise floor" not in text
    assert "Noise floor: none" in text


def test_a_missing_or_nan_metric_is_missing(write_store, tmp_path):
    root = write_store(tmp_path / "s")
    for run, value in (("002-1", float("nan")), ("001-0", None)):
        path = root / schema.RUNS_DIRECTORY / run / schema.SUMMARY_FILE
        metrics = json.loads(path.read_text())["metrics"]
        rewrite(path, metrics={**{k: v for k, v in metrics.items() if k != schema.BITS_PER_BYTE}, **({schema.BITS_PER_BYTE: value} if value else {})})
    text, complete = said(root)
    assert not complete
    assert f"002-1: device\\_limit=2, seed 1: {schema.BITS_PER_BYTE.replace('_', chr(92) + '_')} is not a finite number" in text
    assert "001-0: kv\\_lora\\_rank=16, seed 0: validation/bits\\_per\\_byte was not recorded" in text
    assert not re.search(r"\bnan\b", text, re.I)
    assert {v.name: len(v.values) for v in analyse(load(root)).variants}["device_limit=2"] == 2


def test_a_store_of_two_schemas(write_store, tmp_path, cli):
    root = write_store(tmp_path / "s")
    rewrite(root / schema.RUNS_DIRECTORY / "002-1" / schema.RUN_FILE, schema=99)
    text, complete = said(root)
    assert not complete
    assert text.count("002-1: run.json is of schema 99, this version reads 1: the run is left out") == 2
    for path in root.glob(f"{schema.RUNS_DIRECTORY}/*/{schema.RUN_FILE}"):
        rewrite(path, schema=99)
    code, out, errors = cli("build", root)
    assert (code, out) == (1, "")
    assert "no run can be read" in errors


def test_damaged_files_count_as_missing_and_are_named(write_store, tmp_path):
    root = write_store(tmp_path / "s")
    runs = root / schema.RUNS_DIRECTORY
    (runs / "001-0" / schema.SUMMARY_FILE).write_text("{")
    (runs / "001-1" / schema.ROUTING_FILE).write_bytes(b"PK\x03\x04 no")
    lines = (runs / "001-2" / schema.METRICS_FILE).read_text().splitlines()
    (runs / "001-2" / schema.METRICS_FILE).write_text("\n".join([lines[0], "][", *lines[2:], lines[-1][:20]]))
    text, _ = said(root)
    assert "001-0: summary.json is damaged" in text
    assert "001-1: routing.npz: cannot be read" in text
    assert "001-2: metrics.jsonl, line 2: is no record" in text
    assert text.count("is no record") == 2  # in the notice and under what did not finish; the cut-off last line is no finding
    (root / schema.STUDY_FILE).write_text("{a: [")
    with pytest.raises(UserError, match=r"study\.yaml: is damaged"):
        build(root)


def test_markup_from_outside_is_text(write_store, tmp_path):
    root = write_store(tmp_path / "s", states={("device_limit=2", 1): schema.FAILED}, seeds=(0, 1))
    path = root / schema.STUDY_FILE
    path.write_text(path.read_text().replace("Does it matter?", "Does <script>alert(1)</script> matter, *a* | b?"))
    summary = root / schema.RUNS_DIRECTORY / "002-1" / schema.SUMMARY_FILE
    summary.write_text(summary.read_text().replace("ValueError: planted", "ValueError: <class 'int'> planted</script><b>"))
    shown = document.html(page(analyse(load(root)), {}, defaultdict(lambda: "not drawn")))
    assert "<script>alert" not in shown
    assert "&lt;script&gt;alert(1)" in shown
    assert "<title>Does &lt;script&gt;alert(1)&lt;/script&gt; matter, *a* | b?</title>" in shown
    assert "&lt;class 'int'&gt; planted" in shown
    assert "<b>" not in shown
    assert "<script>alert" not in said(root)[0]


# Commands.


def test_a_study_is_found_by_its_file_and_json_is_the_analysis(write_store, tmp_path, cli):
    untraced(write_store(tmp_path / "studies" / "planted", {"kv_lora_rank=16": 0.2}))
    (tmp_path / "other.yaml").write_text("name: planted\n")
    code, out, errors = cli("build", tmp_path / "other.yaml", "--json", "--effect", "0.003", home=tmp_path)
    assert code == 0, errors
    found = json.loads(out)
    assert found["headline"].startswith("Of 3 variants 1 is worse than the baseline (KV latent = 16")
    assert found["variants"][1]["effect"]["shown"] is True
    assert [need["effect"] for need in found["needs"] if need["stated"]] == [0.003]
    assert found["files"]["html"] == str(tmp_path / "studies" / "planted" / "report" / "report.html")


def test_what_is_no_study_is_refused(tmp_path, cli):
    done = subprocess.run([sys.executable, "-m", "reports", "build", str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is no study's root (expected study.yaml" in done.stderr
    assert cli("build", tmp_path, "--effect", "-1")[0] == 2


def test_compare_says_what_differs(write_store, tmp_path):
    one = load(write_store(tmp_path / "a", {"kv_lora_rank=16": 0.2}, name="first"))
    other = load(
        write_store(tmp_path / "b", {"baseline": 0.3, "kv_lora_rank=16": 0.5}, name="second", seed=6, cell_config=(("training.batch_size", 16),))
    )
    found = compare_records(one, other, tmp_path / "out")
    by_name = {c.words: c for c in found.contrasts}
    assert by_name["baseline"].paired
    assert by_name["baseline"].mean == pytest.approx(0.3, abs=0.01)
    assert by_name["baseline"].shown
    assert by_name["KV latent = 16"].shown
    assert not by_name["M = 2"].shown
    assert found.differences == {"training.batch_size": (8, 16)}
    assert "The baseline of second differs from that of first by +0.3" in found.answer
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| `training.batch_size` | 8 | 16 |" in text
    first = files(tmp_path / "out")
    compare_records(one, other, tmp_path / "out")
    assert files(tmp_path / "out") == first


def test_compare_warns_of_other_text_and_does_not_pair(write_store, tmp_path):
    one, path = load(write_store(tmp_path / "a", name="first", seeds=(0, 1))), write_store(tmp_path / "b", name="second", seed=6, seeds=(0, 1))
    rewrite(path / schema.DATA_FILE, data_id="other")
    found = compare_records(one, load(path), tmp_path / "out")
    assert not any(c.paired for c in found.contrasts)
    assert "not trained and validated on the same prepared text" in (tmp_path / "out" / "report.md").read_text()


def test_the_index_lists_every_study_and_says_which_cannot_be_read(write_store, tmp_path, cli):
    place = write_store(tmp_path / "studies" / "one", {"kv_lora_rank=16": 0.2}, name="one", seeds=(0, 1)) / "report"
    place.mkdir()
    (place / "report.html").write_text("built before")
    write_store(tmp_path / "studies" / "two", name="two", state="running", seeds=(0, 1))
    found = overview(tmp_path / "studies", tmp_path / "out")
    assert found.complete
    text = (tmp_path / "out" / "report.md").read_text()
    assert "[one](../studies/one/report/report.html)" in text
    assert "running (incomplete)" in text
    assert "1 is worse than the baseline (KV latent = 16" in text
    (tmp_path / "studies" / "three").mkdir()
    (tmp_path / "studies" / "three" / schema.STUDY_FILE).write_text("name: three\n")
    code, out, _ = cli("index", home=tmp_path)
    assert code == 3
    assert "three: has no run yet" in out
    assert cli("index", home=tmp_path / "nothing")[0] == 1
