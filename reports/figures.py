"""The pictures, by matplotlib, the same bytes each time."""

import io
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from cycler import cycler

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure as Canvas

from reports import analysis
from reports.store import StudyRecord
from sweeps import schema

STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=["#1b1b1b", "#0b6bb8", "#d1495b", "#2a9d5c", "#e08e1b", "#7b52ab", "#19a0a8", "#8a6d3b", "#c2569b", "#6c757d"]),
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A PNG with its caption and the text that stands in for it."""

    name: str
    caption: str
    alternative: str
    png: bytes


def draw_all(record: StudyRecord) -> tuple[list[Figure], list[str]]:
    """Every figure that the store has data for, and a sentence for each that it has not."""
    figures, missing = [], []
    with mpl.rc_context(STYLE):
        for make in (loss_curves, effects, trade_off, expert_load, all_to_all_by_limit, importance_bars):
            made = make(record)
            if isinstance(made, Figure):
                figures.append(made)
            else:
                missing.append(made)
    return figures, missing


def loss_curves(record: StudyRecord) -> Figure | str:
    """Validation bits per byte over tokens: mean over seeds, band from lowest to highest."""
    canvas, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6))
    drawn = 0
    for name, runs in record.variants.items():
        for axes, key in ((left, schema.LOSS), (right, schema.BITS_PER_BYTE)):
            curves = [{r["tokens"]: r[key] for r in run.records if key in r} for run in runs if run.records]
            tokens = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
            if not tokens:
                continue
            values = np.array([[c[t] for t in tokens] for c in curves])
            if key == schema.LOSS:
                width = max(len(tokens) // 25, 1)
                values = np.array([np.convolve(row, np.ones(width) / width, "valid") for row in values])
                tokens = tokens[width - 1 :]
            millions = np.array(tokens) / 1e6
            axes.plot(millions, values.mean(0), label=name, lw=1.4, marker="o" if key != schema.LOSS else None, ms=3)
            if len(values) > 1:
                axes.fill_between(millions, values.min(0), values.max(0), alpha=0.15, lw=0)
            drawn += 1
    if not drawn:
        plt.close(canvas)
        return "Loss curves: no run has recorded any."
    left.set(xlabel="training tokens (millions)", ylabel="training loss (nats per token, smoothed)")
    right.set(xlabel="training tokens (millions)", ylabel="held-out bits per byte")
    reference = analysis.metric(record.runs, schema.NGRAM_BITS_PER_BYTE)
    if reference is not None:
        right.axhline(reference.mean, ls="--", lw=1, color="#888")
        right.annotate(
            "order-2 model of the same tokens",
            (0.98, reference.mean),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="top",
            fontsize=8,
            color="#666",
        )
    right.legend(fontsize=7)
    caption = "Loss over training. Lines are means over seeds, bands reach from the lowest to the highest seed."
    return _finish(
        canvas, "loss-curves", caption, f"Training loss and held-out bits per byte of {len(record.variants)} variants over tokens, falling."
    )


def effects(record: StudyRecord) -> Figure | str:
    """Paired difference to the baseline, with its interval."""
    variants = record.variants
    base = next((runs for runs in variants.values() if runs[0].baseline), [])
    rows = list(analysis.effects(record, schema.BITS_PER_BYTE).items())
    if not rows:
        return "Effects: no variant has a finished run on a seed of the baseline."
    rows.sort(key=lambda row: row[1].mean)
    canvas, axes = plt.subplots(figsize=(7.6, 0.9 + 0.42 * len(rows)))
    for y, (_, effect) in enumerate(rows):
        colour = "#888" if not effect.resolved else "#d1495b" if effect.mean > 0 else "#2a9d5c"
        if effect.low is not None and effect.high is not None:
            axes.plot([effect.low, effect.high], [y, y], color=colour, lw=2.4, alpha=0.55, solid_capstyle="round")
        axes.plot(effect.mean, y, "o", color=colour, ms=6)
    axes.axvline(0, color="#1b1b1b", lw=1)
    floor = analysis.noise_floor(base, schema.BITS_PER_BYTE)
    if floor is not None:
        axes.axvspan(-floor, floor, color="#888", alpha=0.12, lw=0)
    axes.set(yticks=range(len(rows)), yticklabels=[n for n, _ in rows], xlabel="held-out bits per byte, difference to the baseline (left is better)")
    caption = "Effect of each variant, paired over seeds, with 95 % t-intervals. Grey band: the baseline's standard deviation over seeds."
    text = "; ".join(f"{n} {e.mean:+.4f}" for n, e in rows)
    return _finish(canvas, "effects", caption, f"Differences in bits per byte to the baseline: {text}.")


def trade_off(record: StudyRecord) -> Figure | str:
    """Loss against cache against communication time, Pareto front marked."""
    points: dict[str, tuple[float, ...]] = {}
    for name, runs in record.variants.items():
        loss, cache, time = (analysis.metric(runs, k) for k in (schema.BITS_PER_BYTE, schema.KV_BYTES_PER_TOKEN, schema.ALL_TO_ALL_SECONDS))
        if loss and cache:
            points[name] = (loss.mean, cache.mean, time.mean if time else 0.0)
    if len(points) < 2:
        return "Trade-off: fewer than two variants have loss and cache."
    front = analysis.pareto(points)
    canvas, axes = plt.subplots(1, 2, figsize=(9.2, 3.8), sharey=True)
    for index, (name, point) in enumerate(points.items()):
        for place, x in ((axes[0], point[1]), (axes[1], point[2] * 1e6)):
            place.scatter(x, point[0], s=60 if name in front else 28, marker="o" if name in front else "x", color=f"C{index % 10}", label=name)
    axes[0].set(xlabel="KV cache (bytes per token, 16 bits)", ylabel="held-out bits per byte")
    axes[1].set(xlabel="simulated all-to-all, dispatch and combine (µs; 0 without experts)")
    axes[1].legend(fontsize=7)
    caption = "Loss against KV bytes and against simulated communication time. Discs are on the Pareto front of all three, crosses are beaten."
    return _finish(canvas, "trade-off", caption, f"On the Pareto front of loss, cache and communication: {', '.join(sorted(front))}.")


def expert_load(record: StudyRecord) -> Figure | str:
    """Load of experts over training, of the baseline's first seed, and of the devices of every variant at the end."""
    traced = {name: run for name, runs in record.variants.items() for run in runs[:1] if run.trace is not None and run.trace.expert_ids.size}
    if not traced:
        return "Expert load: no run has left a routing trace."
    name, run = next(iter(traced.items()))
    trace = run.trace
    assert trace is not None
    load = np.stack(
        [np.bincount(step.ravel(), minlength=trace.n_routed_experts) for step in trace.expert_ids.reshape(-1, *trace.expert_ids.shape[2:])]
    )
    load = load / load.mean(1, keepdims=True)
    canvas, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8), gridspec_kw={"width_ratios": [1.25, 1]})
    picture = left.imshow(load, aspect="auto", cmap="cividis", vmin=0, vmax=max(2.0, float(load.max())), interpolation="nearest")
    labels = [f"step {s}, layer {layer}" for s in trace.steps for layer in trace.layers]
    left.set(yticks=range(len(labels)), xlabel="routed expert", title=f"load over mean: {name}, seed {run.seed}")
    left.set_yticklabels(labels, fontsize=6)
    left.grid(visible=False)
    canvas.colorbar(picture, ax=left, fraction=0.04)
    for index, (variant, other) in enumerate(traced.items()):
        assert other.trace is not None
        devices = other.trace.device_ids()[-1].ravel()
        share = np.sort(np.bincount(devices, minlength=other.trace.expert_devices) / len(devices) * other.trace.expert_devices)[::-1]
        right.plot(range(1, len(share) + 1), share, marker=".", lw=1, color=f"C{index % 10}", label=variant)
    right.axhline(1, color="#888", lw=1, ls="--")
    right.set(xlabel="device, busiest first", ylabel="load over mean", title="devices at the end, first seed")
    right.legend(fontsize=7)
    caption = "Expert load over training (1 is perfect balance), and device load of every variant at its end, on held-out text."
    return _finish(
        canvas,
        "expert-load",
        caption,
        f"Heat map of expert load of {name}; the busiest expert carries {load[-1].max():.2f} times the mean at the end.",
    )


