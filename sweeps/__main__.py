"""`python -m sweeps`: studies from a file to a store.

Exit codes: 0; 1 a mistake in a file, or what cannot be done; 2 wrong usage; 3 finished with failures; 143 stopped.
"""

# Every command imports what it needs itself: `status` and `--help` answer at once, and Ray, MLflow and torch take seconds.

import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from research.errors import UserError
from research.terminal import console
from sweeps import schema
from sweeps.places import home, started_root, study_root, tracking_uri

if TYPE_CHECKING:
    from sweeps.study import Study

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

StudyFile = Annotated[Path, typer.Argument(help="A study's YAML file, such as sweeps/studies/quickstart.yaml", exists=True, dir_okay=False)]
StudyName = Annotated[str, typer.Argument(help="A study's name, root or YAML file")]
Root = Annotated[Path | None, typer.Option(help="The study's directory; default $MOELAB_HOME/studies/NAME (.moelab here)")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="path=value over the file, such as seeds=[0] or base.training.train_tokens=200000")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text")]
DriveAsJson = Annotated[bool, typer.Option("--json", help="Progress goes to stderr; in the end what `status --json` says, as one JSON object")]
ExecutorName = Annotated[str, typer.Option("--executor", help="ray, or inline: no Ray, one run after another in this process")]
Function = Annotated[str, typer.Option(hidden=True)]
REAL = "sweeps.trial:run_trial"


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Of the study and its file")] = "study",
    folder: Annotated[Path, typer.Option(help="Where the file goes", file_okay=False)] = Path(),
    as_json: AsJson = False,
) -> None:
    """Write a commented study file that can be run as it is; asks nothing.  Example: python -m sweeps init latent"""
    from sweeps.init import init as write

    path = write(name, folder)
    following = [f"python -m sweeps {command} {path}" for command in ("check", "plan", "run")]
    print(json.dumps({"file": str(path), "next": following}) if as_json else "\n".join([f"{path}: edit it, then", *(f"  {c}" for c in following)]))


