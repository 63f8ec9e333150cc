"""Charts of who was routed where: loads of experts and devices, devices per token, and what the cluster makes of it."""

from collections.abc import Callable, Sequence

import numpy as np

from reports import words
from reports.analysis import Analysis, Variant
from reports.charts import Chart, Heat, Lines, Series, few_points
from reports.document import plain
from reports.simulated import Curve, curves
from research.routing_trace import RoutingTrace
from sweeps import schema

MOST_PANELS = 9
MOST_ROWS = 24
MOST_CELLS = 12_000
TRACE_TEXT = "on held-out text, first seed"


def _traced(analysis: Analysis) -> list[tuple[Variant, RoutingTrace]]:
    """Each variant with the routing trace of its first seed that has one, the baseline first."""
    found = []
    for v in analysis.variants:
        trace = next((run.trace for run in v.runs if run.trace is not None), None)
        if trace is not None:
            found.append((v, trace))
    return found


def load(ids: np.ndarray, bins: int) -> np.ndarray:
    """(..., bins) of (..., M, K): assignments over their mean, so that 1 is perfect balance."""
    lead = ids.shape[:-2]
    flat = ids.reshape(-1, ids.shape[-2] * ids.shape[-1])
    counted = np.stack([np.bincount(row, minlength=bins) for row in flat])
    return (counted / counted.mean(1, keepdims=True)).reshape(*lead, bins)


