"""Workers as Ray actors: started where there is room, asked without waiting for any of them, replaced when they are lost.

`max_restarts=0`: a worker that dies is seen, named and replaced here, with its cause (while restarts remain Ray hides an
out-of-memory behind an ActorUnavailableError).
"""

import os
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from research.errors import ConfigError
from sweeps import schema
from sweeps.connection import connect, settings_of_its_own
from sweeps.control import Workers
from sweeps.executors import Event, events
from sweeps.failures import Failure
from sweeps.slots import Member, Slot, place_of, who
from sweeps.study import Resources
from sweeps.trial import Group, Job
from sweeps.workers import Answer, Place, Worker, bury

START_SECONDS = 120.0
POLL_SECONDS = 60.0
"""A worker that does not answer for so long is hung, whatever its run is at: training is in a thread of its own."""
ANSWER_SECONDS = 1.0
"""So long a worker keeps a question if there is nothing to tell but progress."""
BURY_SECONDS = 20.0
RESIZE_SECONDS = 3.0
GROUP_SECONDS = 15.0
"""A group's own time-out comes first, since it knows whom it waited for and in which layer: it takes as long to say so and to end."""
LONGER = 10.0
"""A run is given this many times the longest wait for progress that it has shown."""
BAD_STARTS = 3
PASSED_ON = ("MOELAB_HOME", "MOELAB_CACHE", "XDG_CACHE_HOME", "MOELAB_KERNELS")
"""Workers of a Ray that was there before inherit its environment, not the driver's."""


