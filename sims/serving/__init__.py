"""Continuous batching: what a model serves on these GPUs, and what holds it back.

`simulate(Serving(...))` answers with throughput, residents and latencies; `generation_ratio()` with DeepSeek-V2 against DeepSeek 67B.
"""

from sims.serving.comparison import generation_ratio
from sims.serving.requests import Lengths
from sims.serving.result import ServingResult
from sims.serving.simulate import simulate_serving
from sims.serving.spec import Serving, serving

__all__ = ["Lengths", "Serving", "ServingResult", "generation_ratio", "serving", "simulate_serving"]
