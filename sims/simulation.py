"""The one door: what kind of question it is decides who answers."""

from functools import singledispatch
from typing import Any

from research.routing_trace import RoutingTrace


@singledispatch
def simulate(spec: Any, trace: RoutingTrace | None = None) -> Any:
    """Answer a question (`AllToAll`, `TrainingStep`, `Serving`, ...); each simulator registers itself for its own."""
    del trace
    raise TypeError(f"simulate: {type(spec).__name__} is no question that a simulator of sims answers")
