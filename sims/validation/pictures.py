"""The page's figures."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

from sims.outputs.style import COLOURS, STYLE
from sims.validation.comparison import Comparison


def ratio_figure(ratios: Mapping[int, float], bandwidths: float) -> Canvas:
    """Bytes over NVLink per byte over InfiniBand by nodes, and the ratio of the bandwidths as a line."""
    with mpl.rc_context(STYLE):
        canvas, axes = plt.subplots(figsize=(5.6, 2.8), layout="constrained")
        axes.bar([str(n) for n in ratios], list(ratios.values()), color=COLOURS[0], width=0.55)
        for x, value in enumerate(ratios.values()):
            axes.annotate(f"{value:.2f}", (x, value), (0, 3), textcoords="offset points", ha="center")
        axes.axhline(bandwidths, color=COLOURS[1], ls="--", lw=1.2)
        axes.annotate(
            f"bandwidths: {bandwidths:g}", (len(ratios) - 0.55, bandwidths), (0, 3), textcoords="offset points", ha="right", color=COLOURS[1]
        )
        axes.set(xlabel="nodes of 8 GPUs", ylabel="NVLink bytes / InfiniBand bytes")
        axes.margins(y=0.15)
        return canvas


def errors_figure(rows: Sequence[Comparison], baselines: Sequence[str]) -> Canvas:
    """Signed relative error of each row, ours as a dot with its band, baselines as crosses; 0 is as published."""
    with mpl.rc_context(STYLE):
        canvas, axes = plt.subplots(figsize=(7.8, 1.2 + 0.36 * len(rows)), layout="constrained")
        for y, row in enumerate(rows):
            low, mid, high = (100 * (value / row.value - 1) for value in row.ours)
            axes.plot([low, high], [y, y], color=COLOURS[0], lw=5, alpha=0.3, solid_capstyle="butt", label="ours, P10 to P90")
            axes.plot(mid, y, "o", color=COLOURS[0], ms=5, label="ours, P50")
        for index, name in enumerate(baselines):
            at = [(100 * (row.baselines[name] / row.value - 1), y) for y, row in enumerate(rows) if name in row.baselines]
            if at:
                axes.plot(*zip(*at, strict=True), ls="", marker="xs^vDP"[index % 6], ms=4, color=COLOURS[1 + index % 6], label=f"formula {name}")
        axes.axvline(0, color="#1b1b1b", lw=1)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=20)
        ticks = [-100, -50, -20, -10, 0, 10, 20, 50, 100, 300, 1000]
        left, right = axes.get_xlim()
        axes.set_xticks([t for t in ticks if left <= t <= right], [f"{t:+d}" if t else "0" for t in ticks if left <= t <= right])
        axes.minorticks_off()
        axes.set(xlabel="error in % of the measured time (linear to 20 %, then logarithmic)")
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
        return canvas
