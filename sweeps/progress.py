"""What a person sees: a live table on a terminal, one plain line per event elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from research.terminal import console
from sweeps import schema
from sweeps.status import RUNNING, Reader, StudyStatus, Variant

EVENTS = 6
REFRESH_SECONDS = 1.0
COLOURS = {RUNNING: "cyan", "finished": "green", "interrupted": "yellow", schema.STOPPED: "yellow", "finished-with-failures": "red"}


class View:
    """A status as wide and as high as there is room for."""

    def __init__(self, status: Callable[[], StudyStatus], events: Callable[[], list[str]] = list) -> None:
        self._status, self._events = status, events

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        events = self._events()
        # A pipe has no height of its own: everything is shown there.
        room = options.max_height - 8 - len(events) if console.is_terminal else 10_000
        yield render(self._status(), rows=max(room, 3))
        yield from (Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in events)


def render(status: StudyStatus, rows: int = 10_000) -> Group:
    """Headline, bar, failures, best so far, and a row for each of the `rows` variants that matter most now."""
    head = Text.assemble((status.root.name, "bold"), ": ", (status.state, COLOURS.get(status.state, "bold")), f", {summary_line(status)}")
    parts: list[RenderableType] = [head]
    if status.planned and status.state == RUNNING:
        parts.append(ProgressBar(total=status.planned, completed=status.done + sum(r.share for r in status.runs if r.state == RUNNING), width=60))
    parts += [Text(line, style="red" if line.startswith("failed") else "") for line in facts(status)]
    variants = _chosen(status.variants, rows)
    if variants:
        parts.append(_table(status, variants))
    if len(variants) < len(status.variants):
        parts.append(Text(f"... and {len(status.variants) - len(variants)} more variants: python -m sweeps status {status.root.name}", style="dim"))
    return Group(*parts)


def summary_line(status: StudyStatus) -> str:
    """`12 of 16 runs; 2 running on 2 workers; expected to end at 14:05, in 6 min`."""
    parts = [f"{status.done} of {status.planned} runs"]
    if status.state == RUNNING:
        parts.append(f"{status.counts.get(RUNNING, 0)} running on {status.workers} workers")
    if status.seconds_left is not None and status.done < status.planned:
        at = datetime.now() + timedelta(seconds=status.seconds_left)
        day = "" if at.date() == datetime.now().date() else f"{at:%a %d %b} "
        parts.append(f"expected to end at {day}{at:%H:%M}, in {duration(status.seconds_left)}")
    return "; ".join(parts)


def facts(status: StudyStatus) -> Iterator[str]:
    """Best so far per objective, failures by class, and what is wrong with MLflow."""
    for metric, direction in status.objectives:
        if (best := status.best(metric, direction)) is not None and best.mean is not None:
            yield f"best so far, {metric}: {plus_minus(best.mean, best.standard_error)} ({best.name}; {best.finished} of {status.seeds} seeds)"
    if status.failures:
        by_class = ", ".join(f"{count} {name}" for name, count in status.failures.items())
        yield f"failed or diverged: {by_class}   (python -m sweeps retry {status.root.name})"
    if status.about.get("mlflow_behind"):
        yield f"MLflow is away: {status.about['mlflow_behind']}"


def plus_minus(mean: float, error: float | None) -> str:
    return f"{mean:.4g}" if error is None else f"{mean:.4f} ± {error:.4f}" if abs(mean) < 1e4 else f"{mean:.4g} ± {error:.2g}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _chosen(variants: list[Variant], rows: int) -> list[Variant]:
    """In their order: the baseline, what runs, what failed, then the best."""
    if len(variants) <= rows:
        return variants

    def weight(variant: Variant) -> tuple[bool, bool, bool]:
        states = {run.state for run in variant.runs}
        return (not variant.baseline, RUNNING not in states, not any(run.failure for run in variant.runs))

    order = {variant.trial: place for place, variant in enumerate(variants)}
    kept = sorted(variants, key=lambda v: (weight(v), order[v.trial]))[:rows]
    return sorted(kept, key=lambda v: order[v.trial])


def _table(status: StudyStatus, variants: list[Variant]) -> Table:
    metric, direction = status.objectives[0] if status.objectives else ("", "minimize")
    base = next((v.mean for v in variants if v.baseline), None)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", justify="right")
    table.add_column("variant", overflow="fold")
    table.add_column("seeds", justify="right")
    table.add_column(metric, justify="right", no_wrap=True)
    table.add_column("- baseline", justify="right", no_wrap=True)
    table.add_column("now", overflow="fold")
    best = status.best(metric, direction)
    for v in variants:
        mean = plus_minus(v.mean, v.standard_error) if v.mean is not None else ""
        difference = f"{v.mean - base:+.4f}" if v.mean is not None and base is not None and not v.baseline else ""
        style = "green" if best is not None and best.trial == v.trial else ""
        table.add_row(str(v.trial), v.name, f"{v.finished}/{status.seeds}", Text(mean, style=style), difference, _now(v))
    return table


def _now(variant: Variant) -> Text:
    """What its runs are at, seed by seed, where they have not simply finished."""
    parts = []
    for run in variant.runs:
        if run.state == schema.FINISHED:
            continue
        again = f", attempt {run.attempts}" if run.attempts > 1 else ""
        if run.state == RUNNING:
            parts.append((f"seed {run.seed}: step {run.step} ({run.share:.0%}{again})", "cyan"))
        elif run.failure:
            last = (run.reason or "").strip().splitlines()
            parts.append((f"seed {run.seed}: {run.failure}{again}: {last[-1][:90] if last else ''}", "red"))
        else:
            parts.append((f"seed {run.seed}: {run.state}", "yellow" if run.state != "waiting" else "dim"))
    return Text("\n").join(Text(text, style=style) for text, style in parts)


@contextmanager
def progress(root: Path) -> Iterator[Callable[[str], None]]:
    """For a driver: the function to announce an event with; the table refreshes itself meanwhile."""
    if not sys.stdout.isatty():
        yield lambda line: print(f"{datetime.now():%H:%M:%S} {line}", flush=True)
        return
    events: deque[str] = deque(maxlen=EVENTS)
    reader = Reader(root)
    view = View(lambda: reader.read(driven=True), lambda: list(events))
    with Live(view, console=console(), refresh_per_second=1 / REFRESH_SECONDS, vertical_overflow="crop"):
        yield lambda line: events.append(f"{datetime.now():%H:%M:%S} {line}")


def watch(root: Path, show: Callable[[StudyStatus], None]) -> None:
    """Follow a study until it no longer runs: live on a terminal, else `show` whenever something has changed."""
    reader = Reader(root)
    status = reader.read()
    if sys.stdout.isatty():
        with Live(View(lambda: status), console=console(), auto_refresh=False) as live:
            while status.state in (RUNNING, "starting"):
                live.refresh()
                time.sleep(REFRESH_SECONDS)
                status = reader.read()
            live.refresh()
        return
    shown = None
    while True:
        key = (status.state, status.counts, status.failures)
        if key != shown:
            show(status)
            shown = key
        if status.state not in (RUNNING, "starting"):
            return
        time.sleep(REFRESH_SECONDS)
        status = reader.read()
