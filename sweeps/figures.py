"""Pictures for MLflow's pages: a run's curves and its routing, a study's comparison.  A report draws its own, from all runs."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.routing_trace import RoutingTrace
from sweeps import schema
from sweeps.status import StudyStatus, Variant

DPI = 90
BARS = 25
INK, SECOND = "#1b1b1b", "#0b6bb8"


def draw_run(directory: Path, out: Path, title: str) -> list[Path]:
    """loss.png, routing.png and routing_histograms.npz of the run in `directory`, as far as it recorded them; what was written comes back."""
    written = []
    curves = _curves(directory / schema.METRICS_FILE)
    if curves:
        written.append(_save(_draw_curves(curves, title), out / "loss.png"))
    if (directory / schema.ROUTING_FILE).exists():
        trace = RoutingTrace.load(directory / schema.ROUTING_FILE)
        found = histograms(trace)
        np.savez_compressed(out / "routing_histograms.npz", **found)  # type: ignore[arg-type]
        written += [out / "routing_histograms.npz", _save(_draw_routing(found, title), out / "routing.png")]
    return written


def draw_study(status: StudyStatus, out: Path) -> list[Path]:
    """comparison.png: the variants' means with their standard errors, one panel per objective; nothing before a run has finished."""
    rows = [(metric, [v for v in _ranked(status, metric) if v.mean is not None][:BARS]) for metric, _ in status.objectives]
    rows = [(metric, variants) for metric, variants in rows if variants]
    if not rows:
        return []
    height = 1.0 + 0.28 * max(len(variants) for _, variants in rows)
    figure = Figure(figsize=(6.5 * len(rows), max(height, 2.4)), dpi=DPI, layout="constrained")
    for place, (metric, variants) in enumerate(rows, 1):
        _draw_means(figure.add_subplot(1, len(rows), place), metric, variants)
    figure.suptitle(status.question, fontsize=9, wrap=True)
    return [_save(figure, out / "comparison.png")]


def histograms(trace: RoutingTrace) -> dict[str, np.ndarray]:
    """Counts over the traced tokens, per snapshot S and MoE layer L.

    steps (S,); layers (L,); expert_load (S, L, E) and device_load (S, L, D): choices that went to each; devices_per_token
    (S, L, D + 1): tokens by how many distinct devices their experts stand on.
    """
    ids, devices = trace.expert_ids, trace.device_ids()
    snapshots, layers = ids.shape[:2]
    shape = (snapshots, layers)
    experts = np.stack([np.bincount(ids[place].ravel(), minlength=trace.n_routed_experts) for place in np.ndindex(shape)])
    loads = np.stack([np.bincount(devices[place].ravel(), minlength=trace.expert_devices) for place in np.ndindex(shape)])
    ordered = np.sort(devices, axis=-1)
    distinct = 1 + (np.diff(ordered, axis=-1) != 0).sum(-1)
    counted = np.stack([np.bincount(distinct[place].ravel(), minlength=trace.expert_devices + 1) for place in np.ndindex(shape)])
    return {
        "steps": trace.steps,
        "layers": trace.layers,
        "expert_load": experts.reshape(*shape, -1),
        "device_load": loads.reshape(*shape, -1),
        "devices_per_token": counted.reshape(*shape, -1),
    }


def _curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tokens and values of the two curves of a run, where it recorded them."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    found = {}
    for name in (schema.LOSS, schema.BITS_PER_BYTE):
        points = [(r["tokens"], r[name]) for r in records if name in r]
        if points:
            tokens, values = zip(*points, strict=True)
            found[name] = (np.asarray(tokens, float), np.asarray(values, float))
    return found


def _draw_curves(curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    figure = Figure(figsize=(4.4 * len(curves), 3.0), dpi=DPI)
    figure.subplots_adjust(left=0.16 / len(curves), right=0.98, bottom=0.15, top=0.9, wspace=0.22)
    labels = {schema.LOSS: "training loss (nats per token)", schema.BITS_PER_BYTE: "held-out bits per byte"}
    for place, (name, (tokens, values)) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(1, len(curves), place)
        axes.plot(tokens, values, color=INK if name == schema.LOSS else SECOND, lw=1.2, marker=None if len(values) > 20 else "o", ms=3)
        axes.set(xlabel="training tokens", ylabel=labels[name])
        _plain(axes)
    figure.suptitle(title, fontsize=9)
    return figure


def _draw_routing(found: dict[str, np.ndarray], title: str) -> Figure:
    """The last snapshot: each layer's load of experts and of devices, where 1 is even; tokens by the devices that they reach."""
    figure = Figure(figsize=(11.0, 3.0), dpi=DPI)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.16, top=0.82, wspace=0.2)
    layers = [str(layer) for layer in found["layers"]]
    for place, (key, name) in enumerate((("expert_load", "expert"), ("device_load", "device")), 1):
        load = found[key][-1].astype(float)
        load /= np.maximum(load.mean(-1, keepdims=True), 1e-9)
        axes = figure.add_subplot(1, 3, place)
        top = max(2.0, float(load.max()))
        axes.imshow(load, aspect="auto", cmap="viridis", vmin=0.0, vmax=top, interpolation="nearest")
        axes.set(xlabel=name, ylabel="layer", title=f"load by {name}: even is 1, dark 0, bright {top:.3g}")
        axes.set_yticks(range(len(layers)), layers)
        axes.title.set_fontsize(9)
        _plain(axes, grid=False)
    axes = figure.add_subplot(1, 3, 3)
    counts = found["devices_per_token"][-1].astype(float)
    share = counts.sum(0) / counts.sum()
    axes.bar(np.arange(1, len(share)), share[1:], color=SECOND)
    axes.set(xlabel="distinct devices of a token", ylabel="share of tokens", title="all layers")
    axes.title.set_fontsize(9)
    _plain(axes)
    figure.suptitle(f"{title}: routing at step {int(found['steps'][-1])}", fontsize=9)
    return figure


def _ranked(status: StudyStatus, metric: str) -> list[Variant]:
    """The variants by one objective, as they are by the first: baseline first, then best first."""
    direction = dict(status.objectives)[metric]
    own = StudyStatus(
        root=status.root,
        state=status.state,
        question=status.question,
        objectives=((metric, direction),),
        planned=status.planned,
        seeds=status.seeds,
        runs=status.runs,
        workers=status.workers,
        seconds_left=None,
    )
    return own.variants


def _draw_means(axes: Axes, metric: str, variants: Sequence[Variant]) -> None:
    heights = np.arange(len(variants))[::-1]
    for height, variant in zip(heights, variants, strict=True):
        colour = INK if variant.baseline else SECOND
        single = [run.values[metric] for run in variant.runs if run.state == schema.FINISHED and metric in run.values]
        axes.plot(single, [height] * len(single), "o", color=colour, alpha=0.3, ms=4, mec="none")
        axes.errorbar([variant.mean or 0.0], [height], xerr=[variant.standard_error or 0.0], fmt="s", color=colour, ms=5, capsize=3)
    if variants[0].baseline and variants[0].mean is not None:
        axes.axvline(variants[0].mean, color=INK, lw=0.8, ls=":")
    axes.set_yticks(heights, [variant.name for variant in variants], fontsize=8)
    axes.set_xlabel(f"{metric}: seeds, mean ± standard error")
    _plain(axes)


def _plain(axes: Axes, *, grid: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(8)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    # No date and no version in the file: the same numbers make the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})
    return path
