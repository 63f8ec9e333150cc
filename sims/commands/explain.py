"""`explain`: why a prediction is what it is."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from research.configfile import read_yaml, validate
from research.errors import ConfigError
from research.routing_trace import RoutingTrace
from research.terminal import console
from sims.all_to_all import AllToAll
from sims.commands import all_to_all, app, serving, training_step
from sims.explain.all_to_all import explain_all_to_all
from sims.explain.sensitivity import Explanation
from sims.explain.serving import explain_serving
from sims.explain.training import explain_training_step
from sims.serving.spec import serving as serving_spec
from sims.training.door import training_step_spec

Question = tuple[Any, RoutingTrace | None]
SHOWN, BAR = 12, 30


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of question is asked on a command line, read from a file, and explained."""

    asked: Callable[[Mapping[str, Any]], Question]
    read: Callable[[dict[str, Any], str], Any]
    explain: Callable[..., Explanation]


KINDS = {
    "all-to-all": Kind(all_to_all.question_of, lambda mapping, source: validate(AllToAll, mapping, source), explain_all_to_all),
    "training-step": Kind(training_step.question_of, lambda mapping, source: training_step_spec(mapping), explain_training_step),
    "serving": Kind(serving.question_of, serving_spec, explain_serving),
}


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def explain(
    context: typer.Context,
    kind: Annotated[Literal["all-to-all", "training-step", "serving"], typer.Argument(help="The question; its own command's options follow")],
    spec: Annotated[Path | None, typer.Option("--spec", help="JSON or YAML of the question's fields, in place of options")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables")] = False,
) -> None:
    """What binds, where time goes, how much each constant matters, what would change it.  Example: python -m sims explain all-to-all --nodes 2

    All options of the command of that name (python -m sims all-to-all --help) are understood, `--set path=value` too.
    Or: python -m sims explain serving --spec mine.json
    """
    if spec is not None and context.args:
        raise ConfigError(f"--spec {spec}: the file holds the whole question; leave out {' '.join(context.args)}")
    question, trace = KINDS[kind].asked(_parameters(kind, context)) if spec is None else (_read(kind, spec), None)
    found = KINDS[kind].explain(question, trace)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    _print(found)


def _parameters(kind: str, context: typer.Context) -> Mapping[str, Any]:
    """The options after the kind, read as that command reads them."""
    group = typer.main.get_command(app)
    command = group.get_command(context, kind)  # type: ignore[attr-defined]
    return dict(command.make_context(f"explain {kind}", list(context.args), parent=context.parent).params)


def _read(kind: str, path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"--spec {path}: there is no such file")
    return KINDS[kind].read(read_yaml(path), str(path))


def _print(found: Explanation) -> None:
    scale, unit = (1e6, "us") if found.question == "all-to-all" else (1e3, "ms") if found.question == "serving" else (1.0, "s")
    p10, p50, p90 = (value * 1e6 if found.unit == "s" and unit == "us" else value for value in found.answer)
    print(f"{p50:,.2f} {'us' if unit == 'us' else found.unit} (P10 {p10:,.2f}, P90 {p90:,.2f})\n{found.bottleneck}")
    total = sum(found.parts.values()) or 1.0
    parts = Table("where time goes", unit, "%", "")
    for name, seconds in sorted(found.parts.items(), key=lambda part: -part[1]):
        parts.add_row(name.replace("_", " "), f"{seconds * scale:,.3f}", f"{100 * seconds / total:.1f}", "█" * round(BAR * seconds / total))
    console().print(parts)
    constants = Table("constant", "elasticity", "answer, +10 %", "-10 %", "from", title="Per cent of the answer for one per cent of the constant")
    for each in found.sensitivities[:SHOWN]:
        up, down = (100 * (value / found.base - 1) for value in (each.up, each.down))
        constants.add_row(each.constant, f"{each.elasticity:+.3f}", f"{up:+.2f} %", f"{down:+.2f} %", each.source[:80])
    console().print(constants)
    for sentence in found.switches:
        print(f"- {sentence}")
    for warning in found.warnings:
        print(f"note: {warning}")
