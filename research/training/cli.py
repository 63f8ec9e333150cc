"""`python -m research train`: one run, from the command line."""

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from research.atomic import room_for, write_text
from research.config import RunConfig, differences, to_dict
from research.configfile import load_run_config, read_yaml, resolve_model
from research.errors import CheckpointError, ConfigError
from research.parallel.sharing import common_experts, sharing_problems
from research.terminal import console

DIVERGED = 3
"""Exit code of a training that ended without a model, as `python -m sweeps` has it for failures."""
STOPPED = 130
"""After a signal that asked for the end, as a shell has it for Ctrl-C."""
SHOWN = {"train/loss": "loss", "validation/bits_per_byte": "bits/byte", "train/tokens_per_second": "tokens/s", "train/gradient_norm": "gradient"}

Overrides = Annotated[list[str] | None, typer.Option("--set", help="path=value, such as model.moe.device_limit=2; repeatable")]


def train(
    model: Annotated[str, typer.Argument(help="A preset's name, or a YAML file with a run configuration")],
    out: Annotated[Path, typer.Option(help="The run's directory; a checkpoint there is gone on from")],
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the run out; 8 of them hold an eighth of the routed experts each")] = 1,
    expert_parallel: Annotated[int | None, typer.Option(min=1, help="Workers per set of experts; fewer than --workers: several replicas")] = None,
    collective_timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a worker that does not answer is given up")] = 600.0,
    witness: Annotated[bool, typer.Option("--witness", help="With --workers: also keep who was routed where in each step, in routed/")] = False,
    prompt: Annotated[list[str] | None, typer.Option(help="Text that the trained model goes on from at the end; repeatable")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object on stdout at the end; progress goes to stderr")] = False,
) -> None:
    """Train one model.  Example: python -m research train deepseek-v2-nano --out /tmp/nano --set training.train_tokens=200000

    In the run's directory: config.json, metrics.jsonl (an object per record), routing.npz, checkpoint/.  Ctrl-C writes a
    checkpoint and ends (exit code 130); the same command goes on from there, after a kill too.  A run that diverges ends with 3.

    With --workers, tokens travel between processes to the experts that they are routed to, traffic.jsonl says how many bytes went from
    where to where, and the losses are those of one process; a run may go on with another number of workers.
    """
    # Half a second to two of torch are paid only by the commands that need it.
    from research.continuation import Sampling, gather_prompts, go_on  # noqa: PLC0415
    from research.parallel.launch import run_workers  # noqa: PLC0415
    from research.training.loop import train as run  # noqa: PLC0415
    from research.training.records import JsonlRecorder, Record  # noqa: PLC0415

    if witness and workers == 1:
        raise typer.BadParameter("one process sends nothing; add --workers D (2 or more)", param_hint="--witness")
    prompts = prompt or ["The "]
    gather_prompts(prompts, None)
    mapping = read_yaml(model) if Path(model).suffix in (".yaml", ".yml") else _default_run(model)
    config = load_run_config(mapping, model, overrides or [])
    expert_parallel = expert_parallel or common_experts(workers, config)
    if workers % expert_parallel:
        raise ConfigError(f"--expert-parallel {expert_parallel}: must divide --workers {workers}")
    if problems := sharing_problems(config, workers, expert_parallel):
        raise ConfigError(*problems)
    _claim(out, config)
    with _progress(config.steps, sys.stderr if as_json else sys.stdout) as step, _stop_asked() as stop_asked:

        def watch(record: Record) -> bool:
            step(record.step, "  ".join(f"{name} {record.metrics[key]:.4g}" for key, name in SHOWN.items() if key in record.metrics))
            return stop_asked()

        if workers == 1:
            result = run(config, out, JsonlRecorder(out / "metrics.jsonl"), watch, device=device, announce=lambda line: step(None, line))
        else:

            def listen(said: Record | str) -> None:
                if isinstance(said, Record):
                    watch(said)
                else:
                    step(None, said)

            result = run_workers(
                train_worker,
                (config, out, device, witness),
                workers=workers,
                expert_parallel=expert_parallel,
                device=device,
                timeout_seconds=collective_timeout,
                listen=listen,
                stop_asked=stop_asked,
            )[0]
    if result.trace is not None:
        with room_for(out / "routing.npz", "the routing trace"):
            result.trace.save(out / "routing.npz")
    ended: dict[str, Any] = {
        "run": str(out),
        "state": result.state,
        "reason": result.reason,
        "warnings": list(result.warnings),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "metrics": result.metrics,
    }
    if not as_json:
        _print_end(ended)
    if result.state == "finished":
        if not as_json:
            print("What it says:")
        said = go_on(out, prompts, Sampling(tokens=80), (lambda text: None) if as_json else (lambda text: print(text, end="", flush=True)))
        ended["samples"] = [{"prompt": c.prompt, "text": c.text} for c in said]
        if not as_json:
            print("".join(f"\n\n{c.prompt}{c.text}" for c in said[1:]))
    if as_json:
        print(json.dumps(ended, indent=1, ensure_ascii=False))
    if result.state != "finished":
        raise typer.Exit(DIVERGED if result.state == "diverged" else STOPPED)


def train_worker(world: Any, parent: Any, config: RunConfig, out: Path, device: str, witness: bool) -> Any:
    """One of the processes of `train --workers`: rank 0 writes, and tells its parent what it would have shown."""
    from research.training.loop import train as run  # noqa: PLC0415
    from research.training.records import JsonlRecorder, NoRecorder  # noqa: PLC0415

    first, world.ledger.witness = world.rank == 0, witness
    recorder = JsonlRecorder(out / "metrics.jsonl") if first else NoRecorder()

    def watch(record: Any) -> bool:
        parent.tell(record)
        return bool(parent.stop_asked())

    return run(config, out, recorder, watch, device=device, announce=parent.tell if first else lambda line: None, world=world)


def _default_run(name: str) -> dict[str, object]:
    """What a preset trains on when only its name is given: the quickstart corpus, its vocabulary as the preset has it."""
    model = resolve_model(name, "MODEL")
    vocabulary = min(int(model["vocab_size"]), 16384)
    optimizer = {"learning_rate": 0.0015, "warmup_steps": 50}
    data = {"corpus": "quickstart", "tokenizer_vocab_size": vocabulary}
    return {"model": name, "data": data, "training": {"train_tokens": 1_000_000, "optimizer": optimizer}}


def _claim(out: Path, config: RunConfig) -> None:
    """Make the run's directory and write down whose it is: records of two configurations must not meet in one file.

    A directory in which no step was recorded belongs to nobody; of one with a checkpoint and no config.json the loop asks the checkpoint.
    """
    path, records, mine = out / "config.json", out / "metrics.jsonl", to_dict(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = (records.exists() and records.stat().st_size > 0) or (out / "checkpoint").exists()
        there = json.loads(path.read_text(encoding="utf-8")) if taken and path.exists() else None
        if there is None and not taken:
            with room_for(path, "the configuration"):
                write_text(path, json.dumps(mine, indent=1))
    except OSError as error:
        raise ConfigError(f"--out = {str(out)!r}: cannot be written to ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); remove it if the run is yours") from error
    if there is not None and there != mine:
        raise CheckpointError(
            f"{out}: holds a run of another configuration; differing: {'; '.join(differences(there, mine))}; choose another --out, or remove it"
        )


@contextmanager
def _stop_asked() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM asks for the end at the next record; the second acts at once."""
    asked = []
    previous: dict[int, Any] = {}

    def ask(number: int, _: object) -> None:
        asked.append(number)
        print("stopping at the next record, with a checkpoint; once more ends at once", file=sys.stderr, flush=True)
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        restore()


def _print_end(ended: Mapping[str, Any]) -> None:
    """How it ended, and the last value of each metric."""
    print(
        f"{ended['state']} after {ended['steps']:,} steps, {ended['tokens']:,} tokens, {ended['seconds']:,} s"
        + f": {ended['reason']}" * bool(ended["reason"])
    )
    for line in ended["warnings"]:
        print(line)
    if ended["state"] == "stopped":
        print("The same command goes on from here.")
    if ended["state"] != "finished":
        return
    table = Table("metric", "last value")
    for name, value in ended["metrics"].items():
        table.add_row(name, f"{value:,.4f}" if abs(value) < 1000 and value % 1 else f"{value:,.0f}")
    console().print(table)


@contextmanager
def _progress(total: int, stream: Any) -> Iterator[Callable[[int | None, str], None]]:
    """A bar on a terminal, plain lines elsewhere: `step(done, text)`; what is said beside the steps stands above the bar."""
    if not stream.isatty():

        def say(done: int | None, text: str) -> None:
            print(f"{datetime.now():%H:%M:%S} {'' if done is None else f'step {done}/{total}  '}{text}", file=stream, flush=True)

        yield say
        return
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task("", total=total)

        def show(done: int | None, text: str) -> None:
            if done is None:
                bar.console.print(text, markup=False, highlight=False)
            else:
                bar.update(task, completed=done, description=text)

        yield show