@app.command()
def check(study: StudyFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find every mistake in a study file; starts nothing.  Example: python -m sweeps check sweeps/studies/quickstart.yaml"""
    from sweeps.check_cells import notes
    from sweeps.study import load_study

    try:
        loaded = load_study(study, overrides or [])
    except UserError as error:
        if not as_json:
            raise
        print(json.dumps({"file": str(study), "ok": False, "problems": list(error.problems)}, indent=1, ensure_ascii=False))
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"file": str(study), "ok": True, "problems": [], "notes": list(notes(loaded)), "study": loaded.name}, ensure_ascii=False))
    else:
        for note in notes(loaded):
            print(f"note: {note}")
        print(f"{study}: all right ({loaded.name}: {loaded.question})")


@app.command()
def plan(study: StudyFile, root: Root = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """How many runs, parameters, FLOPs, memory and time; starts nothing.  Example: python -m sweeps plan sweeps/studies/quickstart.yaml"""
    from rich.table import Table

    from sweeps.plan import plan as make_plan
    from sweeps.study import load_study

    loaded = load_study(study, overrides or [])
    asked = loaded.resources
    cpus = asked.cpus_per_worker * asked.workers_per_trial
    workers = asked.workers if asked.workers != "auto" else max((os.cpu_count() or 1) // cpus, 1)
    planned = make_plan(loaded, _root(loaded, root), workers)
    if as_json:
        print(json.dumps(planned, indent=1))
        return
    table = Table("variant", title=planned["question"], title_justify="left")
    for heading in ("parameters", "activated", "KV bytes/token", "tokens", "TFLOP", "memory MB", "seconds"):
        table.add_column(heading, justify="right")
    for row in planned["rows"]:
        table.add_row(
            row["variant"],
            f"{row['total_parameters']:,}",
            f"{row['activated_parameters']:,}",
            f"{row['kv_cache_bytes_per_token']:,.0f}",
            f"{row['train_tokens']:,}",
            f"{row['train_flops'] / 1e12:.2f}",
            f"{row['memory_bytes'] / 1e6:,.0f}",
            f"{row['seconds']:,.0f}",
        )
    console().print(table)
    for note in planned["notes"]:
        print(f"note: {note}")
    short = f" + {planned['retune_runs']} short ones" if planned["retune_runs"] else ""
    print(
        f"{planned['variants']} variants x {planned['seeds']} seeds{short} = {planned['runs']} runs on {planned['workers']} workers, "
        f"about {planned['expected_seconds'] / 60:.1f} minutes ({planned['estimate']})"
    )


@app.command()
def run(
    study: StudyFile,
    root: Root = None,
    overrides: Overrides = None,
    executor: ExecutorName = "ray",
    function: Function = REAL,
    as_json: DriveAsJson = False,
) -> None:
    """Run a study, or go on with it.  Example: python -m sweeps run sweeps/studies/quickstart.yaml"""
    from sweeps.study import load_study

    if executor not in ("ray", "inline"):
        raise typer.BadParameter(f"{executor!r} is neither 'ray' nor 'inline'", param_hint="--executor")
    loaded = load_study(study, overrides or [])
    _drive(loaded, _root(loaded, root), executor, function, {} if as_json else None)


@app.command()
def resume(
    study: StudyFile,
    root: Root = None,
    overrides: Overrides = None,
    executor: ExecutorName = "ray",
    function: Function = REAL,
    as_json: DriveAsJson = False,
) -> None:
    """The same as run: what is finished stays, what was interrupted goes on.  Example: python -m sweeps resume sweeps/studies/quickstart.yaml"""
    run(study, root, overrides, executor, function, as_json)


@app.command()
def submit(
    study: StudyFile,
    address: Annotated[str, typer.Option(help="The Ray dashboard's address")] = "http://127.0.0.1:8265",
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option(help="Follow the job's output and end with its exit code")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a study as a Ray job on a cluster.  Example: python -m sweeps submit sweeps/studies/quickstart.yaml --wait"""
    from sweeps.jobs import submit as submit_job
    from sweeps.study import load_study

    loaded = load_study(study, overrides or [], here=False)
    arguments = [part for override in overrides or [] for part in ("--set", override)]
    job = submit_job(study, address, arguments)
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    if as_json:
        print(json.dumps({"submission": job.submission, "address": address, "root": str(_root(loaded, None))}), flush=True)
    else:
        print(f"submitted {job.submission}; its studies are in {home()}")
        print(f"follow it:  {token}ray job logs --address {address} --follow {job.submission}")
        print(f"end it:     {token}ray job stop --address {address} {job.submission}", flush=True)
    if wait and (code := job.follow(sys.stderr if as_json else sys.stdout)):
        raise typer.Exit(code)


@app.command()
def status(
    study: StudyName,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object; with --watch one per line whenever something changes")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Until it no longer runs")] = False,
) -> None:
    """How far a study is: best so far, expected end, failures by class, every variant.  Example: python -m sweeps status quickstart --watch"""
    from sweeps import progress
    from sweeps.status import Reader, StudyStatus

    def show(found: StudyStatus) -> None:
        if as_json:
            print(json.dumps(found.to_dict(), indent=None if watch else 1, ensure_ascii=False), flush=True)
        else:
            console().print(progress.View(lambda: found))

    root = started_root(study)
    if watch:
        progress.watch(root, show)
    else:
        show(Reader(root).read())


