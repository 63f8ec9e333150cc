"""The benchmark on a CPU: that it runs without the rest of the house, that its checks can fail, and that its page says what was found."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import torch

from research import accounting
from research.benchmark import correctness, models, peaks, timing
from research.benchmark.machine import Machine, describe_machine
from research.benchmark.measure import Measured
from research.benchmark.models import measure_decode, measure_training
from research.benchmark.page import render, write_page
from research.benchmark.peaks import Peaks, measure_grouped, measure_peaks
from research.benchmark.plan import CPU, CUDA, QUICK, SLICE, make_plan, model_config
from research.benchmark.step import Trainer, random_model, random_tokens
from research.devices import choose_device
from research.errors import UserError
from research.model.experts import grouped_experts
from research.model.kernels import native
from research.presets import preset
from research.training import checkpoint

REPOSITORY = Path(__file__).parents[2]
CPU_DEVICE = torch.device("cpu")
FOREIGN = ("ray", "mlflow", "optuna", "transformers", "simpy", "scipy", "sklearn", "matplotlib", "plotly", "jinja2")
RUN_WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {absent!r} else find(name, *rest)
sys.argv = ["research", *{arguments!r}]
import runpy
runpy.run_module({module!r}, run_name="__main__")
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def run_without(absent, module, *arguments):
    code = RUN_WITHOUT.format(absent=absent, module=module, arguments=[str(a) for a in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=120)


@pytest.mark.parametrize(
    ("module", "command", "absent"),
    [("research", ["benchmark"], FOREIGN), ("research.benchmark", [], (*FOREIGN, "pyarrow", "yaml", "filelock"))],
)
def test_it_runs_where_only_torch_and_a_terminal_are_installed(tmp_path, module, command, absent):
    done = run_without(absent, module, *command, "--device", "cpu", "--quick", "--out", tmp_path / "pages", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    (page,) = (tmp_path / "pages").glob("*.md")
    assert page.name.startswith(date.today().isoformat())
    assert page.name.endswith("-quick.md")
    assert json.loads(page.with_suffix(".json").read_text()) == said
    assert said["passed"]
    assert said["failures"] == []
    assert said["machine"]["torch"] == torch.__version__
    assert {check["name"] for check in said["checks"]} == set(correctness.CHECKS) - set(correctness.ON_CARDS)
    assert [t["model"] for t in said["training"]] == ["deepseek-v2-nano"]
    assert [d["context"] for d in said["decode"]] == list(QUICK.contexts)
    text = page.read_text()
    for words in (said["command"], said["machine"]["card"], torch.__version__, "MFU", "times the floor", "--quick"):
        assert words in text


def test_its_own_modules_need_neither_pydantic_nor_the_data():
    code = "import sys, research.benchmark.cli, research.benchmark.measure, research.benchmark.page; print('research.data' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.split() == ["False", "False"]


def test_the_foreign_modules_really_are_absent():
    done = run_without(FOREIGN, "ray")
    assert done.returncode != 0
    assert "No module named" in done.stderr


# ---- checks


def checks():
    return {check.name: check for check in correctness.run_checks(CPU_DEVICE)}


def test_on_one_cpu_all_checks_pass_and_a_resumed_run_repeats_to_the_bit():
    found = checks()
    assert all(check.passed for check in found.values()), found
    assert found["losses after a resumed checkpoint"].difference == 0.0


def test_a_wrong_fast_path_fails_its_own_checks(monkeypatch):
    def slanted(x, routing, gate_up, down):
        return grouped_experts(x, routing, gate_up, down) * (1.001 if x.dtype == torch.float32 else torch.nan)

    monkeypatch.setattr(correctness, "grouped_experts", slanted)
    failed = {check.name: check.difference for check in checks().values() if not check.passed}
    assert failed == pytest.approx(
        {
            "grouped experts against a loop, float32, with gradients": 1e-3,
            "grouped experts against a loop, bfloat16, with gradients": float("inf"),
        },
        rel=0.01,
    )


def test_a_check_that_breaks_is_failed_with_its_reason_and_the_others_go_on(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel\n  for this card")

    monkeypatch.setattr(native, "library", lambda: None)  # decoding by the kernels does not call it
    monkeypatch.setattr(correctness.MultiHeadLatentAttention, "absorbed", broken)
    failed = {check.name: check for check in checks().values() if not check.passed}
    assert set(failed) == {"absorbed against expanded attention, float32", "prefill and decode against one pass, float32"}
    assert {check.error for check in failed.values()} == {"RuntimeError: no kernel for this card"}


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_moments_that_do_not_come_back_are_seen(monkeypatch, key):
    load = checkpoint.load

    def forgetful(folder, model, optimizer, config):
        found = load(folder, model, optimizer, config)
        for state in optimizer.state.values():
            state[key].zero_()
        return found

    monkeypatch.setattr(correctness.checkpoint, "load", forgetful)
    assert not checks()["losses after a resumed checkpoint"].passed


# ---- rates


def fake_clock(monkeypatch, seconds):
    """Every measured piece of work takes `seconds`; it is still done once."""

    def took(work, device, *, repeats, warmup=2):
        work()
        return seconds

    for module in (peaks, models):
        monkeypatch.setattr(module, "median_seconds", took)


PEAKS = Peaks(
    product_size=8,
    product_flops_per_second={"float32": 1e9, "bfloat16": 2e9},
    copy_bytes=8,
    copy_bytes_per_second=1e8,
    read_bytes_per_second=2e8,
)


def test_rates_are_work_over_time(monkeypatch):
    fake_clock(monkeypatch, 0.5)
    found = measure_peaks(CPU_DEVICE, size=10, copy_bytes=4000, repeats=1)
    assert found.product_flops_per_second == {"bfloat16": 4000.0, "float32": 4000.0}
    assert (found.copy_bytes_per_second, found.read_bytes_per_second, found.bytes_per_second) == (16000.0, 8000.0, 16000.0)
    grouped = measure_grouped(CPU_DEVICE, PEAKS, (3, 8, 12), 5, repeats=1)
    assert grouped.forward_flops_per_second == 2 * 3 * 5 * 8 * 12 / 0.5
    assert grouped.both_flops_per_second == 3 * grouped.forward_flops_per_second
    assert grouped.both_of_peak == grouped.both_flops_per_second / 1e9


def test_mfu_and_the_floor_are_the_closed_forms_over_the_peaks(monkeypatch):
    fake_clock(monkeypatch, 0.25)
    config = preset("deepseek-v2-nano")
    trained = measure_training("nano", config, CPU_DEVICE, PEAKS, 2, 16, repeats=1)
    assert trained.tokens_per_second == 2 * 16 / 0.25
    assert trained.mfu == pytest.approx(128 * accounting.train_flops_per_token(config, 16) / 1e9)
    assert trained.peak_memory_bytes is None
    decoded = measure_decode("nano", config, CPU_DEVICE, PEAKS, (4, 9), 2, repeats=1)
    assert [d.seconds_per_token for d in decoded] == [0.125, 0.125]
    for rate, context in zip(decoded, (4, 9), strict=True):
        size = 4 * (accounting.activated_parameters(config) + context * accounting.kv_cache_elements_per_token(config))
        assert rate.floor_seconds == pytest.approx(size / 2e8)
        assert rate.times_floor == pytest.approx(0.125 / rate.floor_seconds)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def spent(config, device, batch_size, length, repeats):
        tried.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(models, "_step_seconds", spent)
    config = preset("deepseek-v2-nano")
    assert measure_training("nano", config, CPU_DEVICE, PEAKS, 12, 8, repeats=1).batch_size == 1
    assert tried == [12, 6, 3, 1]
    monkeypatch.setattr(models, "_step_seconds", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("spent")))
    with pytest.raises(torch.OutOfMemoryError):
        measure_training("nano", config, CPU_DEVICE, PEAKS, 4, 8, repeats=1)


def test_the_median_leaves_out_the_warm_up(monkeypatch):
    times = iter([0.0, 9.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    calls = []
    assert timing.median_seconds(lambda: calls.append(1), CPU_DEVICE, repeats=3, warmup=2) == 4.0
    assert len(calls) == 5


def test_the_step_learns_and_a_model_is_the_same_for_a_seed():
    config = preset("deepseek-v2-nano")
    a, b, other = (random_model(config, CPU_DEVICE, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, other.lm_head.weight)
    assert a.lm_head.weight.std().item() == pytest.approx(config.initializer_range, rel=0.05)
    assert random_model(config, CPU_DEVICE, torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    trainer, ids = Trainer(a), random_tokens(config, (2, 33), CPU_DEVICE)
    losses = [float(trainer.step(ids)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


# ---- plans, devices, pages


def test_plans():
    assert make_plan(CPU_DEVICE, [], quick=False) is CPU
    assert make_plan(torch.device("cuda"), [], quick=False) is CUDA
    chosen = make_plan(torch.device("cuda"), [SLICE, "dense-nano", SLICE], quick=False)
    assert (list(chosen.training), chosen.decode) == ([SLICE, "dense-nano"], (SLICE, "dense-nano"))
    assert chosen.training[SLICE] == CUDA.training[SLICE]
    with pytest.raises(UserError, match=r"--preset = 'v9': no such preset; valid: deepseek-v2, .*deepseek-v2-lite-slice"):
        make_plan(CPU_DEVICE, ["v9"], quick=True)


def test_the_slice_has_the_widths_of_v2_lite():
    whole, part = preset("deepseek-v2-lite"), model_config(SLICE)
    assert (part.attention, part.moe, part.hidden_size) == (whole.attention, whole.moe, whole.hidden_size)
    assert part.moe_layers == (1, 2, 3)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "meta", ""])
def test_devices_that_are_none(name):
    with pytest.raises(UserError, match=f"--device = '{name}'"):
        choose_device(name)


def measured(**changes):
    passed = correctness.Check(name="a | b", bound=1e-3, difference=1e-4)
    return Measured(**{"checks": [passed], "peaks": PEAKS, **changes})


def test_a_page_is_not_written_over_and_says_what_failed(tmp_path):
    machine, day = describe_machine(CPU_DEVICE), date(2026, 1, 2)
    first = write_page(tmp_path, machine, measured(), "python -m research benchmark", day, quick=False)
    broken = correctness.Check(name="c", bound=1e-3, difference=None, error="RuntimeError: gone")
    found = measured(checks=[broken], failures=["training x: RuntimeError: no"])
    second = write_page(tmp_path, machine, found, "python -m research benchmark", day, quick=False)
    assert (first.name, second.name) == (f"2026-01-02-{machine.slug}.md", f"2026-01-02-{machine.slug}-2.md")
    assert json.loads(second.with_suffix(".json").read_text())["passed"] is False
    assert "| a \\| b | 1.0e-04 | 1e-03 | passed |" in first.read_text()
    assert "| c | none | 1e-03 | **failed** RuntimeError: gone |" in second.read_text()
    assert "* training x: RuntimeError: no" in second.read_text()
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json"}


def test_a_card_is_part_of_a_file_name():
    about = dict.fromkeys(("memory_bytes", "compute_capability", "driver", "cuda", "commit"))
    plain = {"device": "cuda", "torch": "2.11.0", "numpy": "2", "python": "3.12", "system": "Linux", "threads": 1}
    machine = Machine(card="NVIDIA H100 80GB HBM3 (PCIe)", **about, **plain)
    assert machine.slug == "nvidia-h100-80gb-hbm3-pcie"
    assert "| driver |" not in render(machine, measured(), "x", date(2026, 1, 2), quick=False)


def test_the_commands_exit_code_says_that_something_failed(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from research.__main__ import app

    monkeypatch.setattr("research.benchmark.measure.measure", lambda *_: measured(failures=["x"]))
    done = CliRunner().invoke(app, ["benchmark", "--device", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 3
    assert "Not measured" in done.stdout
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["benchmark", "--device", "cpu", "--out", str(tmp_path / "file")])
    assert isinstance(done.exception, UserError)
    assert "cannot be made" in str(done.exception)
