"""Machines that share the work of a run: a standard `Executor`, and how work is divided between them.

Whatever spreads work knows no more than this. `cluster` makes a `Machines` of a Dask cluster.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any, Literal

from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress

# Shares of work for each machine: one that dies loses little, and none waits long for the last one at the end.
SHARES = 4
# Seconds until a file that another machine wrote must be seen here: network file systems keep what they know of a
# folder for up to a minute.
SEEN = 90.0
PATIENCE = 60.0  # seconds without a result after which it is asked whether there is a machine


@dataclasses.dataclass(frozen=True)
class Machines:
    """Machines that see the same files, or exchange them.

    Parameters:
        executor: takes work. Functions, arguments and results must be picklable.
        count: machines; each does one task at a time, in all its threads.
        threads: threads of the largest of them.
        alive: how many there are now; more can come.
        share: URL of the folder where they exchange files (`exchange`); None if they see the same.
    """

    executor: Executor
    count: int
    threads: int = 1
    alive: Callable[[], int] = lambda: 1
    share: str | None = None

    def wait(self, left: set[Future[Any]], progress: Progress) -> tuple[set[Future[Any]], set[Future[Any]]]:
        """Waits until one of some futures is done.

        Parameters:
            left: the futures.
            progress: gets a warning each time that no machine is left.

        Returns:
            Those that are done, and those that are not.
        """
        warned = False
        while True:
            done, undone = wait(left, timeout=None if warned else PATIENCE, return_when=FIRST_COMPLETED)
            if done:
                return done, undone
            if not self.alive():
                progress.warn("no machine is left; the run waits for one, or give the command again later to go on")
                warned = True


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

    task = SILENT.task

    def info(self, text: str) -> None:
        """Keeps a remark."""
        self.remarks.append(("info", text))

    def warn(self, text: str) -> None:
        """Keeps a warning."""
        self.remarks.append(("warn", text))


def wait_for(files: Iterable[pathlib.Path], seconds: float = SEEN) -> None:
    """Waits until files are seen that another machine wrote.

    Raises BitladderError that names the first that is not seen after some seconds.
    """
    until = time.monotonic() + seconds
    for path in files:
        while not path.is_file():
            if time.monotonic() > until:
                raise BitladderError(
                    f"{path} was written by another machine and is not seen here after {seconds:.0f} s; "
                    "all machines must share the run directory"
                )
            time.sleep(0.5)
            list(path.parent.glob("*"))  # has a network file system read the folder again
