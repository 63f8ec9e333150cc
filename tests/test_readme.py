"""The README is run: its cheap commands whole, of the others every option, every link and every make target."""

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from tests import doors

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines() if line.strip()]
OURS = [shlex.split(line) for line in COMMANDS if line.startswith("python -m")]
CHEAP = {("research", "presets"), ("research", "describe"), ("research", "data"), ("sims", "all-to-all"), ("sims", "sweep"), ("sims", "clusters"),
         ("sims", "training-step"),          ("sweeps", "check"), ("sweeps", "plan")}  # fmt: skip


@pytest.mark.parametrize("words", [w for w in OURS if tuple(w[2:4]) in CHEAP], ids=" ".join)
def test_a_command_of_the_readme_runs(words: list[str], tmp_path: Path) -> None:
    done = doors.call(words[2], *words[3:], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40


def test_the_readme_has_the_commands_that_it_should() -> None:
    assert {tuple(words[2:4]) for words in OURS} >= CHEAP
    assert {"make ablation", "make test"} <= set(COMMANDS)
    assert "ray start --head" in COMMANDS
    assert any(line.startswith("ray job submit --address http://127.0.0.1:8265 --working-dir . -- python -m sweeps run") for line in COMMANDS)


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_commands_and_options_of_the_readme_exist(words: list[str]) -> None:
    command: click.Command = typer.main.get_command(importlib.import_module(f"{words[2]}.__main__").app)
    rest = words[3:]
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        assert rest[0] in command.commands, words  # type: ignore[union-attr]
        command = command.commands[rest.pop(0)]  # type: ignore[union-attr]
    known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known


def test_links_and_targets_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (REPOSITORY / target).exists(), target
    makefile = (REPOSITORY / "Makefile").read_text()
    for name in {line.split()[1] for line in COMMANDS if line.startswith("make ")} | set(re.findall(r"`make ([a-z]+)`", TEXT)):
        assert re.search(rf"^{name}:", makefile, re.M), name


def help_of(room: str, *command: str) -> str:
    done = doors.call(room, *command, "--help", cwd=REPOSITORY)
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("room", ["research", "sims", "sweeps", "reports"])
def test_every_command_has_help_with_an_example(room: str) -> None:
    command = typer.main.get_command(importlib.import_module(f"{room}.__main__").app)
    seen = 0

    def visit(node: click.Command, path: list[str]) -> None:
        nonlocal seen
        if hasattr(node, "commands"):
            for name, child in node.commands.items():
                visit(child, [*path, name])
            return
        seen += 1
        assert "Example: python -m" in (node.help or ""), path
        assert f"python -m {room} {' '.join(path)}" in (node.help or ""), path

    visit(command, [])
    assert seen
    assert "Usage" in help_of(room)
