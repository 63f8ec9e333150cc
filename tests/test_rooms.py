"""The direction of imports between the rooms, held by import-linter, and that the plain values are light."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def test_contracts_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("research.config", ["torch", "ray", "mlflow"]),
        ("research.accounting", ["torch"]),
        ("research.__main__", ["torch", "ray", "mlflow", "optuna"]),
        ("sims.__main__", ["torch", "ray", "mlflow", "optuna"]),
        ("reports.__main__", ["torch", "ray", "simpy"]),
        ("sweeps.__main__", ["torch", "ray", "mlflow"]),
    ],
)
def test_a_door_opens_without_what_its_room_does_not_need(module: str, never: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {never!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"
