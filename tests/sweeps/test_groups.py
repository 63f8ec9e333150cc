"""Groups of workers: what is asked of Ray and refused before anything starts, with a stand-in for Ray."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from research.errors import ConfigError
from sweeps.cluster import GROUP_SECONDS, START_SECONDS, RayExecutor
from sweeps.connection import connect
from sweeps.definition import Resources
from sweeps.slots import Member, Slot, place_of
from sweeps.workers import Place


def asked(address: str | None, group_cpus: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    connect(SimpleNamespace(init=lambda **given: found.update(given)), address, group_cpus)
    return found


def test_eight_workers_share_the_cores_of_a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Ray of its own; a cluster that is there has the CPUs that it has."""
    assert asked(None, 8, 2, monkeypatch)["num_cpus"] == 8
    assert "num_cpus" not in asked(None, 2, 2, monkeypatch)
    assert "num_cpus" not in asked(None, 1, 2, monkeypatch)
    assert "num_cpus" not in asked("10.0.0.1:6379", 8, 2, monkeypatch)


def test_workers_of_one_run_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: {"GPU": 2.0, "CPU": 8.0})
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ConfigError, match=r"resources.gpus_per_worker = 0.5: .* whole number with workers_per_trial = 2, or gpus: none"):
        RayExecutor(Resources(workers_per_trial=2), 1)


def slot_of(*places: Place | None) -> Slot:
    return Slot(members=[Member(actor=None, question=None, asked=0.0, place=place, moving=True) for place in places])


def test_a_group_is_given_the_time_to_say_whom_it_waited_for() -> None:
    executor = RayExecutor.__new__(RayExecutor)
    executor._resources = Resources(hang_seconds=300.0)
    group, alone = slot_of(None, None), slot_of(None)
    assert executor._patience(group, group.members[0]) == 300.0 + GROUP_SECONDS
    assert executor._patience(alone, alone.members[0]) == 300.0
    executor._resources = Resources(hang_seconds=5.0)
    alone.members[0].moving = False
    assert executor._patience(alone, alone.members[0]) == START_SECONDS


def test_the_place_of_a_group_names_all_its_hosts() -> None:
    def at(node: str, host: str) -> Place:
        return Place(node=node, host=host, pid=7, cores=(), killed=0)

    spread = place_of(slot_of(at("n1", "a"), at("n1", "a"), at("n2", "b"), at("n3", "b")))
    assert spread is not None
    assert (spread.host, spread.pid) == ("a (2), b (1), b (1)", 7)
    assert place_of(slot_of(at("n1", "a"))) == at("n1", "a")
