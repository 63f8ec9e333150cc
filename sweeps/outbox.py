"""From the root to the tracker, beside the driver's loop: a server that is away blocks its client for seconds, never a run."""

import threading
from collections.abc import Callable

from sweeps.book import Book
from sweeps.tracking import Tracker


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

    def send(self) -> None:
        """Start sending what is new, unless that is going on."""
        if self._sending is not None and self._sending.is_alive():
            return
        self._await()
        runs, self._handed = self._book.to_send()
        self._sending = threading.Thread(target=self._tracker.sync, args=(runs,), daemon=True, name="mlflow")
        self._sending.start()

    def finish(self, state: str) -> None:
        """Send the rest, and how the study ended."""
        self._await()
        runs, self._handed = self._book.to_send()
        # The last turn must not be skipped because an earlier one failed.
        self._tracker.sync(runs, final=True)
        self._sent()
        self._tracker.finish(state)

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
