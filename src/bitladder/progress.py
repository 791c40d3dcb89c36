"""How long work reports that it is going on, without knowing who listens.

Functions below `cli/` take a `Progress` and never print. `SILENT` is the default; the command line passes one that
draws bars.
"""

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Task(Protocol):
    """One bar."""

    def advance(self, amount: float = 1) -> None:
        """`amount` more units are done."""

    def note(self, text: str) -> None:
        """Show a few words beside the bar (a running figure, the tensor at hand)."""


class Progress(Protocol):
    """Who hears of progress, and of things the user should know."""

    def task(self, label: str, total: float) -> contextlib.AbstractContextManager[Task]:
        """Begin a piece of work of `total` units; leaving the context ends it."""

    def info(self, text: str) -> None:
        """A line about what is being done."""

    def warn(self, text: str) -> None:
        """A line the user should read even when quiet."""


class _Nothing:
    @contextlib.contextmanager
    def task(self, label: str, total: float) -> Iterator[Task]:
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
