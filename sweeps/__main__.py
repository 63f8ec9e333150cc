"""`python -m sweeps`: studies from a file to a store.

Exit codes: 0; 1 a mistake in a file; 2 wrong usage; 3 finished with failures; 143 stopped.
"""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from research.errors import UserError
from research.terminal import console
from sweeps import schema
from sweeps.check_cells import notes
from sweeps.driver import Driver
from sweeps.executors import Executor, InlineExecutor, RayExecutor
from sweeps.lease import holder_of, is_driven
from sweeps.plan import plan as make_plan
from sweeps.study import Study, home, load_study, study_root
from sweeps.tracking import tracking_uri

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
FINISHED_WITH_FAILURES, STOPPED = 3, 143

StudyFile = Annotated[Path, typer.Argument(help="A study's YAML file, such as sweeps/studies/quickstart.yaml", exists=True, dir_okay=False)]
Root = Annotated[Path | None, typer.Option(help="The study's directory; default $MOELAB_HOME/studies/NAME (.moelab here)")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="path=value over the file, such as seeds=[0] or base.training.train_tokens=200000")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table")]


@app.command()
def check(study: StudyFile, overrides: Overrides = None) -> None:
    """Find every mistake in a study file; starts nothing.  Example: python -m sweeps check sweeps/studies/quickstart.yaml"""
    loaded = load_study(study, overrides or [])
    for note in notes(loaded):
        print(f"note: {note}")
    print(f"{study}: all right ({loaded.name}: {loaded.question})")


@app.command()
def plan(study: StudyFile, root: Root = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """How many runs, parameters, FLOPs, memory and time; starts nothing.  Example: python -m sweeps plan sweeps/studies/quickstart.yaml"""
    loaded = load_study(study, overrides or [])
    workers = loaded.resources.workers if loaded.resources.workers != "auto" else max((os.cpu_count() or 1) // loaded.resources.cpus_per_worker, 1)
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
    executor: Annotated[str, typer.Option(help="ray, or inline: no Ray, one run after another in this process")] = "ray",
    function: Annotated[str, typer.Option(hidden=True)] = "sweeps.trial:run_trial",
) -> None:
    """Run a study, or go on with it.  Example: python -m sweeps run sweeps/studies/quickstart.yaml"""
    if executor not in ("ray", "inline"):
        raise typer.BadParameter(f"{executor!r} is neither 'ray' nor 'inline'", param_hint="--executor")
    loaded = load_study(study, overrides or [])
    place = _root(loaded, root)
    with _progress(place) as announce:
        state = Driver(loaded, place, lambda s, runs: _executor(executor, s, runs), announce, function).run()
    print(f"{state}: {place}")
    behind = json.loads((place / schema.STATE_FILE).read_text(encoding="utf-8"))["mlflow_behind"]
    late = f" (away: {behind}; `run` again sends what is missing)" if behind else ""
    print(f"MLflow: {tracking_uri()}{late}   report: python -m reports build {place}")
    if state == schema.STOPPED:
        raise typer.Exit(STOPPED)
    if state != "finished":
        raise typer.Exit(FINISHED_WITH_FAILURES)


@app.command()
def resume(
    study: StudyFile,
    root: Root = None,
    overrides: Overrides = None,
    executor: Annotated[str, typer.Option(help="ray or inline")] = "ray",
    function: Annotated[str, typer.Option(hidden=True)] = "sweeps.trial:run_trial",
) -> None:
    """The same as run: what is finished stays, what was interrupted goes on.  Example: python -m sweeps resume sweeps/studies/quickstart.yaml"""
    run(study, root, overrides, executor, function)


@app.command()
def submit(
    study: StudyFile,
    address: Annotated[str, typer.Option(help="The Ray dashboard's address")] = "http://127.0.0.1:8265",
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option(help="Follow the job's output and end with its exit code")] = False,
) -> None:
    """Run a study as a Ray job on a cluster.  Example: python -m sweeps submit sweeps/studies/quickstart.yaml --wait"""
    from sweeps.jobs import submit as submit_job  # noqa: PLC0415  (imports ray)

    load_study(study, overrides or [], here=False)
    arguments = [part for override in overrides or [] for part in ("--set", override)]
    job = submit_job(study, address, arguments)
    token = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    print(f"submitted {job.submission}; its studies are in {home()}")
    print(f"follow it:  {token}ray job logs --address {address} --follow {job.submission}")
    print(f"end it:     {token}ray job stop --address {address} {job.submission}", flush=True)
    if wait and (code := job.follow()):
        raise typer.Exit(code)


