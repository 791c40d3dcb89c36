"""Reports of progress: long work makes them and does not know who shows them.

Functions below `cli/` take a `Progress` and never print. The default is `SILENT`. The command line passes a `Progress`
that draws bars.
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol


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
