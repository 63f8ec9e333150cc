"""Whether several workers can share a run out, without torch: what a study's check asks before anything starts."""

import math

from research.config import RunConfig


def common_experts(workers: int, config: RunConfig) -> int:
    """P by default: as many of the workers as can share the experts out by whole devices; the rest are replicas."""
    return workers if config.model.moe is None else math.gcd(workers, config.model.moe.expert_devices)


def sharing_problems(config: RunConfig, workers: int, expert_parallel: int) -> list[str]:
    """A sentence for each reason why not."""
    training, moe = config.training, config.model.moe
    sizes = {"training.micro_batch_size": training.micro_batch_size, "training.batch_size": training.batch_size}
    sizes |= {"training.batch_ramp_from": training.batch_ramp_from}
    found = [f"{path} = {n}: must be a multiple of the {workers} workers of the run" for path, n in sizes.items() if n is not None and n % workers]
    if workers > 1 and moe is not None and moe.expert_devices % expert_parallel:
        found.append(f"model.moe.expert_devices = {moe.expert_devices}: must be a multiple of the {expert_parallel} workers that hold its experts")
    return found