def _rows(trace: RoutingTrace, most: int) -> list[tuple[int, int]]:
    """(step, layer) indices, layer by layer, thinned evenly to `most` rows; the last step is always there."""
    steps, layers = len(trace.steps), len(trace.layers)
    few_layers = np.unique(np.linspace(0, layers - 1, min(layers, max(most // 2, 1))).round().astype(int))
    few_steps = np.unique(np.linspace(0, steps - 1, max(min(steps, most // len(few_layers)), 1)).round().astype(int))
    chosen = few_steps if len(few_steps) > 1 or steps == 1 else np.array([steps - 1])
    return [(int(s), int(layer)) for layer in few_layers for s in chosen]


def _heat_chart(
    analysis: Analysis, name: str, what: str, bins: Callable[[RoutingTrace], int], ids: Callable[[RoutingTrace], np.ndarray]
) -> Chart | str:
    traced = _traced(analysis)
    if not traced:
        return f"{what.capitalize()} load: no run has left a routing trace."
    shown = traced[:MOST_PANELS]
    most = max(1, min(MOST_ROWS, MOST_CELLS // (len(shown) * max(bins(t) for _, t in shown))))
    loads = [load(ids(trace), bins(trace)) for _, trace in shown]
    # A few experts far above the rest would leave everything else dark: they are drawn as the brightest, and read out in full.
    top = max(2.0, float(np.ceil(np.quantile(np.concatenate([v.ravel() for v in loads]), 0.99) * 2) / 2))
    panels, told = [], []
    for (variant, trace), values in zip(shown, loads, strict=True):
        rows = _rows(trace, most)
        labels = tuple(f"layer {trace.layers[layer]}, step {trace.steps[s]:,}" for s, layer in rows)
        panels.append(
            Heat(
                title=plain(variant.words),
                x_label=f"{what} (number)",
                row_labels=labels,
                value_label="load over mean",
                values=np.stack([values[s, layer] for s, layer in rows]),
                top=top,
            )
        )
        told.append(f"{plain(variant.words)} {values[-1].max():.2f}")
    caption = f"Load of each {what} over layers and steps, {TRACE_TEXT}; 1 is perfect balance."
    if len(traced) > len(shown):
        caption += f" The first {len(shown)} of {len(traced)} variants."
    alternative = f"Heat maps of {what} load. Busiest {what} at the end, load over mean: {'; '.join(told)}."
    return Chart(name=name, caption=caption, alternative=alternative, panels=tuple(panels))


def expert_load(analysis: Analysis) -> Chart | str:
    return _heat_chart(analysis, "expert-load", "expert", lambda t: t.n_routed_experts, lambda t: t.expert_ids)


def device_load(analysis: Analysis) -> Chart | str:
    return _heat_chart(analysis, "device-load", "device", lambda t: t.expert_devices, lambda t: t.device_ids())


def distinct_devices(analysis: Analysis, colours: dict[str, int | None]) -> Chart | str:
    """Devices that a token is sent to, over training."""
    series = []
    for v in analysis.variants:
        found = [c for run in v.runs if (c := {r["tokens"]: r[schema.DISTINCT_DEVICES] for r in run.records if schema.DISTINCT_DEVICES in r})]
        tokens = sorted(set.intersection(*(set(c) for c in found))) if found else []
        if len(tokens) > 1:
            values = np.array([[c[t] for t in tokens] for c in found])
            low, high = (tuple(map(float, edge)) if len(values) > 1 else () for edge in (values.min(0), values.max(0)))
            x, y = tuple(t / 1e6 for t in tokens), tuple(map(float, values.mean(0)))
            series.append(Series(name=plain(v.words), x=x, y=y, low=low, high=high, colour=colours[v.name]))
    if not series:
        return "Distinct devices over training: no run recorded them."
    panel = Lines(title="", x_label="training tokens (millions)", y_label="distinct devices per token", series=few_points(series), from_zero=True)
    named = [(s.name, s.colour) for s in series if s.colour is not None]
    ends = "; ".join(f"{s.name} {s.y[-1]:.2f}" for s in series[:12])
    return Chart(
        name="distinct-devices",
        caption="Devices that a token is sent to, mean over tokens and layers; bands reach from the lowest to the highest seed.",
        alternative=f"Distinct devices per token at the end of training: {ends}.",
        panels=(panel,),
        legend=tuple(named),
    )


def simulated(analysis: Analysis) -> Chart | str:
    """Dispatch and combine of one layer over M, for each K and number of nodes, out of the trained models' routing."""
    traces = [trace for _, trace in _traced(analysis)]
    if not traces:
        return "Simulated M x K x nodes: no run has left a routing trace."
    cluster = analysis.record.study.get("cluster")
    if not cluster:
        return "Simulated M x K x nodes: the study names no cluster."
    found = curves(cluster, traces)
    if not found:
        return f"Simulated M x K x nodes: {traces[0].n_routed_experts} experts cannot be spread over the study's cluster."
    chosen = sorted({c.chosen for c in found})
    panels = []
    for nodes in sorted({c.nodes for c in found}):
        series = [
            Series(
                name=f"K = {c.chosen}",
                x=tuple(map(float, c.limits)),
                y=tuple(s * 1e6 for s in c.seconds),
                colour=chosen.index(c.chosen),
                marked=True,
                dashed=not c.trained,
            )
            for c in found
            if c.nodes == nodes
        ]
        title = f"{nodes} node{'' if nodes == 1 else 's'} of {cluster['gpus_per_node']} GPUs"
        panels.append(Lines(title=title, x_label="device limit M", y_label="dispatch and combine (µs)", series=tuple(series), from_zero=True))
    rerouted = [f"K = {k}" for k in chosen if not any(c.trained for c in found if c.chosen == k)]
    caption = (
        f"Simulated all-to-all of one layer on {cluster.get('file', 'h800')}, {cluster['tokens_per_device']:,} tokens per GPU of width "
        f"{cluster['hidden_size']:,}: the trained models' affinities, re-routed under every M."
    )
    if rerouted:
        caption += f" Dashed ({words.join(rerouted)}): no model was trained with it, the baseline's affinities are re-routed."
    return Chart(
        name="simulated",
        caption=caption,
        alternative=_spoken(found),
        panels=tuple(panels),
        legend=tuple((f"K = {k}", i) for i, k in enumerate(chosen)),
    )


def _spoken(found: Sequence[Curve]) -> str:
    parts = [
        f"{c.nodes} node{'' if c.nodes == 1 else 's'}, K = {c.chosen}: {c.seconds[0] * 1e6:,.0f} µs at M = {c.limits[0]}, "
        f"{c.seconds[-1] * 1e6:,.0f} at M = {c.limits[-1]}"
        for c in found
    ]
    return f"Simulated dispatch and combine over M. {'; '.join(parts)}."
