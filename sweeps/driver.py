"""The driver owns a study: it alone asks Optuna, starts runs, writes the root and MLflow.

`run` and `resume` are one path.  Whatever the root says is finished stays finished; what was running
goes on from its checkpoint under its number.
"""

import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import Trial

from research import config as run_config
from research.atomic import write_text
from research.data.prepare import prepare
from research.errors import ConfigError
from sweeps import retune, schema
from sweeps.budget import matched_about
from sweeps.executors import Event, Executor
from sweeps.lease import lease
from sweeps.search import PRUNED_REASON, Search
from sweeps.study import Study, label
from sweeps.tracking import Tracker, tracking_uri
from sweeps.trial import Job, failed_summary, pruned_summary, write_summary

ATTEMPTS_FILE = "attempts.json"
MAX_ATTEMPTS = 3
"""Workers that a run may lose.  A start after a stop or after the driver's own death is not charged."""
TURN_SECONDS = 0.2
STATE_SECONDS = 2.0
SYNC_SECONDS = 5.0
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
        self.runs: dict[str, dict[str, Any]] = {}
        self.states: dict[str, dict[str, Any]] = {}
        self.trials: dict[int, Trial] = {}
        self.queue: list[str] = []
        self.pruned: dict[str, str] = {}
        self.tried: set[str] = set()
        self.stopping = False
        self.halt: str | None = None
        self._sending: threading.Thread | None = None
        self._was_behind: str | None = None
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    def run(self) -> str:
        """Until everything is done, or until a signal asks to stop.  StudyBusyError, ConfigError, DataError."""
        self.root.mkdir(parents=True, exist_ok=True)
        with lease(self.root):
            self._refuse_another_study()
            previous = self._take_signals()
            try:
                return self._drive()
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def _drive(self) -> str:
        # The text comes first: whatever is wrong with it, the root does not keep a study that never ran.
        prepared = not (self.root / schema.DATA_FILE).exists()
        if prepared:
            self._prepare()
        write_text(self.root / schema.STUDY_FILE, yaml.safe_dump(run_config.to_dict(self.study), sort_keys=False, allow_unicode=True))
        self.search = Search(self.study, self.root)
        self.tracker = Tracker(self.study, self.root, self.commit)
        if not (self.search.left or self.queue):
            self.announce("every run has ended already")
            return self._end()
        if not prepared:
            self._prepare()
        self._write_state("running")
        try:
            executor = self.make_executor(self.study, self.search.total * self.study.runs_per_trial)
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
        self.announce(f"{self.search.total} variants x {len(self.study.seeds)} seeds on {executor.workers} workers; root {self.root}")
        told_to_stop = False
        wrote = synced = 0.0
        while True:
            while not self.stopping and executor.free() and (run := self._next()):
                executor.start(self._job(run))
            for event in executor.poll():
                self._take(event)
            self._prune(executor)
            if self.stopping and not told_to_stop:
                executor.request_stop()
                told_to_stop = True
                self.announce("stopping: every run writes a checkpoint first")
            now = time.monotonic()
            if now - wrote > STATE_SECONDS:
                self._write_state("running")
                wrote = now
            if now - synced > SYNC_SECONDS:
                self._sync()
                synced = now
            running = any(s["state"] == "running" for s in self.states.values())
            if not running and (self.stopping or not (self.queue or self._fill())):
                break
            time.sleep(TURN_SECONDS)
        return self._end()

    def _next(self) -> str | None:
        """A run to start: of the trials asked for already, or of a newly asked one."""
        if not self.queue:
            self._fill()
        return self.queue.pop(0) if self.queue else None

    def _fill(self) -> bool:
        """Ask for trials until one has a run to do; trials that the root already finished are told at once."""
        while not self.queue:
            if self.halt or (trial := self.search.ask()) is None:
                return False
            if reason := self.search.rejects(trial):
                self.announce(f"trial {trial.number} is not trained: {reason}")
                continue
            self.trials[trial.number] = trial
            self._plan_trial(trial.number)
            if reason := trial.user_attrs.get(PRUNED_REASON):
                self._give_up(trial.number, reason, None)
            self._tell_if_done(trial.number)
        return True

    def _plan_trial(self, number: int) -> None:
        """The runs of a trial: those that re-tune its learning rate, if asked for, and when they have ended its replicates."""
        trial, tuning = self.trials[number], self.study.retune
        cell = self.search.cell(trial)
        config, matched = self.study.matched_config(cell, self.study.seeds[0])
        about: dict[str, Any] = {"role": "replicate", **matched_about(matched)}
        if tuning is not None:
            chosen = trial.user_attrs.get(retune.ROLE) or self._retuned(number, cell, config, tuning)
            if chosen is None:
                return
            trial.set_user_attr(retune.ROLE, chosen)
            about[retune.ROLE] = chosen
            config = retune.with_rate(config, chosen["learning_rate"])
        for seed in self.study.seeds:
            self._plan_run(f"{number:03d}-{seed}", number, cell, replace(config, seed=seed), about)

    def _retuned(self, number: int, cell: dict[str, Any], config: run_config.RunConfig, tuning: retune.Retune) -> dict[str, Any] | None:
        """The learning rate that the short runs of a trial say, or None as long as they have not all ended."""
        own = config.training.optimizer.learning_rate
        config = replace(config, seed=self.study.seeds[0] if tuning.seed is None else tuning.seed)
        rates = tuning.rates(own)
        runs = [f"{number:03d}-lr{i}" for i in range(len(rates))]
        for run, rate in zip(runs, rates, strict=True):
            if run not in self.tried:
                self.tried.add(run)
                self._plan_run(run, number, cell, retune.short_config(config, tuning, rate), {"role": retune.ROLE})
        if any(self.states[run]["state"] not in schema.STATES or self.states[run]["state"] == schema.STOPPED for run in runs):
            return None
        chosen = retune.choose(rates, [_json(self.root / schema.RUNS_DIRECTORY / run / schema.SUMMARY_FILE) for run in runs], own)
        edge = ", at the edge of what was tried" if chosen["edge"] else ""
        self.announce(f"trial {number}: learning rate {chosen['learning_rate']:g} ({chosen['chosen_by']}{edge})")
        return chosen

    def _replicates(self, number: int) -> list[str]:
        return [run for run, about in self.runs.items() if about["trial"] == number and about.get("role") != retune.ROLE]

    def _prune(self, executor: Executor) -> None:
        """Give up the trials that the study's pruner has had enough of."""
        if self.study.pruner.kind == "none":
            return
        for number, trial in list(self.trials.items()):
            ended = [run for run in self._replicates(number) if self.states[run]["state"] in schema.STATES]
            summaries = {self.runs[run]["seed"]: _json(self.root / schema.RUNS_DIRECTORY / run / schema.SUMMARY_FILE) for run in ended}
            if reason := self.search.should_prune(trial, summaries):
                self._give_up(number, reason, executor)

    def _give_up(self, number: int, reason: str, executor: Executor | None) -> None:
        """End the runs of a pruned trial and start no more of them."""
        for run in self._replicates(number):
            state, directory = self.states[run], self.root / schema.RUNS_DIRECTORY / run
            if state["state"] == "running" and run not in self.pruned and executor is not None:
                self.announce(f"{run} {reason}")
                self.pruned[run] = reason
                executor.request_prune(run)
            elif state["state"] == "waiting":
                write_summary(directory, pruned_summary(reason, state["attempts"], directory))
                state |= {"state": schema.PRUNED, "reason": reason}
                self.queue.remove(run)
        self._tell_if_done(number)

    def _plan_run(self, run: str, number: int, cell: dict[str, Any], config: run_config.RunConfig, more: dict[str, Any]) -> None:
        directory = self.root / schema.RUNS_DIRECTORY / run
        about = {
            "schema": schema.SCHEMA_VERSION,
            "run": run,
            "study": self.study.name,
            "trial": number,
            "variant": label(cell, self.study.baseline),
            "seed": config.seed,
            "baseline": cell == {path: self.study.baseline[path] for path in cell},
            "parameters": cell,
            "config_id": run_config.config_id(config),
            "commit": self.commit,
            **more,
        }
        summary = _json(directory / schema.SUMMARY_FILE)
        if not (directory / schema.RUN_FILE).exists():
            write_text(directory / schema.CONFIG_FILE, json.dumps(run_config.to_dict(config), indent=1))
            write_text(directory / schema.RUN_FILE, json.dumps(about, indent=1))
        self.runs[run] = about
        counted = _json(directory / ATTEMPTS_FILE)
        self.states[run] = {"state": "waiting", "attempts": counted.get("attempts", 0), "deaths": counted.get("deaths", 0), "reason": None}
        # A trial that was not told yet is not done: what failed in it gets another chance (a bug may have been mended meanwhile).
        if summary and summary["state"] not in (schema.STOPPED, schema.FAILED):
            self.states[run] = {"state": summary["state"], "attempts": summary["attempts"], "reason": summary["reason"]}
        else:
            self.queue.append(run)

    def _job(self, run: str) -> Job:
        directory = self.root / schema.RUNS_DIRECTORY / run
        state, config = self.states[run], _json(directory / schema.CONFIG_FILE)
        state |= {"state": "running", "attempts": state["attempts"] + 1, "reason": None}
        _count(directory, state)
        # How an earlier attempt ended is not how this one does.
        (directory / schema.SUMMARY_FILE).unlink(missing_ok=True)
        spec = None
        if config["model"]["moe"] is not None and self.runs[run].get("role") != retune.ROLE:
            whole = self.study.run_config(self.runs[run]["parameters"], self.runs[run]["seed"])
            spec = run_config.to_dict(self.study.all_to_all(whole))
        self.announce(f"{run} starts: {self.runs[run]['variant']}, seed {self.runs[run]['seed']}")
        return Job(
            run=run,
            directory=str(directory),
            config=config,
            all_to_all=spec,
            attempt=state["attempts"],
            threads=self.study.resources.cpus_per_worker,
            function=self.function,
        )

    def _take(self, event: Event) -> None:
        state, directory = self.states[event.run], self.root / schema.RUNS_DIRECTORY / event.run
        if event.kind == "said":
            self.announce(f"{event.run} {event.text}")
            return
        if event.kind == "died" and self.stopping:
            state["state"] = "waiting"
            return
        if event.kind == "died" and event.run in self.pruned:
            summary = pruned_summary(self.pruned[event.run], state["attempts"], directory)
            event = Event(run=event.run, kind="done", summary=summary)
        if event.kind == "died":
            state["deaths"] += 1
            _count(directory, state)
        if event.kind == "died" and state["deaths"] < MAX_ATTEMPTS:
            self.announce(f"{event.run} worker died ({event.text}); attempt {state['attempts'] + 1} goes on from the last checkpoint")
            state["state"] = "waiting"
            self.queue.insert(0, event.run)
            return
        if event.kind in ("died", "error"):
            summary = failed_summary(event.text, state["attempts"])
            write_summary(directory, summary)
        else:
            assert event.summary is not None
            summary = event.summary
            if event.run in self.pruned and summary["state"] in (schema.STOPPED, schema.PRUNED):
                summary |= {"state": schema.PRUNED, "reason": self.pruned[event.run]}
                write_summary(directory, summary)
        state |= {"state": summary["state"], "reason": summary["reason"]}
        value = summary["metrics"].get(self.study.objectives[0].metric)
        shown = f", {self.study.objectives[0].metric} {value:.4g}" if value is not None and summary["state"] == schema.FINISHED else ""
        reason = f": {str(summary['reason']).strip().splitlines()[-1]}" if summary["reason"] else ""
        self.announce(f"{event.run} {summary['state']}{shown}{reason}  ({self._done()} of {self.search.total * self.study.runs_per_trial} runs)")
        if summary["state"] != schema.STOPPED:
            if self.runs[event.run].get("role") == retune.ROLE and self.runs[event.run]["trial"] in self.trials:
                self._plan_trial(self.runs[event.run]["trial"])
            self._tell_if_done(self.runs[event.run]["trial"])
        self._halt_if_all_fail()

    def _tell_if_done(self, number: int) -> None:
        """Tell Optuna of a trial whose runs have all ended.

        As long as nothing has finished, failures are kept back: should the study be halted for a bug,
        its trials are still open and are trained when it is run again.
        """
        runs = self._replicates(number)
        ended = [self.states[run]["state"] for run in runs]
        if number not in self.trials or len(runs) < len(self.study.seeds) or any(s not in schema.STATES or s == schema.STOPPED for s in ended):
            return
        if schema.FAILED in ended and not any(s["state"] in (schema.FINISHED, schema.DIVERGED) for s in self.states.values()):
            return
        self._tell(number)

    def _tell(self, number: int) -> None:
        runs = self._replicates(number)
        self.search.tell(self.trials.pop(number), [_json(self.root / schema.RUNS_DIRECTORY / run / schema.SUMMARY_FILE) for run in runs])

    def _halt_if_all_fail(self) -> None:
        """When the first runs all fail with the same last line it is the study that is wrong."""
        ended = [s for s in self.states.values() if s["state"] in schema.STATES]
        last = {str(s["reason"]).strip().splitlines()[-1] for s in ended if s["state"] == schema.FAILED}
        if len(ended) >= ALIKE_FAILURES and all(s["state"] == schema.FAILED for s in ended) and len(last) == 1:
            self.halt = f"the first {len(ended)} runs failed alike: {last.pop()}"
            self.queue.clear()

    def _done(self) -> int:
        return sum(s["state"] in schema.STATES and s["state"] != schema.STOPPED for s in self.states.values())

    def _sync(self, *, final: bool = False) -> None:
        """Send what is new to MLflow, beside the loop: a server that is away blocks its client for seconds, never a run."""
        if self._sending is not None and (final or not self._sending.is_alive()):
            self._sending.join()
            self._sending = None
        if final:
            self.tracker.sync(self.runs, final=True)
        elif self._sending is None:
            self._sending = threading.Thread(target=self.tracker.sync, args=(dict(self.runs),), daemon=True, name="mlflow")
            self._sending.start()
        behind = self.tracker.behind
        if behind and not self._was_behind:
            self.announce(f"MLflow cannot be reached ({behind}); training goes on, what is missing is sent later")
        elif self._was_behind and not behind:
            self.announce("MLflow is back; everything has been sent")
        self._was_behind = behind

    def _end(self) -> str:
        tried = {run for run, about in self.runs.items() if about.get("role") == retune.ROLE}
        failed = [run for run, s in self.states.items() if s["state"] in (schema.FAILED, schema.DIVERGED) and run not in tried]
        planned = self.search.total * self.study.runs_per_trial
        if not self.halt and not self.stopping:
            for number in sorted(self.trials):
                self._tell(number)
        if self.halt:
            state = "finished-with-failures"
            self.announce(f"stopped early: {self.halt}; mend it and run the study again: these runs are tried anew")
        elif self.stopping and self._done() < planned:
            state = schema.STOPPED
        else:
            state = "finished-with-failures" if failed else "finished"
        # Ended runs are few; the last turn must not be skipped because an earlier one failed.
        self._known_runs()
        self._sync(final=True)
        self.tracker.finish(state, self._note(state))
        self._write_state(state)
        return state

    def _known_runs(self) -> None:
        """Runs of an earlier driver that this one did not have to touch."""
        for path in sorted((self.root / schema.RUNS_DIRECTORY).glob(f"*/{schema.RUN_FILE}")):
            summary = _json(path.with_name(schema.SUMMARY_FILE))
            if path.parent.name not in self.runs and summary:
                self.runs[path.parent.name] = _json(path)
                self.states[path.parent.name] = {"state": summary["state"], "attempts": summary["attempts"], "reason": summary["reason"]}

    def _note(self, state: str) -> str:
        metric = self.study.objectives[0].metric
        table: dict[str, list[float]] = {}
        for run, about in self.runs.items():
            if about.get("role") == retune.ROLE:
                continue
            value = _json(self.root / schema.RUNS_DIRECTORY / run / schema.SUMMARY_FILE).get("metrics", {}).get(metric)
            if value is not None:
                table.setdefault(about["variant"], []).append(value)
        rows = [
            f"| {variant} | {sum(v) / len(v):.4f} | {len(v)} |" for variant, v in sorted(table.items(), key=lambda item: sum(item[1]) / len(item[1]))
        ]
        return "\n".join([f"# {self.study.question}", "", f"State: {state}.", "", f"| variant | mean {metric} | seeds |", "|---|---|---|", *rows])

    def _refuse_another_study(self) -> None:
        """Refuse a study that differs from the one in the root in more than its means; a root in which nothing ran binds nobody."""
        path, now = self.root / schema.STUDY_FILE, run_config.to_dict(self.study)
        if not any((self.root / schema.RUNS_DIRECTORY).glob(f"*/{schema.RUN_FILE}")):
            for name in (schema.JOURNAL_FILE, schema.DATA_FILE):
                (self.root / name).unlink(missing_ok=True)
        elif path.exists():
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
            changed = [d for d in run_config.differences(before, now) if not d.startswith(("resources.", "search.trials"))]
            if changed:
                raise ConfigError(
                    f"{path}: is of another study; changed since: {'; '.join(changed)}. Give it another name or --root, or remove the root"
                )

    def _write_state(self, state: str) -> None:
        self._known_runs()
        about = {
            "schema": schema.SCHEMA_VERSION,
            "study": self.study.name,
            "state": state,
            "started": self.started,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "runs": dict(sorted(self.states.items())),
            "planned": self.search.total * self.study.runs_per_trial,
            "mlflow_tracking_uri": tracking_uri(),
            "mlflow_behind": self.tracker.behind,
            "commit": self.commit,
            "versions": {name: version(name) for name in ("torch", "ray", "optuna", "mlflow", "simpy", "numpy", "tokenizers")}
            | {"python": platform.python_version()},
        }
        write_text(self.root / schema.STATE_FILE, json.dumps(about, indent=1))

    def _take_signals(self) -> dict[int, Any]:
        """After Ray's start, which installs its own."""

        def stop(number: int, frame: Any) -> None:
            self.stopping = True

        return {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}


def commit() -> str:
    """The commit that runs: from the submitter's environment in a Ray job, which has no .git, else from git."""
    if given := os.environ.get("MOELAB_COMMIT"):
        return given
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _count(directory: Path, state: dict[str, Any]) -> None:
    write_text(directory / ATTEMPTS_FILE, json.dumps({"attempts": state["attempts"], "deaths": state["deaths"]}))


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