class RayExecutor:
    """Actors on a cluster that is there ($RAY_ADDRESS, or the job's own), or on a local Ray of this machine.

    resources: of the study.  runs: how many there will be, so that no more workers are started.
    ConfigError if not one worker fits, or more are asked for than fit, or none starts within START_SECONDS.
    """

    def __init__(self, resources: Resources, runs: int) -> None:
        self._local = not os.environ.get("RAY_ADDRESS")
        if self._local:
            settings_of_its_own()
        import ray  # noqa: PLC0415  (seconds; only a run that uses it pays)

        self._ray = ray
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if not ray.is_initialized():
            each = resources.workers_per_trial
            connect(ray, os.environ.get("RAY_ADDRESS"), each * resources.cpus_per_worker if each > 1 else 1)
        self._resources, self._wanted, self._runs = resources, resources.workers, runs
        has_gpus = bool(ray.cluster_resources().get("GPU", 0.0))
        if resources.gpus == "required" and not has_gpus:
            raise ConfigError("resources.gpus = 'required': this Ray has no GPU; use gpus: auto, or a cluster that has some")
        self._gpus = resources.gpus_per_worker if has_gpus and resources.gpus != "none" else 0.0
        if resources.workers_per_trial > 1 and self._gpus % 1:
            raise ConfigError(
                f"resources.gpus_per_worker = {self._gpus:g}: workers of one trial need GPUs of their own; must be a whole number with "
                f"workers_per_trial = {resources.workers_per_trial}, or gpus: none"
            )
        self._slots: list[Slot] = []
        self._closed = False
        self._told: list[Event] = []
        self._bad_starts, self._ever_started, self._resized, self._late = 0, False, 0.0, 0
        self._refuse_too_many()
        self._resize()
        self._width = self.workers
        self._await_workers()

    # --- the executor's questions -------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        return len(self._slots)

    def free(self) -> int:
        return sum(slot.state == "idle" and not slot.leaving for slot in self._slots)

    def start(self, job: Job) -> None:
        slot = next(slot for slot in self._slots if slot.state == "idle" and not slot.leaving)
        slot.state, slot.run = "busy", job.run
        self._told.append(Event(run=job.run, kind="started", place=place_of(slot)))
        share = self._gpus if 0 < self._gpus < 1 else 1.0
        groups: list[Group | None] = [None]
        if len(slot.members) > 1:
            try:
                address = self._ray.get(slot.members[0].actor.address.remote(), timeout=POLL_SECONDS)
            except (self._ray.exceptions.RayError, TimeoutError) as error:
                self._lose(slot, self._named(error, slot))
                return
            size, limit = len(slot.members), self._resources.hang_seconds
            groups = [Group(rank=rank, size=size, address=address, timeout_seconds=limit) for rank in range(size)]
        for member, group in zip(slot.members, groups, strict=True):
            member.ended, member.moving = None, False
            member.actor.start.remote(replace(job, gpu_share=share, group=group))

    def poll(self, wait: float = 0.0) -> list[Event]:
        if time.monotonic() - self._resized > RESIZE_SECONDS:
            self._resize()
        for slot in self._slots:
            for member in slot.members:
                if slot.state == "busy" and member.question is None and member.ended is None:
                    member.question, member.asked = member.actor.poll.remote(ANSWER_SECONDS), time.monotonic()
        found, self._told = self._told, []
        questions = {member.question: (slot, member) for slot, member in self._members() if member.question is not None}
        if not questions:
            time.sleep(wait)
            return found
        ready, _ = self._ray.wait(list(questions), num_returns=1, timeout=0 if found else wait)
        if ready:
            ready, _ = self._ray.wait(list(questions), num_returns=len(questions), timeout=0)
        for question in ready:
            found += self._take(*questions[question], question)
        for slot, member in list(self._members()):
            found += self._overdue(slot, member)
        return found + self._width_said()

    def request_stop(self, run: str | None = None) -> None:
        for slot, member in self._members():
            if slot.state == "busy" and run in (None, slot.run):
                member.actor.request_stop.remote()

    def resize(self, workers: Workers) -> None:
        self._wanted = workers
        self._resize()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for slot in self._slots:
            self._end(slot)
        self._ray.shutdown()

    # --- answers ------------------------------------------------------------------------------------------------------------

    def _members(self) -> Iterator[tuple[Slot, Member]]:
        return ((slot, member) for slot in self._slots for member in slot.members)

    def _take(self, slot: Slot, member: Member, question: Any) -> list[Event]:
        """An answer has come."""
        if slot not in self._slots or member.question is not question:
            return []  # an earlier answer of this turn has ended the slot
        member.question = None
        try:
            answer = self._ray.get(question)
        except self._ray.exceptions.RayError as error:
            if slot.state == "lost":
                return self._buried(slot, member, None)
            return self._lose(slot, self._named(error, slot))
        if slot.state == "lost":
            return self._buried(slot, member, answer)
        if slot.state == "starting":
            member.place = answer
            if all(m.place is not None for m in slot.members):
                slot.state, self._ever_started = "idle", True
            return []
        return self._progress(slot, member, answer)

    def _progress(self, slot: Slot, member: Member, answer: Answer) -> list[Event]:
        assert slot.run is not None
        member.moving |= bool(answer.records)
        if answer.failure is not None or answer.summary is not None:
            member.ended = answer
        elif answer.idle > self._patience(slot, member, LONGER * answer.longest) + (answer.longest if len(slot.members) > 1 else 0.0):
            return self._lose(slot, Failure(kind=schema.HANG, text=f"no progress for {answer.idle:.0f} s; {who(slot, member)} was replaced"))
        run, first = slot.run, member is slot.members[0]
        found = [event for event in events(run, answer) if first and event.kind not in ("done", "failed")]
        failed = next((m.ended.failure for m in slot.members if m.ended is not None and m.ended.failure is not None), None)
        if failed is not None and len(slot.members) > 1:
            # The others of its group wait for it for ever, and a process whose collective failed is not to be trusted with another.
            return found + self._lose(slot, failed)
        if any(m.ended is None for m in slot.members):
            return found
        summary = slot.members[0].ended.summary if slot.members[0].ended is not None else None
        slot.run, slot.state = None, "idle"
        if slot.leaving:
            self._drop(slot)
        if failed is not None:
            return [*found, Event(run=run, kind="failed", failure=failed)]
        return [*found, Event(run=run, kind="done", summary=summary)]

    def _patience(self, slot: Slot, member: Member, shown: float = 0.0) -> float:
        """Seconds without progress; a job that only begins imports libraries and makes its data."""
        own = self._resources.hang_seconds + (GROUP_SECONDS if len(slot.members) > 1 else 0.0)
        return max(own, shown, 0.0 if member.moving else START_SECONDS)

    def _overdue(self, slot: Slot, member: Member) -> list[Event]:
        """A question that was not answered in time."""
        if member.question is None or slot not in self._slots:
            return []
        waited = time.monotonic() - member.asked
        if slot.state == "lost" and waited > BURY_SECONDS:
            member.question = None
            return self._buried(slot, member, None)
        if slot.state == "busy" and waited > min(POLL_SECONDS, self._patience(slot, member)) + ANSWER_SECONDS:
            return self._lose(slot, Failure(kind=schema.HANG, text=f"{who(slot, member)} has not answered for {waited:.0f} s; it was replaced"))
        return []

    # --- losses -------------------------------------------------------------------------------------------------------------

    def _named(self, error: BaseException, slot: Slot) -> Failure:
        """What became of a worker, as far as Ray says it."""
        text = _first_lines(error)
        if isinstance(error, self._ray.exceptions.OutOfMemoryError) or "low on memory" in text:
            return Failure(kind=schema.OUT_OF_MEMORY, text=f"out of memory on the host: {text}")
        if re.search(r"\bnode (has )?died|[Nn]ode was (terminated|removed|drained)", text) or not self._all_nodes_live(slot):
            return Failure(kind=schema.NODE, text=text)
        return Failure(kind=schema.DIED, text=text)

    def _all_nodes_live(self, slot: Slot) -> bool:
        live = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        return all(member.place is None or member.place.node in live for member in slot.members)

    def _lose(self, slot: Slot, failure: Failure) -> list[Event]:
        """End what is left of a slot, and see on its nodes what became of it: a process that is stuck holds its run's lock."""
        started = slot.state != "starting"
        slot.state, slot.failure = "lost", failure
        for member in slot.members:
            self._ray.kill(member.actor)
            member.question = None
            if member.place is not None and failure.kind != schema.NODE:
                member.question, member.asked = self._bury(member.place), time.monotonic()
        if not started:
            self._bad_start(failure)
        return self._buried(slot, slot.members[0], None) if all(m.question is None for m in slot.members) else []

    def _bury(self, place: Place) -> Any:
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(place.node, soft=False)
        return self._ray.remote(bury).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(place.pid)

    def _buried(self, slot: Slot, member: Member, killed: int | None) -> list[Event]:
        """One of a lost slot's nodes has said how many processes its kernel killed, or has not answered: None."""
        failure = slot.failure
        assert failure is not None
        if killed is None and failure.kind in (schema.DIED, schema.HANG) and not self._all_nodes_live(slot):
            failure = Failure(kind=schema.NODE, text=failure.text)
        if killed is not None and failure.kind == schema.DIED and member.place is not None and killed > member.place.killed:
            failure = Failure(kind=schema.OUT_OF_MEMORY, text=f"killed by the kernel of {member.place.host} for want of memory: {failure.text}")
        slot.failure = failure
        if any(m.question is not None for m in slot.members):
            return []
        run = slot.run
        self._drop(slot)
        self._resize()
        return [Event(run=run, kind="failed", failure=failure)] if run is not None else []

    def _bad_start(self, failure: Failure) -> None:
        """Workers that cannot even start are not replaced for ever."""
        if failure.kind == schema.NODE:
            return
        self._bad_starts += 1
        if self._bad_starts >= BAD_STARTS and not self._ever_started:
            raise ConfigError(f"resources: no worker can be started on the cluster: {failure.text}")

    # --- how many -----------------------------------------------------------------------------------------------------------

    def _fits(self) -> int:
        """Slots that the living nodes have room for.  A fraction of a GPU is of one GPU."""
        cpus, gpus, fits = self._resources.cpus_per_worker, self._gpus, 0
        for node in self._ray.nodes():
            if node["Alive"]:
                there = node["Resources"]
                here = int(there.get("CPU", 0)) // cpus
                if gpus:
                    whole = int(there.get("GPU", 0))
                    here = min(here, int(1 / gpus + 1e-9) * whole if gpus < 1 else int(whole // gpus))
                fits += here
        return fits // self._resources.workers_per_trial

    def _refuse_too_many(self) -> None:
        fits, wanted = self._fits(), self._resources.workers
        if fits < 1 or (wanted != "auto" and min(wanted, self._runs) > fits):
            total = self._ray.cluster_resources()
            each = self._resources.workers_per_trial
            raise ConfigError(
                f"resources: {wanted} workers {f'({each} per trial) ' if each > 1 else ''}of {self._resources.cpus_per_worker} CPUs and "
                f"{self._gpus:g} GPUs do not fit on {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs; room for {fits}"
            )

    def _resize(self) -> None:
        """As many slots as are wanted and fit; one too many goes when its run has written a checkpoint."""
        self._resized = time.monotonic()
        fits = self._fits()
        wanted = self._runs if self._wanted == "auto" else min(self._wanted, self._runs)
        staying = [slot for slot in self._slots if not slot.leaving and slot.state != "lost"]
        for slot in [slot for slot in staying if slot.state == "starting"][: max(len(staying) - min(wanted, fits), 0)]:
            self._drop(slot)
            staying.remove(slot)
        # Idle ones first.  Those of a dead node go by themselves.
        for slot in sorted(staying, key=lambda slot: slot.state == "busy")[: max(len(staying) - wanted, 0)]:
            staying.remove(slot)
            if slot.state == "busy":
                slot.leaving = True
                self.request_stop(slot.run)
            else:
                self._drop(slot)
        while len(staying) < min(wanted, fits):
            slot = self._new_slot()
            staying.append(slot)
            self._slots.append(slot)

    def _width_said(self) -> list[Event]:
        """Workers that came or went, and once those that do not start."""
        found, width = [], sum(not slot.leaving for slot in self._slots)
        if width != self._width:
            why = "" if width else ": no node has room for one"
            found.append(Event(run="", kind="workers", text=f"{width} workers now, {self._width} before{why}"))
            self._width = width
        late = sum(slot.state == "starting" and time.monotonic() - slot.members[0].asked > START_SECONDS for slot in self._slots)
        if late and not self._late:
            text = f"{late} of {width} workers have not started for {START_SECONDS:.0f} s: is the cluster used by others?"
            found.append(Event(run="", kind="workers", text=text))
        self._late = late
        return found

    def _new_slot(self) -> Slot:
        each = self._resources.workers_per_trial
        placement = None
        if each > 1:
            bundle = {"CPU": float(self._resources.cpus_per_worker), **({"GPU": self._gpus} if self._gpus else {})}
            placement = self._ray.util.placement_group([bundle] * each, strategy="PACK")
        actors = [self._actor(placement, index) for index in range(each)]
        now = time.monotonic()
        return Slot(members=[Member(actor=actor, question=actor.place.remote(), asked=now) for actor in actors], placement=placement)

    def _actor(self, placement: Any, index: int) -> Any:
        cpus = self._resources.cpus_per_worker
        variables = {"OMP_NUM_THREADS": str(cpus), "TOKENIZERS_PARALLELISM": "false"}
        variables |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        if self._resources.gpus == "none":
            variables["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from a worker that asks for none
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": self._gpus, "max_restarts": 0, "runtime_env": {"env_vars": variables}}
        if placement is not None:
            strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
            options["scheduling_strategy"] = strategy(placement_group=placement, placement_group_bundle_index=index)
        return self._ray.remote(Worker).options(**options).remote(0 if self._gpus else cpus, os.getcwd())

    def _drop(self, slot: Slot) -> None:
        self._end(slot)
        self._slots.remove(slot)

    def _end(self, slot: Slot) -> None:
        for member in slot.members:
            self._ray.kill(member.actor)
        if slot.placement is not None:
            self._ray.util.remove_placement_group(slot.placement)

    def _await_workers(self) -> None:
        """Ray waits for ever for resources that never come; a person should not.  One worker is enough to begin with."""
        asked = self._resources.workers_per_trial * self._resources.cpus_per_worker
        # Workers that share cores also start one after the other.
        seconds = START_SECONDS * max(1.0, asked / (os.cpu_count() or 1) if self._local else 1.0)
        deadline = time.monotonic() + seconds
        while not self._ever_started and time.monotonic() < deadline:
            self._told += self.poll(0.2)
        if not self._ever_started:
            free, total = self._ray.available_resources(), self._ray.cluster_resources()
            held = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
            count = self.workers
            self.close()
            raise ConfigError(f"resources: none of {count} workers started within {seconds:.0f} s; free: {held}; is another job running?")


def _first_lines(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return " ".join(text.split())[:500]
