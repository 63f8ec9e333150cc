"""Pruned trials and re-tuned learning rates, driven for real with a trial function that counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import standin
import standin_rates
from conftest import STANDIN

from reports import store
from sweeps import pruning, schema, search
from sweeps.driver import Driver
from sweeps.executors import InlineExecutor
from sweeps.pruning import Curve, Pruner
from sweeps.retune import Retune, choose, short_config
from sweeps.study import load_study
from sweeps.trial import Job

StudyWriter = Callable[..., Path]
LIMIT, CHOSEN = "model.moe.device_limit", "model.moe.num_experts_per_tok"
RATES = "standin_rates:count"


def drive(path: Path, root: Path, lines: list[str] | None = None, function: str = STANDIN) -> str:
    announce = (lines if lines is not None else []).append
    return Driver(load_study(path), root, lambda study, runs: InlineExecutor(), announce, function).run()


def trials(root: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(root / schema.JOURNAL_FILE)))
    return optuna.load_study(study_name="small", storage=storage).get_trials()


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_a_pruned_trial_is_recorded_as_what_it_is(study: StudyWriter, local: Path) -> None:
    root, lines = local / "small", list[str]()
    root.mkdir(parents=True)
    (root / "slow").write_text("0.03")
    base = pruned_study(study)
    assert drive(base, root, lines) == "finished", "a pruned trial is no failure"
    found = [t for t in trials(root) if search.REPEATS not in t.user_attrs]
    pruned = [t for t in found if t.state.name == "PRUNED"]
    assert found[0].state.name == "COMPLETE", "the baseline is the worst of all and is never pruned"
    assert found[0].params == {CHOSEN: 1, LIMIT: 1}
    assert pruned
    for trial in found:
        summaries = [read(root / "runs" / f"{trial.number:03d}-{seed}" / schema.SUMMARY_FILE) for seed in (0, 1)]
        if trial.state.name == "COMPLETE":
            assert [s["state"] for s in summaries] == [schema.FINISHED] * 2
            assert sorted(trial.intermediate_values) == list(range(1, standin.STEPS + 1)), "all of the first seed's curve"
            continue
        step = trial.user_attrs[search.PRUNED_STEP]
        assert max(trial.intermediate_values) == step < standin.STEPS
        assert trial.value == trial.intermediate_values[step], "Optuna's value of a pruned trial is its last intermediate one"
        assert step >= 4, "not in the warm-up"
        assert [s["state"] for s in summaries] == [schema.PRUNED] * 2
        assert all(s["reason"].startswith(f"pruned at step {step}: {schema.BITS_PER_BYTE} = ") for s in summaries)
        assert step <= summaries[0]["steps"] < standin.STEPS
        assert summaries[1]["steps"] == 0
        assert not (root / "runs" / f"{trial.number:03d}-1" / schema.METRICS_FILE).exists(), "its second seed never started"
    assert any("pruned at step" in line for line in lines)
    before = {path: path.read_bytes() for path in sorted(root.glob("runs/*/*.json"))}
    assert drive(base, root) == "finished"
    assert {path: path.read_bytes() for path in sorted(root.glob("runs/*/*.json"))} == before


def pruned_study(study: StudyWriter, trials: int = 6) -> Path:
    return study(
        search={"sampler": "random", "trials": trials, "seed": 2},
        space={CHOSEN: [1, 2, 4], LIMIT: {"low": 1, "high": 8}},
        baseline={CHOSEN: 1, LIMIT: 1},
        pruner={"kind": "median", "startup_trials": 2, "warmup_steps": 4},
        base=with_training(study, validate_every=4),
    )


def with_training(study: StudyWriter, **changes: Any) -> dict[str, Any]:
    import yaml

    base: dict[str, Any] = yaml.safe_load(study().read_text())["base"]
    return {**base, "training": {**base["training"], **changes}}


def test_a_trial_whose_driver_was_killed_after_the_decision_stays_pruned(study: StudyWriter, local: Path) -> None:
    root = local / "small"
    assert drive(pruned_study(study, trials=3), root) == "finished"
    trial = search.Search(load_study(pruned_study(study, trials=4)), root).ask()
    assert trial is not None
    trial.report(5.0, 6)
    trial.set_user_attr(search.PRUNED_STEP, 6)
    trial.set_user_attr(search.PRUNED_REASON, "pruned at step 6: it was no good")
    assert drive(pruned_study(study, trials=4), root) == "finished"
    for seed in (0, 1):
        summary = read(root / "runs" / f"{trial.number:03d}-{seed}" / schema.SUMMARY_FILE)
        assert (summary["state"], summary["reason"], summary["steps"]) == (schema.PRUNED, "pruned at step 6: it was no good", 0)
    assert trials(root)[trial.number].state.name == "PRUNED"
    assert trials(root)[trial.number].value == 5.0


@pytest.mark.parametrize("kind", list(pruning.OPTIONS))
def test_every_pruner_tells_a_hopeless_trial_from_the_best(study: StudyWriter, tmp_path: Path, kind: str) -> None:
    """Curves are written as runs write them; the second of two bad trials is compared with the good ones."""
    options = {"median": {"startup_trials": 2}, "percentile": {"startup_trials": 2}, "patient": {"startup_trials": 2, "patience": 1}}.get(kind, {})
    seeds = list(range(6))
    path = study(
        search={"sampler": "quasi-random", "trials": 12},
        space={LIMIT: {"low": 2, "high": 8}, "model.moe.balance.expert": {"low": 0.001, "high": 0.1, "log": True}},
        baseline={LIMIT: 2, "model.moe.balance.expert": 0.003},
        pruner={"kind": kind, **options},
        base=with_training(study, validate_every=4),
        seeds=seeds if kind == "wilcoxon" else [0],
    )
    loaded = load_study(path)
    asking = search.Search(loaded, tmp_path)
    ended = {}
    for place, level in enumerate([2.0, 2.0, 2.0, 2.0, 9.0, 9.0]):
        trial = asking.ask()
        assert trial is not None
        reason, summaries = None, dict[int, dict[str, Any]]()
        for step in range(4, 17, 4):
            file = tmp_path / "runs" / f"{trial.number:03d}-0" / schema.METRICS_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as lines:
                rising = 0.1 * step if level > 5 else -0.01 * step
                lines.write(json.dumps({"step": step, "tokens": 1, schema.BITS_PER_BYTE: level + rising}) + "\n")
            reason = reason or asking.should_prune(trial, {})
        for seed in loaded.seeds:
            summaries[seed] = {"state": schema.FINISHED, "steps": 16, "metrics": {schema.BITS_PER_BYTE: level + 0.01 * seed + 0.001 * place}}
            reason = reason or asking.should_prune(trial, summaries)
        state = schema.PRUNED if reason else schema.FINISHED
        asking.tell(trial, [{**s, "state": state} for s in summaries.values()])
        ended[trial.number] = reason
    assert ended[0] is None
    if kind == "none":
        assert set(ended.values()) == {None}
        return
    assert all((ended[4], ended[5])), ended
    assert [t.state.name for t in trials(tmp_path)][4:] == ["PRUNED", "PRUNED"]
    assert asking.study.pruner.kind in str(ended[5])


def test_the_options_of_a_pruner_are_its_own() -> None:
    assert Pruner(kind="percentile", percentile=10.0).options["percentile"] == 10.0
    for wrong in ({"percentile": 10.0}, {"startup_trials": 0}, {"patience": 1}, {"min_resource": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Pruner(kind="median", **wrong)  # type: ignore[arg-type]
    assert pruning.least_seeds(Pruner(kind="wilcoxon")) == 5
    assert pruning.least_seeds(Pruner(kind="wilcoxon", p_threshold=0.3)) == 3


def test_a_curve_is_read_on_and_a_line_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "m.jsonl", "x")
    assert curve.news() == []
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"step": 1, "x": 2.0}\n{"step": 2, "y": 2.0}\n{"step": 3, "x": NaN}\n{"step": 4, "x"')
        file.flush()
        assert curve.news() == [(1, 2.0)]
        file.write(": 5.0}\n")
    assert curve.news() == [(4, 5.0)]
    assert curve.news() == []


RETUNED: dict[str, Any] = {"retune": {"learning_rates": [0.0005, 0.002, 0.05], "tokens_share": 0.5}, "seeds": [0]}


def test_a_learning_rate_is_found_for_every_variant_and_its_runs_are_no_replicates(study: StudyWriter, local: Path) -> None:
    root, lines = local / "studies" / "small", list[str]()
    path = study(space={CHOSEN: [2, 6]}, baseline={CHOSEN: 6}, **RETUNED)
    driver: Driver

    def stopping(*_: Any) -> InlineExecutor:
        executor = InlineExecutor()
        begin = executor.start

        def start(job: Job) -> None:
            begin(job)
            driver.stopping = driver.stopping or job.run == "001-lr1"

        executor.start = start  # type: ignore[method-assign]
        return executor

    root.mkdir(parents=True)
    (root / "slow").write_text("0.02")
    driver = Driver(load_study(path), root, stopping, lines.append, RATES)
    assert driver.run() == "stopped"
    assert not (root / "runs" / "001-0").exists()
    assert drive(path, root, lines, RATES) == "finished", "a rate that diverges is an answer"
    runs = {p.parent.name: read(p) for p in root.glob(f"runs/*/{schema.RUN_FILE}")}
    assert sorted(runs) == sorted([f"{n:03d}-{what}" for n in (0, 1) for what in ("0", "lr0", "lr1", "lr2")])
    short = read(root / "runs" / "001-lr0" / schema.CONFIG_FILE)
    assert short["training"]["train_tokens"] == 1024
    assert short["training"]["optimizer"]["learning_rate"] == 0.0005
    assert short["training"]["optimizer"]["warmup_steps"] == 1000, "the same share of the tokens"
    assert read(root / "runs" / "001-lr2" / schema.SUMMARY_FILE)["state"] == schema.DIVERGED
    for number in (0, 1):
        about = runs[f"{number:03d}-0"]
        assert about["role"] == "replicate"
        assert about["retune"]["learning_rate"] == standin_rates.BEST
        assert about["retune"]["edge"] is False
        assert [t["state"] for t in about["retune"]["tried"]] == ["finished", "finished", "diverged"]
        assert read(root / "runs" / f"{number:03d}-0" / schema.CONFIG_FILE)["training"]["optimizer"]["learning_rate"] == standin_rates.BEST
        assert {runs[f"{number:03d}-lr{i}"]["role"] for i in range(3)} == {"retune"}
    assert [t.state.name for t in trials(root)] == ["COMPLETE"] * 2
    assert len(trials(root)[0].user_attrs[f"seeds:{schema.BITS_PER_BYTE}"]) == 1
    assert {run.name for run in store.load(root).runs} == {"000-0", "001-0"}, "the report's statistics know replicates alone"
    state = read(root / schema.STATE_FILE)
    assert (state["planned"], len(state["runs"])) == (8, 8)


def test_the_rate_is_chosen_by_the_lowest_and_an_edge_is_flagged() -> None:
    def ended(*values: float | None) -> list[dict[str, Any]]:
        return [{"state": "diverged", "metrics": {}} if v is None else {"state": "finished", "metrics": {schema.BITS_PER_BYTE: v}} for v in values]

    assert Retune(factors=[2.0, 0.5, 1.0]).rates(0.1) == pytest.approx([0.05, 0.1, 0.2])
    inner, edge = choose([1.0, 2.0, 3.0], ended(3, 2, 4), 1.0), choose([1.0, 2.0, 3.0], ended(3, 2.5, 2), 1.0)
    assert (inner["learning_rate"], inner["edge"]) == (2.0, False)
    assert (edge["learning_rate"], edge["edge"]) == (3.0, True)
    none = choose([1.0, 2.0], ended(None, None), 1.5)
    assert (none["learning_rate"], none["chosen_by"]) == (1.5, "default: no short run finished")


def test_a_short_run_is_the_same_run_but_shorter(study: StudyWriter) -> None:
    loaded = load_study(study(base=with_training(study, batch_ramp_from=2, batch_ramp_tokens=1000)))
    config = loaded.run_config(loaded.baseline, 0)
    short = short_config(config, Retune(factors=[1.0, 2.0], tokens_share=0.25), 0.5)
    assert (short.training.train_tokens, short.training.batch_ramp_tokens, short.training.optimizer.learning_rate) == (512, 250, 0.5)
    assert short.model == config.model
    assert short.data == config.data


def test_the_baseline_and_the_cells_of_a_design_are_never_pruned(study: StudyWriter, tmp_path: Path) -> None:
    """With several workers others may have ended long before the baseline."""
    asking = search.Search(load_study(pruned_study(study, trials=9)), tmp_path)
    baseline, *good = [trial for _ in range(5) if (trial := asking.ask()) is not None]

    def curve(number: int, level: float) -> None:
        file = tmp_path / "runs" / f"{number:03d}-0" / schema.METRICS_FILE
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps({"step": s, "tokens": 1, schema.BITS_PER_BYTE: level}) + "\n" for s in (4, 8, 12)))

    for trial in good[:3]:
        curve(trial.number, 2.0)
        asking.tell(trial, [{"state": schema.FINISHED, "steps": 16, "metrics": {schema.BITS_PER_BYTE: 2.0}}] * 2)
    curve(baseline.number, 9.0)
    curve(good[3].number, 9.0)
    assert asking.should_prune(good[3], {}) is not None
    assert asking.should_prune(baseline, {}) is None
