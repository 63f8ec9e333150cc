"""How well the GPUs of one expert-parallel group of a stage do: what makes two groups alike, or one the straggler."""

from typing import NamedTuple

import numpy as np

from sims.collective import Speed
from sims.links import link_speed
from sims.training.layout import gpu_index
from sims.training.spec import TrainingStep


class Health(NamedTuple):
    """By device of the group.  speeds: time of its computing over that of a healthy GPU.  nic, nvlink: share of the bandwidth left."""

    speeds: tuple[float, ...]
    nic: tuple[float, ...]
    nvlink: tuple[float, ...]

    @property
    def links(self) -> Speed | None:
        """None where all are whole."""
        if min(self.nic) == min(self.nvlink) == 1.0:
            return None
        return link_speed(len(self.speeds), dict(enumerate(self.nic)), dict(enumerate(self.nvlink)))

    @property
    def worst(self) -> tuple[float, float]:
        """Shares of NIC and NVLink that the worst devices have left."""
        return min(self.nic), min(self.nvlink)


Stages = tuple[Health, ...]
"""Of a unit, by stage."""


def units_alike(spec: TrainingStep) -> list[tuple[int, int, Stages]]:
    """Index of the first, number and health of units that are alike."""
    whole = (1.0,) * spec.experts_over
    if not spec.speed and not spec.nic and not spec.nvlink:
        return [(0, spec.units, (Health(whole, whole, whole),) * spec.stages)]
    found: dict[Stages, list[int]] = {}
    for unit in range(spec.units):
        stages = tuple(_health(spec, stage, unit) for stage in range(spec.stages))
        found.setdefault(stages, []).append(unit)
    return [(units[0], len(units), stages) for stages, units in found.items()]


def _health(spec: TrainingStep, stage: int, unit: int) -> Health:
    """Where several GPUs share a layer (tensor parallelism), all go at the pace of the worst."""
    gpus = [[gpu_index(spec, stage, unit, device, shard) for shard in range(spec.tensor_parallel)] for device in range(spec.experts_over)]
    return Health(
        tuple(max(spec.speed.get(gpu, 1.0) for gpu in shards) for shards in gpus),
        tuple(min(spec.nic.get(gpu, 1.0) for gpu in shards) for shards in gpus),
        tuple(min(spec.nvlink.get(gpu, 1.0) for gpu in shards) for shards in gpus),
    )


def worst_links(units: list[tuple[int, int, Stages]]) -> list[tuple[float, float]]:
    """By stage, over all units: what their common rings go by."""
    by_stage = zip(*(stages for _, _, stages in units), strict=True)
    return [tuple(np.min([health.worst for health in stage], axis=0).tolist()) for stage in by_stage]