def all_to_all_by_limit(record: StudyRecord) -> Figure | str:
    """Simulated time of each trained model, re-routed under every device limit."""
    canvas, axes = plt.subplots(figsize=(6.4, 3.6))
    for index, (name, runs) in enumerate(record.variants.items()):
        tables = [run.simulation["by_device_limit"] for run in runs if run.simulation]
        if not tables:
            continue
        limits = [m for m in tables[0] if m != "unrestricted"]
        values = np.array([[table[m]["seconds"] * 1e6 for m in limits] for table in tables])
        axes.plot([int(m) for m in limits], values.mean(0), marker="o", ms=3.5, lw=1.2, color=f"C{index % 10}", label=name)
    if not axes.lines:
        plt.close(canvas)
        return "All-to-all against M: no run has been simulated."
    cluster = record.study["cluster"]
    axes.set(xlabel="device limit M", ylabel="dispatch and combine (µs, simulated)", ylim=(0, None))
    axes.legend(fontsize=7)
    caption = f"Simulated all-to-all of one layer against M, each trained model re-routed: {cluster['file']}, {cluster['nodes']} nodes of {cluster['gpus_per_node']} GPUs."
    return _finish(canvas, "all-to-all-by-limit", caption, "Simulated all-to-all time rises with the device limit and levels off.")


def importance_bars(record: StudyRecord) -> Figure | str:
    """Two evaluators side by side."""
    found = analysis.importances(record, schema.BITS_PER_BYTE)
    if found.missing:
        return f"Importances: {found.missing}."
    names = sorted(found.fanova, key=found.fanova.__getitem__)
    canvas, axes = plt.subplots(figsize=(6.4, 0.9 + 0.45 * len(names)))
    for offset, (label, values) in ((0.2, ("fANOVA", found.fanova)), (-0.2, ("PED-ANOVA", found.ped_anova))):
        axes.barh(np.arange(len(names)) + offset, [values.get(n, 0.0) for n in names], height=0.36, label=label)
    axes.set(yticks=range(len(names)), yticklabels=[n.removeprefix("model.") for n in names], xlabel="share of the variation in bits per byte")
    axes.legend(fontsize=8)
    first = [max(v, key=v.__getitem__).removeprefix("model.") for v in (found.fanova, found.ped_anova) if v]
    agree = f"Both name {first[0]} first." if len(set(first)) == 1 else f"They disagree: fANOVA names {first[0]} first, PED-ANOVA {first[-1]}."
    return _finish(
        canvas, "importances", f"Importance of the searched settings by two evaluators over {len(record.variants)} variants. {agree}", agree
    )


def _finish(canvas: Canvas, name: str, caption: str, alternative: str) -> Figure:
    canvas.tight_layout()
    buffer = io.BytesIO()
    # Software and date would make the same figure different bytes.
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(canvas)
    return Figure(name, caption, alternative, buffer.getvalue())
