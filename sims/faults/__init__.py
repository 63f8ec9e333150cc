"""What goes wrong in a cluster: slow GPUs and links, and who waits for them; lost nodes, and what checkpoints save."""

from sims.faults.attribution import Wait, waits
from sims.faults.devices import Speeds
from sims.faults.goodput import Goodput, GoodputResult, simulate_goodput
from sims.faults.layers import SlowLayers, SlowResult, simulate_layers
from sims.faults.steps import SlowStepResult, slow_step

__all__ = [
    "Goodput", "GoodputResult", "SlowLayers", "SlowResult", "SlowStepResult", "Speeds", "Wait",
    "simulate_goodput", "simulate_layers", "slow_step", "waits",
]  # fmt: skip
