"""Who waited for whom, on which link: out of the phases of any simulator."""

from dataclasses import asdict, dataclass
from typing import Any

from sims.timeline import Timeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """All waits of one GPU for one other on one of its streams."""

    waiter: int
    culprit: int
    link: str
    """The stream of the culprit that held the waiter up; `compute` where it came late."""
    seconds: float
    times: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def waits(timeline: Timeline) -> list[Wait]:
    """Longest first; ties in the order of the GPUs."""
    sums: dict[tuple[int, int, str], list[float]] = {}
    for phase in timeline.phases:
        if phase.waits_for >= 0 and phase.wait_seconds > 0:
            sums.setdefault((phase.gpu, phase.waits_for, phase.wait_link), []).append(phase.wait_seconds)
    found = [Wait(waiter=w, culprit=c, link=link, seconds=sum(each), times=len(each)) for (w, c, link), each in sums.items()]
    return sorted(found, key=lambda wait: (-wait.seconds, wait.waiter, wait.culprit, wait.link))


def culprits(found: list[Wait]) -> list[tuple[int, str, float]]:
    """(GPU, link, seconds that all others waited for it there), longest first."""
    sums: dict[tuple[int, str], float] = {}
    for wait in found:
        sums[wait.culprit, wait.link] = sums.get((wait.culprit, wait.link), 0.0) + wait.seconds
    return sorted(((gpu, link, seconds) for (gpu, link), seconds in sums.items()), key=lambda item: (-item[2], item[0], item[1]))
