"""Reports of progress: long work makes them and does not know who shows them.

Functions below `cli/` take a `Progress` and never print. The default is `SILENT`. The command line passes a `Progress`
that draws bars.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

LOG_SECONDS = 60  # between lines of a log


class Bar(Protocol):
    """The progress of one piece of work."""

    def advance(self, amount: float = 1) -> None:
        """Adds units that are done."""

    def note(self, text: str) -> None:
        """Shows a few words beside the bar, such as a running figure or the current tensor."""


class Progress(Protocol):
    """Receives reports of progress, and messages to the user."""

    def task(self, label: str, total: float) -> contextlib.AbstractContextManager[Bar]:
        """Begins a piece of work of `total` units, which ends with the context."""

    def info(self, text: str) -> None:
        """Shows a line about the work."""

    def warn(self, text: str) -> None:
        """Shows a line that the user should read even with --quiet."""


class LoggedBar:
    """The progress of a task as lines of a log: one when it begins, then one a minute.

    Parameters:
        write: gets each line.
        label: what the task is.
        total: its units.
    """

    def __init__(self, write: Callable[[str], None], label: str, total: float) -> None:
        self._write, self._label, self._total = write, label, total
        self._done, self._note = 0.0, ""
        self._begun = self._logged = time.monotonic()
        write(label)

    def advance(self, amount: float = 1) -> None:
        """Adds units that are done."""
        self._done += amount
        now = time.monotonic()
        if now - self._logged < LOG_SECONDS or self._total <= 0:
            return
        self._logged = now
        text = f"{self._label}: {self._done / self._total:.0%} after {(now - self._begun) / 60:.0f} min"
        self._write(f"{text}, {self._note}" if self._note else text)

    def note(self, text: str) -> None:
        """Keeps a few words for the next line."""
        self._note = text


class _Nothing:
    @contextlib.contextmanager
    def task(self, label: str, total: float) -> Iterator[Bar]:
        yield self

    def advance(self, amount: float = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def info(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass


SILENT: Progress = _Nothing()
