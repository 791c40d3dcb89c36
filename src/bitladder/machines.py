"""Machines that share the work of a run: a standard `Executor`, and how work is divided between them.

Whatever spreads work knows no more than this. `cluster` makes a `Machines` of a Dask cluster.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import Literal

from bitladder.progress import Bar

# Shares of work for each machine: one that dies loses little, and none waits long for the last one at the end.
SHARES = 4


@dataclasses.dataclass(frozen=True)
class Machines:
    """Machines that see the same files.

    Parameters:
        executor: takes work. Functions, arguments and results must be picklable.
        count: machines; each does one task at a time, in all its threads.
        threads: threads of the largest of them.
    """

    executor: Executor
    count: int
    threads: int = 1


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Divides work into shares of about the same cost.

    Parameters:
        costs: the cost of each piece.
        count: shares, at most.

    Returns:
        The numbers of the pieces in each share, the most costly share first. No share is empty.

    Example:
        >>> shares([1, 5, 1, 1, 1], 2)
        [[1], [0, 2, 3, 4]]
    """
    found: list[list[int]] = [[] for _ in range(min(count, len(costs)))]
    totals = [0.0] * len(found)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        least = totals.index(min(totals))
        found[least].append(piece)
        totals[least] += costs[piece]
    return [found[place] for place in sorted(range(len(found)), key=lambda place: -totals[place])]


Remark = tuple[Literal["info", "warn"], str]


class Heard:
    """A Progress that keeps remarks, for a reader elsewhere. Bars are not shown."""

    def __init__(self) -> None:
        self.remarks: list[Remark] = []

    @contextlib.contextmanager
    def task(self, label: str, total: float) -> Iterator[Bar]:
        """See `progress.Progress`."""
        yield self

    def advance(self, amount: float = 1) -> None:
        """See `progress.Bar`."""

    def note(self, text: str) -> None:
        """See `progress.Bar`."""

    def info(self, text: str) -> None:
        """Keeps a remark."""
        self.remarks.append(("info", text))

    def warn(self, text: str) -> None:
        """Keeps a warning."""
        self.remarks.append(("warn", text))
