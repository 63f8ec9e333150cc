"""A trial's workers, as the executor of a cluster knows them."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

from sweeps.failures import Failure
from sweeps.workers import Answer, Place


@dataclass(kw_only=True, slots=True, eq=False)
class Member:
    """An actor, and the question that it has not answered yet."""

    actor: Any
    question: Any
    asked: float
    place: Place | None = None
    moving: bool = False
    """Whether its job has recorded anything: libraries, data and the model are there by then."""
    ended: Answer | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class Slot:
    """`lost`: its workers are being buried, after which its run ends in `failure`."""

    members: list[Member]
    placement: Any = None
    state: Literal["starting", "idle", "busy", "lost"] = "starting"
    run: str | None = None
    leaving: bool = False
    failure: Failure | None = None


def who(slot: Slot, member: Member) -> str:
    return f"the worker of rank {slot.members.index(member)}" if len(slot.members) > 1 else "the worker"


def place_of(slot: Slot) -> Place | None:
    """Where a run is computed: of a group, its first worker's place with the hosts of all, such as "a (4), b (4)"."""
    places = [member.place for member in slot.members if member.place is not None]
    if len(places) < 2:
        return places[0] if places else None
    hosts = Counter((place.node, place.host) for place in places)
    return replace(places[0], host=", ".join(f"{host} ({count})" for (_, host), count in hosts.items()))
