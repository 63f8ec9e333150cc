"""A training step event by event: a SimPy process for each position of the pipeline, an event for each phase.

Pipelines that are alike are run once.  Without jitter the last event is the longest path of `step`, which a test holds it to.
"""

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
import simpy

from sims.timeline import Phase, Timeline
from sims.training.layout import gpu_index
from sims.training.passes import Segment
from sims.training.schedules import Job, graph
from sims.training.schedules import Step as Place
from sims.training.spec import TrainingStep
from sims.training.step import Step, Unit

NOTHING: dict[str, Any] = {"nvlink_bytes": 0, "infiniband_bytes": 0, "waits_for": -1, "wait_seconds": 0.0, "wait_link": ""}
DIRECTION = {"F": "forward", "B": "backward", "BW": "backward", "W": "weights", "FB": "both"}


class Run:
    """One unit under SimPy, at one draw of the constants; `seconds` when the last position is done, gradients and optimizer included.

    events: that SimPy has handled.  jitter: standard deviation of the logarithm of a phase's time.
    """

    def __init__(self, spec: TrainingStep, step: Step, unit: Unit, *, draw: int, jitter: float, timeline: Timeline | None) -> None:
        self.spec, self.unit, self.draw, self.jitter, self.timeline = spec, unit, draw, jitter, timeline
        self.send = float(step.send[draw])
        self.sends = {ends: float(seconds[draw]) for ends, seconds in unit.sends.items()}
        self.environment = simpy.Environment()
        self.random = np.random.default_rng((spec.seed, unit.index))
        self.steps = graph(spec.schedule, spec.stages, spec.microbatches)
        self.done = [self.environment.event() for _ in self.steps]
        self.events = 0
        self.plan: dict[Job, list[tuple[float, Segment]]] = {}
        mine: list[list[tuple[int, Place]]] = [[] for _ in range(spec.stages)]
        for index, place in enumerate(self.steps):
            mine[place.position].append((index, place))
        # Events that nobody waits for need not be handled.
        self.awaited = {i for place in self.steps for i in (place.forward_from, place.backward_from) if i >= 0}
        finished = [self.environment.process(self._position(position, places)) for position, places in enumerate(mine)]
        self.environment.run(self.environment.all_of(finished))
        self.seconds = float(self.environment.now)

    def _position(self, position: int, places: list[tuple[int, Place]]) -> Generator[Any, Any, None]:
        environment, gpu = self.environment, gpu_index(self.spec, position, self.unit.index, 0)
        for index, place in places:
            idle, last = environment.now, -1
            for source in (place.forward_from, place.backward_from):
                if source >= 0:
                    arrived = (yield self.done[source]) + self.sends.get((self.steps[source].position, position), self.send)
                    if arrived > environment.now:
                        yield environment.timeout(arrived - environment.now)
                        self.events += 1
                        last = source
            late = environment.now - idle
            last = last if last >= 0 else max(place.forward_from, place.backward_from)
            for seconds, segment in self._planned(place.job):
                start = environment.now
                stretched = seconds * float(np.exp(self.jitter * self.random.standard_normal())) if self.jitter else seconds
                yield environment.timeout(stretched)
                self.events += 1
                if self.timeline is not None:
                    self._record(gpu, place, segment, start, late, last)
                    late = 0.0
            if index in self.awaited:
                self.done[index].succeed(environment.now)
                self.events += 1
        for name, draws in (("gradients", self.unit.gradients[position]), ("optimizer", self.unit.optimizer[position])):
            start = environment.now
            yield environment.timeout(float(draws[self.draw]))
            self.events += 1
            if self.timeline is not None:
                copies = self.spec.experts_over * self.spec.tensor_parallel * self.unit.copies
                self.timeline.phases.append(self._phase(name, gpu, name, start, copies=copies))

    def _planned(self, job: Job) -> list[tuple[float, Segment]]:
        samples = self.unit.work.samples
        key = job._replace(microbatch=job.microbatch % samples, back_microbatch=job.back_microbatch % samples)
        if key not in self.plan:
            segments = [(float(segment.seconds[self.draw]), segment) for segment in self.unit.work.of(job)]
            self.plan[key] = [item for item in segments if item[0] > 0]
        return self.plan[key]

    def _record(self, gpu: int, place: Place, segment: Segment, start: float, late: float, source: int) -> None:
        assert self.timeline is not None
        copies = self.spec.experts_over * self.spec.tensor_parallel * self.unit.copies
        phase = self._phase(segment.name, gpu, segment.stream, start, copies=copies)
        phase.microbatch, phase.direction, phase.layer = place.job.microbatch, DIRECTION[place.job.kind], segment.layer
        phase.nvlink_bytes, phase.infiniband_bytes = segment.nvlink_bytes, segment.infiniband_bytes
        if late > 0:
            phase.waits_for = gpu_index(self.spec, self.steps[source].position, self.unit.index, 0)
            phase.wait_seconds, phase.wait_link = late, "pipeline"
        self.timeline.phases.append(phase)
        if segment.stream == "all-to-all" and (beside := self._beside(segment)):
            ends = min(start + beside, phase.end_seconds)
            self.timeline.phases.append(replace(phase, name="shared experts", stream="compute", end_seconds=ends, **NOTHING))

    def _beside(self, segment: Segment) -> float:
        """Seconds in which the shared experts compute while tokens travel, at the SMs that are left to them."""
        return float(sum(value[self.draw] for value in segment.compute.values())) / self.unit.work.layers.sms

    def _phase(self, name: str, gpu: int, stream: str, start: float, *, copies: int) -> Phase:
        return Phase(
            name=name,
            node=gpu // self.spec.gpus_per_node,
            gpu=gpu,
            stream=stream,
            start_seconds=start,
            end_seconds=float(self.environment.now),
            copies=copies,
        )


def event_driven(spec: TrainingStep, step: Step, *, draw: int = 0, jitter: float = 0.0, timeline: Timeline | None = None) -> tuple[float, int]:
    """Seconds of the step and events handled, at one draw of the constants; phases are added to `timeline`."""
    runs = [Run(spec, step, unit, draw=draw, jitter=jitter, timeline=timeline) for unit in step.units]
    return max(run.seconds for run in runs), sum(run.events for run in runs)
