"""One run on several workers: its part of the page of `make bench`, and its figure."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.bench.parallel import PARTS

KINDS = {"strong": "Strong: the same global batch", "weak": "Weak: the same batch per worker"}
COLOURS = ("#3b6ea5", "#c8553d", "#e0a458", "#7a9e7e", "#8d6a9f", "#9a9a9a")


def ideal(workers: int, cores: int) -> int:
    """Times as many tokens per second as one worker: as many as there are cores."""
    return min(workers, cores)


def parallel(found: dict[str, Any], figure: str) -> list[str]:
    """Tokens per second beside the ideal, and the parts of a step, in Markdown."""
    at = found["parallel"]
    lines = [
        "## One run on several workers",
        "",
        f"{at['model'].removeprefix('deepseek-v2-')} on windows of {at['length']} tokens, M = 3, all balance losses on; experts shared out, all else "
        f"replicated (ZeRO-1). Ideal on {at['cores']} cores: min(D, {at['cores']}) times one worker. With more workers than cores a worker also waits",
        "while others compute, which stands under what it waited in.",
        "",
        f"![Tokens per second over workers beside the ideal, and the parts of a step]({figure})",
        "",
    ]
    for kind, title in KINDS.items():
        one = at[kind][0]["tokens_per_second"]
        rows = []
        for row in at[kind]:
            times, best = row["tokens_per_second"] / one, ideal(row["workers"], at["cores"])
            total = sum(row["parts"].values())
            shares = tuple(f"{100 * row['parts'][part] / total:.0f} %" for part in PARTS)
            seconds = f"{1e3 * row['seconds']:,.0f}"
            rows.append(
                (str(row["workers"]), str(row["batch"]), seconds, f"{row['tokens_per_second']:,.0f}", f"{times:.2f}", str(best),
                 f"{100 * times / best:.0f} %", *shares)
            )  # fmt: skip
        head = ("D", "sequences", "ms per step", "tokens/s", "times", "ideal", "of it", *PARTS)
        lines += [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += [""]
    return lines


def draw(at: dict[str, Any], path: Path) -> None:
    """Above: times one worker's tokens per second beside the ideal.  Below: milliseconds of a step by part."""
    canvas = Figure(figsize=(9, 6.5), layout="constrained")
    grid = canvas.subplots(2, len(KINDS), squeeze=False)
    for column, (kind, title) in enumerate(KINDS.items()):
        rows = at[kind]
        workers, one = [row["workers"] for row in rows], rows[0]["tokens_per_second"]
        above, below = grid[0][column], grid[1][column]
        above.plot(workers, [ideal(count, at["cores"]) for count in workers], "--", color="#555555", label=f"ideal on {at['cores']} cores")
        above.plot(workers, [row["tokens_per_second"] / one for row in rows], "o-", color=COLOURS[0], label="measured")
        above.set(title=title, xlabel="workers D", ylabel="times one worker's tokens/s", xticks=workers, ylim=(0, None))
        above.legend(frameon=False)
        under = [0.0] * len(rows)
        for part, colour in zip(PARTS, COLOURS, strict=True):
            heights = [1e3 * row["parts"][part] for row in rows]
            below.bar([str(count) for count in workers], heights, bottom=under, color=colour, label=part)
            under = [a + b for a, b in zip(under, heights, strict=True)]
        below.set(xlabel="workers D", ylabel="ms per step")
    grid[1][-1].legend(frameon=False, fontsize="small")
    FigureCanvasAgg(canvas)
    canvas.savefig(path, dpi=110, metadata={"Software": None})