@app.command()
def status(study: Annotated[str, typer.Argument(help="A study's name, root or YAML file")], as_json: AsJson = False, watch: bool = False) -> None:
    """How far a study is.  Example: python -m sweeps status quickstart --watch"""
    path = study_root(study) / schema.STATE_FILE
    while True:
        if not path.exists():
            raise UserError(f"{path.parent}: is no study that was run (no {schema.STATE_FILE})")
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["state"] == "running" and not is_driven(path.parent):
            state["state"] = "interrupted"  # its driver is gone without a word; `run` goes on from there
        if as_json:
            print(json.dumps(state, indent=1))
        else:
            console().print(_table(state, path.parent))
        if not watch or state["state"] != "running":
            return
        time.sleep(2)


@app.command()
def stop(study: Annotated[str, typer.Argument(help="A study's name, root or YAML file")]) -> None:
    """Ask a running study to write its checkpoints and end.  Example: python -m sweeps stop quickstart"""
    root = study_root(study)
    if not is_driven(root):
        raise UserError(f"{root}: is not running")
    holder = holder_of(root)
    if holder["host"] != platform.node():
        raise UserError(f"{root}: is run by process {holder['pid']} on {holder['host']}: stop it there, or with `ray job stop` if it was submitted")
    os.kill(holder["pid"], signal.SIGTERM)
    print("asked to stop; `python -m sweeps run` goes on from there")


@app.command()
def ui(port: int = 5000) -> None:
    """MLflow's pages on the studies' store.  Example: python -m sweeps ui --port 5001"""
    uri = tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"{uri}: nothing has been recorded yet; `make ablation` does")
    print(f"MLflow on {uri}: http://127.0.0.1:{port}   (Ctrl-C ends it)", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)])


def _root(study: Study, root: Path | None) -> Path:
    return (root or home() / "studies" / study.name).absolute()


def _executor(name: str, study: Study, runs: int) -> Executor:
    return InlineExecutor() if name == "inline" else RayExecutor(study.resources, runs)


@contextmanager
def _progress(root: Path) -> Iterator[Any]:
    """A live table on a terminal, a plain line per event elsewhere."""
    if not sys.stdout.isatty():
        yield lambda line: print(f"{datetime.now():%H:%M:%S} {line}", flush=True)
        return
    lines: list[str] = []
    with Live(Table(), refresh_per_second=2) as live:

        def show() -> None:
            path = root / schema.STATE_FILE
            state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"state": "starting", "runs": {}, "planned": 0}
            table = _table(state, root)
            table.caption = "\n".join(lines[-8:])
            live.update(table)

        def announce(line: str) -> None:
            lines.append(f"{datetime.now():%H:%M:%S} {line}")
            show()

        yield announce
        show()


def _table(state: dict[str, Any], root: Path) -> Table:
    done = sum(r["state"] in schema.STATES and r["state"] != schema.STOPPED for r in state["runs"].values())
    table = Table("run", "variant", "seed", "state", "attempt", "result", title=f"{root.name}: {state['state']}, {done} of {state['planned']} runs")
    for run, about in state["runs"].items():
        folder = root / schema.RUNS_DIRECTORY / run
        described = json.loads((folder / schema.RUN_FILE).read_text(encoding="utf-8"))
        summary = folder / schema.SUMMARY_FILE
        value = json.loads(summary.read_text(encoding="utf-8"))["metrics"].get(schema.BITS_PER_BYTE) if summary.exists() else None
        reason = (about["reason"] or "").strip().splitlines()
        result = f"{value:.4f} bits/byte" if value is not None else (reason[-1] if reason else "")
        table.add_row(run, described["variant"], str(described["seed"]), about["state"], str(about["attempts"]), result)
    return table


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
