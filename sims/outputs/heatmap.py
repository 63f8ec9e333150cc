"""Who sends how many bytes to whom, as a picture: GPU by GPU, one panel per kind of link."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from sims.outputs.style import STYLE, png

NUMBERS_UP_TO = 16
"""GPUs; in a larger picture numbers could not be read."""


def heatmap_png(nvlink: np.ndarray, infiniband: np.ndarray, gpus_per_node: int, title: str) -> bytes:
    """Byte matrices (G, G), source by destination, as PNG.  Panels have scales of their own; lines part the nodes."""
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        canvas, panels = plt.subplots(1, 2, figsize=(10.4, 4.9), layout="constrained")
        for axes, name, matrix in zip(panels, ("NVLink", "InfiniBand"), (nvlink, infiniband), strict=True):
            _panel(axes, name, np.asarray(matrix), gpus_per_node)
        canvas.suptitle(title)
        return png(canvas, alternative_text(nvlink, infiniband, title))


def alternative_text(nvlink: np.ndarray, infiniband: np.ndarray, title: str) -> str:
    """The heat map in a sentence per link."""
    sentences = [f"{title}: bytes from each GPU (row) to each GPU (column)."]
    for name, matrix in (("NVLink", np.asarray(nvlink)), ("InfiniBand", np.asarray(infiniband))):
        if not matrix.any():
            sentences.append(f"{name}: none.")
            continue
        source, target = np.unravel_index(int(matrix.argmax()), matrix.shape)
        sentences.append(f"{name}: {int(matrix.sum()):,} in all, most ({int(matrix.max()):,}) from GPU {source} to GPU {target}.")
    return " ".join(sentences)


def _panel(axes: Axes, name: str, matrix: np.ndarray, gpus_per_node: int) -> None:
    gpus = len(matrix)
    unit, label = _unit(float(matrix.max(initial=0)))
    values = matrix / unit
    picture = axes.imshow(values, cmap="cividis", vmin=0, vmax=max(float(values.max(initial=0)), 1e-9), interpolation="nearest")
    axes.set(title=f"{name}: {matrix.sum() / unit:,.1f} {label} in all" if matrix.any() else f"{name}: no bytes", xlabel="to GPU", ylabel="from GPU")
    for edge in range(gpus_per_node, gpus, gpus_per_node):
        axes.axhline(edge - 0.5, color="white", lw=1)
        axes.axvline(edge - 0.5, color="white", lw=1)
    if gpus <= NUMBERS_UP_TO:
        axes.set(xticks=range(gpus), yticks=range(gpus))
        for (row, column), value in np.ndenumerate(values):
            if value:
                dark = value < 0.6 * values.max()
                axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=6, color="white" if dark else "black")
    axes.figure.colorbar(picture, ax=axes, shrink=0.8, label=label)


def _unit(largest: float) -> tuple[float, str]:
    return next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= size), (1.0, "bytes"))
