"""`python -m research evaluate`: bits per byte of held-out text, out of caches of several widths, and sets of questions."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from research import accounting
from research.terminal import console


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's directory, with its checkpoint")],
    kv_bits: Annotated[list[int] | None, typer.Option(help="Bits per cached element: 16, 8, 6 or 4; repeatable, by default all of them")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Held-out tokens per domain; by default as in training")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Evaluate on this corpus' held-out text, in the run's tokens; by default the run's own corpus")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="A set of questions (mmlu, hellaswag, truthfulqa-mc1, gsm8k) or `all`; repeatable; fetches its archive")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task at most, always the same ones; by default all")] = None,
    overlap: Annotated[bool, typer.Option("--overlap", help="Count the items that share 13 words in a row with the run's training text")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Held-out bits per byte by domain with 95 % intervals, out of a cache of each width; with --tasks, sets of questions beside chance.

    Intervals of bits per byte resample held-out texts (windows where there are fewer than 10), those of tasks are Wilson's over items.

    Example: python -m research evaluate RUN --kv-bits 8 --kv-bits 6 --json
    Example: python -m research evaluate RUN --tasks hellaswag --tasks mmlu --limit 500
    """
    from research.devices import choose_device  # noqa: PLC0415
    from research.errors import UserError  # noqa: PLC0415
    from research.evaluation.cache_width import check_bits, evaluate_widths  # noqa: PLC0415
    from research.evaluation.heldout import evaluation_data, has_corpus  # noqa: PLC0415
    from research.evaluation.run_tasks import run_tasks  # noqa: PLC0415
    from research.evaluation.tasks import check_tasks  # noqa: PLC0415
    from research.training.checkpoint import load_model  # noqa: PLC0415

    widths = kv_bits or list(accounting.KV_BITS)
    for bits in widths:
        check_bits(bits)
    names = check_tasks(tasks or [])
    place = choose_device(device)
    model, config = load_model(run)
    if overlap and not names:
        raise UserError("--overlap: counts the items of --tasks, and there is none; name a task or leave it out")
    model.to(place)
    said: dict[str, Any] = {"run": str(run), "corpus": corpus or config.data.corpus}
    # An imported run has no text of its own; asked for tasks alone it needs none.
    if corpus is not None or has_corpus(config) or not names:
        data, cut = evaluation_data(run, config, corpus)
        wanted = dataclasses.replace(config, data=cut)
        scores = evaluate_widths(model, data, wanted, widths, tokens or config.training.validation_tokens)
        said["widths"] = [dataclasses.asdict(score) for score in scores]
    if names:
        said["tasks"] = run_tasks(run, model, config, names, limit, overlap=overlap)
    if as_json:
        print(json.dumps(said, indent=1))
        return
    if "widths" in said:
        _print_widths(said["widths"])
    if names:
        _print_tasks(said["tasks"])


def _print_widths(scores: list[dict[str, Any]]) -> None:
    full, *narrow = scores
    names = [f"{score['bits']} bits" for score in narrow]
    title = "Held-out bits per byte with its 95 % interval, and the difference out of a cache of so many bits"
    table = Table("", "full precision", "95 %", "resampled", *names, title=title)
    for domain, value in full["bits_per_byte"].items():
        differences = (f"{score['difference'][domain]:+.5f}" for score in narrow)
        table.add_row(domain, f"{value:.4f}", _range(full["interval_95"][domain]), full["resampled"].get(domain, "each domain's"), *differences)
    table.add_row("bytes/token", f"{full['bytes_per_token']:,}", "", "", *(f"{score['bytes_per_token']:,}" for score in narrow))
    console().print(table)


def _print_tasks(scores: list[dict[str, Any]]) -> None:
    table = Table(
        "task", "items", "rule", "right", "95 %", "chance", "blind rules", "in the training text", title="Questions, beside what needs no model"
    )
    for score in scores:
        blind = ", ".join(f"{name} {share:.1%}" for name, share in score["lines"].items())
        for rule, share in score["accuracy"].items():
            low, high = score["interval_95"][rule]
            row = (score["task"], str(score["items"]), rule, f"{share:.1%}", f"{low:.1%} to {high:.1%}", f"{score['chance']:.1%}", blind)
            table.add_row(*row, score["contamination"]["verdict"])
    console().print(table)
    if shortened := [f"{s['task']} {s['shortened']} of {s['items']}" for s in scores if s["shortened"]]:
        print(f"Contexts that lost their beginning, since the run was trained on shorter sequences: {', '.join(shortened)}")


def _range(interval: tuple[float, float] | None) -> str:
    return "one part only" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
