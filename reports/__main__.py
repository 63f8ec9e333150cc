"""`python -m reports`: what was recorded, and what it means.

Exit codes: 0; 1 a store that cannot be read; 2 wrong usage; 3 the page was built, but the study is incomplete (and the page says where).

Example: python -m reports build quickstart
"""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from reports import places, verdict
from reports.build import Built, build_record
from reports.document import plain
from reports.store import StudyRecord, load
from research.errors import UserError
from sweeps import schema

INCOMPLETE = 3

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
StudyArgument = Annotated[
    str, typer.Argument(help="A study's root directory, its YAML file, or its name under $MOELAB_HOME/studies (.moelab/studies here)")
]
Out = Annotated[Path | None, typer.Option(help="Folder to write to")]
Mlflow = Annotated[str | None, typer.Option("--mlflow", metavar="URI", help="Read the study of this name out of an MLflow store, not of its root")]
Json = Annotated[bool, typer.Option("--json", help="The whole analysis as one JSON object")]


@app.command()
def build(
    study: StudyArgument,
    out: Out = None,
    mlflow: Mlflow = None,
    effect: Annotated[
        list[float] | None, typer.Option(help="An effect, in the objective's unit, for which the needed seeds are asked; repeatable")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="With --mlflow: write the verdict into the study's run there, as tag moelab.verdict")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a study's report: report.html, report.md, figures/, tables/, data/, manifest.json; by default into report/ in its root.

    Exit code 3 if the study is incomplete: not finished, failed runs, a missing metric, fewer than two seeds of the baseline, runs
    of another schema.  Example: python -m reports build quickstart --effect 0.01
    """
    for size in effect or []:
        if not 0 < size < math.inf:
            raise typer.BadParameter(f"{size} must be a number > 0, in the objective's unit", param_hint="--effect")
    if publish and mlflow is None:
        raise typer.BadParameter("goes with --mlflow URI: it says where", param_hint="--publish")
    record, root = _record(study, mlflow)
    built = build_record(record, out or root / schema.REPORT_DIRECTORY, effect or ())
    if publish and mlflow is not None:
        from reports.mlflow_store import publish as publish_verdict  # noqa: PLC0415

        publish_verdict(record.name, mlflow, verdict.headline(built.analysis))
    if as_json:
        print(json.dumps(built.to_dict(), ensure_ascii=False))
    else:
        _say(built)
    if not built.complete:
        sys.exit(INCOMPLETE)


@app.command()
def compare(a: StudyArgument, b: StudyArgument, out: Out = None, mlflow: Mlflow = None, as_json: Json = False) -> None:
    """Two studies side by side: baselines, shared variants, what differs in their configuration; a page under $MOELAB_HOME/reports.

    Exit code 3 if one of them is incomplete.  Example: python -m reports compare quickstart device_limit
    """
    from reports.comparison import compare_records  # noqa: PLC0415  (each command loads what it needs)

    first, second = (_record(study, mlflow)[0] for study in (a, b))
    found = compare_records(first, second, out or places.home() / "reports" / f"compare-{first.name}-{second.name}")
    print(json.dumps(found.to_dict(), ensure_ascii=False) if as_json else f"{plain(found.answer)}\nreport: {found.html}")
    if not found.complete:
        sys.exit(INCOMPLETE)


@app.command()
def index(
    home: Annotated[Path | None, typer.Option(help="Folder that holds studies/; default: $MOELAB_HOME")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """All studies on one page: question, verdict, date and state; under $MOELAB_HOME/reports.

    Exit code 3 if a study cannot be read.  Example: python -m reports index
    """
    from reports.overview import overview, spoken  # noqa: PLC0415

    place = home.absolute() if home else places.home()
    found = overview(place / "studies", out or place / "reports" / "index")
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        for row in found.rows:
            print(spoken(row))
        print(f"index: {found.html}")
    if not found.complete:
        sys.exit(INCOMPLETE)


@app.command()
def claims(
    study: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|PATH", help="A study (root, YAML, name, or report folder) whose results fill the measured rows; repeatable"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to")] = Path("reports/generated/claims"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if the page in --out is not what is computed now")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The rows as one JSON object")] = False,
) -> None:
    """The paper's claims, published beside recomputed: claims.html, claims.md, figures/, data/claims.csv; some fifteen seconds.

    Example: python -m reports claims --study device_limit --json
    """
    from reports.claims import build as page  # noqa: PLC0415  (the simulators, which no other command needs)

    found = page.claims(study or (), say=lambda text: print(f"{text} ...", file=sys.stderr))
    for name in found.unused:
        print(f"--study {name}: answers no claim (which rule a row is read by stands in its last column)", file=sys.stderr)
    if check and (problems := page.differences(found, out)):
        raise UserError(*problems)
    if not check:
        page.write(found, out)
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        print(f"{plain(found.document.answer)}\n" + (f"as in {out}" if check else f"page: {out / page.HTML}"))


def _record(study: str, mlflow: str | None) -> tuple[StudyRecord, Path]:
    """The record, and the root that it has or would have."""
    root = places.study_root(study)
    if mlflow is None:
        return load(root), root
    from reports.mlflow_store import load as load_tracked  # noqa: PLC0415  (mlflow takes seconds to import)

    return load_tracked(places.study_name(study), mlflow), root


def _say(built: Built) -> None:
    print(plain(verdict.headline(built.analysis)))
    print(f"report: {built.html}\n        {built.html.with_name('report.md')}")
    for problem in built.analysis.incomplete:
        print(f"incomplete: {problem.place}: {problem.text}", file=sys.stderr)


def main() -> None:
    """The door: a UserError becomes its sentences on stderr and exit code 1."""
    try:
        app()
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
