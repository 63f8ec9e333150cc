"""From the root to the tracker, beside the driver's loop: a server that is away blocks its client for seconds, never a run."""

import threading
import time
from collections.abc import Callable

from sweeps import schema
from sweeps.book import Book
from sweeps.tracking import Tracker

FINAL_PAUSES = (3.0, 10.0)
"""Seconds between the last attempts at a store that is away when the study ends; `run` again sends what they do not."""


class Outbox:
    """Hands the runs that are new, or still going on, to the tracker; an ended one until all of it went through."""

    def __init__(self, tracker: Tracker, book: Book, announce: Callable[[str], None]) -> None:
        self._tracker, self._book, self._announce = tracker, book, announce
        self._sending: threading.Thread | None = None
        self._handed: dict[str, int] = {}
        self._was_behind: str | None = None

    @property
    def behind(self) -> str | None:
        """Why the tracker does not have everything that was handed to it; None if it has."""
        return self._tracker.behind

    def open(self) -> None:
        """Begin to reach the store; nothing is sent."""
        self._sending = threading.Thread(target=self._tracker.connect, daemon=True, name="mlflow")
        self._sending.start()

    def send(self) -> None:
        """Start sending what is new, unless that is going on."""
        if self._sending is not None and self._sending.is_alive():
            return
        self._await()
        runs, self._handed = self._book.to_send()
        self._sending = threading.Thread(target=self._tracker.sync, args=(runs,), daemon=True, name="mlflow")
        self._sending.start()

    def finish(self, state: str) -> None:
        """Send the rest, and how the study ended; a store that only now comes back is given a moment, unless it is to be stopped."""
        self._await()
        for pause in (*(FINAL_PAUSES if state != schema.STOPPED else ()), None):
            runs, self._handed = self._book.to_send()
            # The last turn must not be skipped because an earlier one failed.
            self._tracker.sync(runs, final=True)
            self._sent()
            if not self.behind:
                self._tracker.finish(state)
            if not self.behind or pause is None:
                break
            time.sleep(pause)

    def _await(self) -> None:
        if self._sending is not None:
            self._sending.join()
            self._sending = None
            self._sent()

    def _sent(self) -> None:
        behind = self._tracker.behind
        if not behind:
            self._book.sent(self._handed)
        if behind and not self._was_behind:
            self._announce(f"MLflow cannot be reached ({behind}); training goes on, what is missing is sent later")
        elif self._was_behind and not behind:
            self._announce("MLflow is back; everything has been sent")
        self._was_behind = behind
