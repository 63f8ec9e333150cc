"""The driver owns a study: it alone asks Optuna, starts runs, writes the root and MLflow.

`run` and `resume` are one path.  Whatever the root says is finished stays finished; what was running
goes on from its checkpoint under its number.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from research import config as run_config
from research.atomic import NO_ROOM, write_text
from research.configfile import load_run_config
from research.data.prepare import prepare
from research.errors import ConfigError, DiskFull, UserError
from sweeps import retune, schema
from sweeps.book import RUNNING, Book, OpenRun, read_json
from sweeps.control import asked_workers
from sweeps.executors import Event, Executor
from sweeps.failures import Failure
from sweeps.identity import commit, refuse_another_study
from sweeps.lease import lease
from sweeps.outbox import Outbox
from sweeps.search import Search
from sweeps.study import Study
from sweeps.tracking import Tracker, tracking_uri
from sweeps.trial import Job, accepts, failed_summary, pruned_summary, write_summary
from sweeps.trials import Trials

TURN_SECONDS = 0.5
STATE_SECONDS = 2.0
SYNC_SECONDS = 20.0
ALIKE_FAILURES = 3


class Driver:
    """One study on one executor; `run()` returns the state it ended in."""

    def __init__(
        self,
        study: Study,
        root: Path,
        executor: Callable[[Study, int], Executor],
        announce: Callable[[str], None],
        function: str = "sweeps.trial:run_trial",
    ) -> None:
        self.study, self.root, self.announce, self.function = study, root, announce, function
        self.make_executor = executor
        self.commit = commit()
        self.stopping = False
        self.halt: str | None = None
        self._alike: list[Failure] = []
        self._wrote = self._synced = 0.0

    def run(self) -> str:
        """Until everything is done, or until a signal asks to stop.  StudyBusyError, ConfigError, DataError, DiskFull, UserError."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be a study's directory ({error.strerror}); give another --root or MOELAB_HOME") from error
        with lease(self.root):
            refuse_another_study(self.study, self.root)
            self._refuse_groups()
            (self.root / schema.CONTROL_FILE).unlink(missing_ok=True)
            previous = self._take_signals()
            try:
                return self._drive()
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                raise DiskFull(f"{self.root}: {os.strerror(error.errno)}; make room and run the study again: it goes on") from error
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def _refuse_groups(self) -> None:
        each = self.study.resources.workers_per_trial
        if each > 1 and not accepts(self.function, "group"):
            raise ConfigError(
                f"resources.workers_per_trial = {each}: {self.function} trains a run in one worker (it has no parameter `group`); must be 1 for it"
            )

    def _drive(self) -> str:
        # The text comes first: whatever is wrong with it, the root does not keep a study that never ran.
        prepared = not (self.root / schema.DATA_FILE).exists()
        if prepared:
            self._prepare()
        write_text(self.root / schema.STUDY_FILE, yaml.safe_dump(run_config.to_dict(self.study), sort_keys=False, allow_unicode=True))
        self.search = Search(self.study, self.root)
        self.book = Book(self.root, self.search.total * self.study.runs_per_trial, {"study": self.study.name, "commit": self.commit})
        self.outbox = Outbox(Tracker(self.study, self.root, self.commit), self.book, self.announce)
        self.trials = Trials(self.study, self.root, self.search, self.book, self.commit, self.announce)
        self.trials.open_again()
        if not self.trials.left:
            self.announce("every run has ended already")
            return self._end()
        if not prepared:
            self._prepare()
        self._write_state("running")
        self.outbox.open()  # while Ray starts, which is mostly waiting
        try:
            executor = self.make_executor(self.study, self.book.planned)
        except SystemExit:
            # Ray's own handler of SIGTERM, which is in place while it starts.
            self.stopping = True
            return self._end()
        self._take_signals()
        try:
            return self._loop(executor)
        finally:
            executor.close()

    def _prepare(self) -> None:
        """The text that all runs share, made before any worker needs it, and what it is written down."""
        config = self.study.run_config(self.study.baseline, self.study.seeds[0]).data
        data = prepare(config, self.announce)
        about = {"schema": schema.SCHEMA_VERSION, "data_id": data.data_id, "corpus": config.corpus}
        about |= {key: data.manifest[key] for key in ("vocab_size", "domains", "identity", "split")}
        write_text(self.root / schema.DATA_FILE, json.dumps(about, indent=1, ensure_ascii=False))

    def _loop(self, executor: Executor) -> str:
        self.book.workers = executor.workers
        self.announce(f"{self.search.total} variants x {len(self.study.seeds)} seeds on {executor.workers} workers; root {self.root}")
        told_to_stop = False
        while True:
            turn = time.monotonic() + TURN_SECONDS
            while not self.stopping and executor.free() and time.monotonic() < turn and (run := self.trials.next()):
                executor.start(self._job(run))
            more = not self.stopping and executor.free() and self.trials.queue
            for event in executor.poll(0.0 if more else TURN_SECONDS):
                self._take(event)
            if not self.stopping:
                self.trials.prune(executor)
            if self.stopping and not told_to_stop:
                executor.request_stop()
                told_to_stop = True
                self.announce("stopping: every run writes a checkpoint first")
            self._now_and_then(executor)
            if not self.book.running and (self.stopping or not (self.trials.queue or self.trials.paused or self.trials.fill())):
                break
        return self._end(executor)

    def _now_and_then(self, executor: Executor) -> None:
        """What is due by the clock: the state, MLflow, another number of workers."""
        now = time.monotonic()
        if now - self._wrote > STATE_SECONDS:
            self.book.workers = executor.workers
            self._write_state("running")
            if (workers := asked_workers(self.root)) is not None:
                executor.resize(workers)
            self._wrote = now
        if now - self._synced > SYNC_SECONDS:
            self.outbox.send()
            self._synced = now

    def _job(self, run: str) -> Job:
        now = self.book.open[run]
        config = read_json(now.directory / schema.CONFIG_FILE)
        attempt = now.attempts.begin()
        now.state, now.reason, now.failure = RUNNING, None, None
        # How an earlier attempt ended is not how this one does.
        (now.directory / schema.SUMMARY_FILE).unlink(missing_ok=True)
        spec = None
        if config["model"]["moe"] is not None and now.about.get("role") != retune.ROLE:
            spec = run_config.to_dict(self.study.all_to_all(load_run_config(config, str(now.directory / schema.CONFIG_FILE))))
        again = f", attempt {attempt}" if attempt > 1 else ""
        self.announce(f"{run} starts: {now.about['variant']}, seed {now.about['seed']}{again}")
        return Job(
            run=run,
            directory=str(now.directory),
            config=config,
            all_to_all=spec,
            attempt=attempt,
            threads=self.study.resources.cpus_per_worker,
            function=self.function,
            micro_batch_size=now.attempts.last["micro_batch_size"],
        )

    # --- what happened --------------------------------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        if event.kind == "workers":
            self.announce(event.text)
            return
        run = self.book.open[event.run]
        if event.kind == "started" and event.place is not None:
            run.attempts.last.update(node=event.place.host, pid=event.place.pid)
        elif event.kind == "record" and event.record is not None:
            run.attempts.last["step"] = int(event.record["step"])
        elif event.kind == "said":
            self.announce(f"{event.run} {event.text}")
        elif event.kind == "failed" and event.failure is not None:
            self._failed(event.run, run, event.failure)
        elif event.kind == "done" and event.summary is not None:
            failure = Failure(kind=schema.DIVERGED, text=str(event.summary["reason"])) if event.summary["state"] == schema.DIVERGED else None
            run.attempts.last["step"] = event.summary["steps"]
            summary = event.summary
            if event.run in self.trials.pruned and summary["state"] in (schema.STOPPED, schema.PRUNED):
                summary = {**summary, "state": schema.PRUNED, "reason": self.trials.pruned[event.run]}
                write_summary(run.directory, summary)
            run.attempts.end(summary["state"], failure)
            if summary["state"] == schema.STOPPED and not self.stopping:
                self._put_back(event.run, "its worker was taken away; goes on from its checkpoint")
                return
            self._ended(event.run, summary)

    def _failed(self, name: str, run: OpenRun, failure: Failure) -> None:
        """An attempt is over without a summary: another follows, or the run is given up."""
        self.book.lost[failure.kind] += 1
        verdict = run.attempts.fail(failure, self.function)
        if name in self.trials.pruned:
            # It was to end anyway.
            summary = pruned_summary(self.trials.pruned[name], len(run.attempts.all), run.directory)
            write_summary(run.directory, summary)
            self._ended(name, summary)
            return
        if verdict.again:
            self._put_back(name, f"{failure.kind} ({failure.line}); {verdict.said}", verdict.pause)
            return
        text = f"{failure.text}\n{verdict.said}" if verdict.said else failure.text
        summary = failed_summary(text, len(run.attempts.all), failure.kind)
        write_summary(run.directory, summary)
        self._alike.append(failure)
        self._ended(name, summary)

    def _put_back(self, name: str, why: str, pause: float = 0.0) -> None:
        self.announce(f"{name} {why}")
        self.trials.put_back(name, pause)

    def _ended(self, name: str, summary: dict[str, Any]) -> None:
        self.book.end(name, summary)
        metric = self.study.objectives[0].metric
        value = summary["metrics"].get(metric)
        shown = f", {metric} {value:.4g}" if value is not None and summary["state"] == schema.FINISHED else ""
        reason = f": {str(summary['reason']).strip().splitlines()[-1]}" if summary["reason"] else ""
        self.announce(f"{name} {summary['state']}{shown}{reason}  ({self.book.done} of {self.book.planned} runs)")
        self._halt_if_all_fail()
        if summary["state"] != schema.STOPPED:
            self.trials.ended(name)

    def _halt_if_all_fail(self) -> None:
        """When the first runs all fail alike it is the study that is wrong."""
        if self.halt or self.book.learnt or len(self._alike) < min(ALIKE_FAILURES, self.book.planned):
            return
        # A bug shows in its last line; of what is lost no two texts are the same.
        kinds = {(failure.kind, failure.line if failure.kind == schema.BUG else "") for failure in self._alike}
        if len(kinds) == 1:
            first = self._alike[0]
            self.halt = f"the first {len(self._alike)} runs failed alike: {first.line}"
            self.announce(f"the failure in full:\n{first.text.strip()}")
            self.trials.close()

    # --- what is told of it ---------------------------------------------------------------------------------------------------

    def _end(self, executor: Executor | None = None) -> str:
        if not self.halt and not self.stopping:
            self.trials.tell_rest()
        if self.halt:
            state = "finished-with-failures"
            self.announce(f"stopped early: {self.halt}; mend it and run the study again: these runs are tried anew")
        elif self.stopping and self.book.done < self.book.planned:
            state = schema.STOPPED
        else:
            state = "finished-with-failures" if self.book.failures.total() else "finished"
        # First of all: `ray job stop` kills three seconds after it asks, and a tracker may take longer to answer.
        self._write_state(state)
        with ThreadPoolExecutor(1) as beside:
            finishing = beside.submit(self.outbox.finish, state)
            if executor is not None:
                executor.close()  # a second or two of waiting for Ray's processes
            finishing.result()
        self._write_state(state)
        return state

    def _write_state(self, state: str) -> None:
        try:
            self.book.write_state(state, {"mlflow_tracking_uri": tracking_uri(), "mlflow_behind": self.outbox.behind})
        except OSError as error:
            # What the state says stands in the runs too; a full disk is said by whatever needs the room.
            if error.errno not in NO_ROOM:
                raise
            self.announce(f"{self.root / schema.STATE_FILE}: {os.strerror(error.errno)}")

    def _take_signals(self) -> dict[int, Any]:
        """After Ray's start, which installs its own."""

        def stop(number: int, frame: Any) -> None:
            self.stopping = True

        return {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
