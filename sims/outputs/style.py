"""How the pictures look, and the same bytes each time."""

import io
from typing import Any

import matplotlib as mpl
from cycler import cycler

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Canvas

# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1b1b")
STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=COLOURS),
    "legend.frameon": False,
    "svg.hashsalt": "moelab",
    "svg.fonttype": "path",
}


def png(canvas: Canvas, alternative: str) -> bytes:
    """The picture, its text alternative in the file's own description."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None, "Description": alternative})
    plt.close(canvas)
    return buffer.getvalue()


def svg(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(canvas)
    return buffer.getvalue()
