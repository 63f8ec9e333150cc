"""sims: the cluster that a model would be trained and served on.  `python -m sims --help`.

`simulate(AllToAll(...), trace)` answers with seconds, bytes on every link, and who waited for whom.
"""

from sims.all_to_all import AllToAll, plan
from sims.cluster import Cluster, load_cluster
from sims.faults import Goodput, SlowLayers
from sims.result import Result
from sims.routing import reroute, synthetic_trace
from sims.serving import Serving, generation_ratio
from sims.simulation import simulate
from sims.training import StepResult, TrainingStep

__all__ = [
    "AllToAll",
    "Cluster",
    "Goodput",
    "Result",
    "Serving",
    "SlowLayers",
    "StepResult",
    "TrainingStep",
    "generation_ratio",
    "load_cluster",
    "plan",
    "reroute",
    "simulate",
    "synthetic_trace",
]