@app.command()
def stop(
    study: StudyName,
    wait: Annotated[bool, typer.Option("--wait", help="Until its checkpoints are written and it has ended")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="With --wait: seconds, after which the exit code is 1")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Ask a running study to write its checkpoints and end.  Example: python -m sweeps stop quickstart --wait"""
    from sweeps.lease import holder_of, is_driven
    from sweeps.status import read_json

    root = study_root(study)
    if not is_driven(root):
        raise UserError(f"{root}: is not running")
    holder = holder_of(root)
    if holder["host"] != platform.node():
        raise UserError(f"{root}: is run by process {holder['pid']} on {holder['host']}: stop it there, or with `ray job stop` if it was submitted")
    try:
        os.kill(holder["pid"], signal.SIGTERM)
    except PermissionError as error:
        raise UserError(f"{root}: is run by process {holder['pid']} of another user, who has to stop it") from error
    except ProcessLookupError:
        pass  # it has just ended
    deadline = time.monotonic() + timeout
    while wait and is_driven(root):
        if time.monotonic() > deadline:
            raise UserError(f"{root}: process {holder['pid']} was asked to stop and has not ended within {timeout:.0f} s")
        time.sleep(0.1)
    now = read_json(root / schema.STATE_FILE).get("state") if wait else "stopping"
    if as_json:
        print(json.dumps({"root": str(root), "state": now, "pid": holder["pid"]}))
    else:
        print(f"{now}: {root}" if wait else "asked to stop; `python -m sweeps run` goes on from there")


@app.command()
def retry(
    study: StudyName,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="died, node, out-of-memory, hang, bug, diverged, disk, or all; repeatable; default all but diverged"),
    ] = None,
    runs: Annotated[list[str] | None, typer.Option("--run", help="Only this run, such as 003-0; repeatable")] = None,
    run_now: Annotated[bool, typer.Option("--run-now", help="And go on with the study")] = False,
    executor: ExecutorName = "ray",
    function: Function = REAL,
    as_json: AsJson = False,
) -> None:
    """Put failed runs back, to be tried again from their checkpoints.  Example: python -m sweeps retry quickstart --class out-of-memory --run-now"""
    from sweeps.failures import reset_runs

    root = started_root(study)
    wanted = classes or [kind for kind in schema.FAILURE_CLASSES if kind != schema.DIVERGED]
    back = reset_runs(root, wanted, runs)
    following = f"python -m sweeps run {root / schema.STUDY_FILE} --root {root}"
    going_on = bool(back) and run_now
    said = {"root": str(root), "classes": wanted, "runs": back, "next": following if back and not run_now else None}
    if as_json and not going_on:
        print(json.dumps(said), flush=True)
    elif back and not as_json:
        print(f"{len(back)} runs are put back: {', '.join(back)}" + ("" if run_now else f"\ngo on:  {following}"), flush=True)
    elif not as_json:
        print(f"{root}: no run failed as {', '.join(wanted)}; nothing to put back", flush=True)
    if going_on:
        from sweeps.study import load_study

        _drive(load_study(root / schema.STUDY_FILE), root, executor, function, {"put_back": back} if as_json else None)


@app.command()
def workers(
    study: StudyName,
    number: Annotated[str, typer.Argument(metavar="NUMBER|auto", help="Of workers, from now on until the driver ends")],
    as_json: AsJson = False,
) -> None:
    """Give a running study more or fewer workers.  Example: python -m sweeps workers quickstart 4"""
    from sweeps.control import set_workers
    from sweeps.lease import is_driven

    if number != "auto" and not number.isdecimal():
        raise typer.BadParameter(f"{number!r} is neither a number nor 'auto'", param_hint="NUMBER")
    root = started_root(study)
    if not is_driven(root):
        raise UserError(f"{root}: is not running; `python -m sweeps run FILE --set resources.workers={number}` starts it with so many")
    set_workers(root, "auto" if number == "auto" else int(number))
    print(
        json.dumps({"root": str(root), "workers": number if number == "auto" else int(number)}) if as_json else f"{root}: asked for {number} workers"
    )


@app.command()
def ui(
    study: Annotated[str | None, typer.Argument(help="With --optuna: the study whose search is shown")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of MLflow's pages")] = 5000,
    optuna: Annotated[bool, typer.Option("--optuna", help="Optuna's pages too, on a study's search")] = False,
    optuna_port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
) -> None:
    """MLflow's pages on the studies' store, and Optuna's.  Example: python -m sweeps ui quickstart --optuna"""
    from sweeps.ui import mlflow_command, optuna_command, serve

    if optuna and study is None:
        raise typer.BadParameter("--optuna shows one study's search: name it", param_hint="STUDY")
    commands = [mlflow_command(port)]
    # MLflow opens on its pages for language-model traces unless it is told otherwise.
    print(f"MLflow on {tracking_uri()}: http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning   (Ctrl-C ends it)", flush=True)
    if optuna and study is not None:
        root = study_root(study)
        commands.append(optuna_command(root, optuna_port))
        print(f"Optuna on {root / schema.JOURNAL_FILE}: http://127.0.0.1:{optuna_port}", flush=True)
    raise typer.Exit(serve(commands))


@app.command()
def export(
    study: StudyName,
    out: Annotated[Path | None, typer.Option(help="A file, .csv, .parquet or .json; default: CSV to the terminal")] = None,
    form: Annotated[str | None, typer.Option("--format", help="csv, parquet or json, whatever the file's name")] = None,
    metrics: Annotated[Path | None, typer.Option(metavar="FILE", help="Also every record of every run, one row per (run, step, metric)")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json")] = False,
) -> None:
    """One row per run: its settings, how it ended, its final metrics.

    Example: python -m sweeps export quickstart --out runs.csv --metrics curves.parquet
    """
    from sweeps import export as table

    root = study_root(study)
    found = table.rows(root)
    if not found:
        raise UserError(f"{root}: holds no runs (expected {schema.RUNS_DIRECTORY}/*/{schema.RUN_FILE}); `python -m sweeps run` makes them")
    kind = table.form_of(out, "json" if as_json else form)
    curves_kind = table.form_of(metrics, None) if metrics is not None else ""
    if out is not None:
        table.write_rows(found, out, kind)
        print(f"{out}: {len(found)} runs", file=sys.stderr)
    elif kind == "parquet":
        raise typer.BadParameter("a Parquet table needs a file: --out runs.parquet", param_hint="--format")
    else:
        sys.stdout.write(table.as_json(found) if kind == "json" else table.as_csv(found))
    if metrics is not None:
        print(f"{metrics}: {table.write_curves(root, metrics, curves_kind)} values", file=sys.stderr)


@app.command()
def doctor(
    study: Annotated[Path | None, typer.Argument(help="Also what this study's file needs", exists=True, dir_okay=False)] = None,
    address: Annotated[str | None, typer.Option(help="Of the Ray dashboard; default http://127.0.0.1:8265")] = None,
    as_json: AsJson = False,
) -> None:
    """What on this machine or cluster would spoil a study, each with its remedy; exit code 1 if there is a problem.

    Example: python -m sweeps doctor sweeps/studies/quickstart.yaml
    """
    from sweeps.doctor import PROBLEM, examine, report

    findings = examine(study, address)
    if as_json:
        print(json.dumps({"ok": all(f.level != PROBLEM for f in findings), "findings": [f.to_dict() for f in findings]}, indent=1))
    else:
        console().print(report(findings))
    if any(f.level == PROBLEM for f in findings):
        raise typer.Exit(1)


def _root(study: "Study", root: Path | None) -> Path:
    return (root or home() / "studies" / study.name).absolute()


def _drive(study: "Study", place: Path, executor: str, function: str, about: dict[str, Any] | None) -> None:
    """`about`: what is said beside the status in the one JSON object at the end; None: in words."""
    from sweeps.launch import drive, drive_for_json

    code, said = drive_for_json(study, place, executor, function) if about is not None else (drive(study, place, executor, function), {})
    if about is not None:
        print(json.dumps({**said, **about, "exit_code": code}, indent=1, ensure_ascii=False), flush=True)
    if code:
        raise typer.Exit(code)


def main() -> None:
    """The door: a UserError becomes its sentences on stderr and exit code 1; with --json they are an object on stdout too."""
    try:
        app()
    except UserError as error:
        if "--json" in sys.argv[1:]:
            print(json.dumps({"ok": False, "problems": list(error.problems)}, indent=1, ensure_ascii=False), flush=True)
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
