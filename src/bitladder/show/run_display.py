"""What `bitladder run` shows while it works: the step, the time left, and the best so far of each rung."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bitladder.show.output import Output
from bitladder.units import duration

if TYPE_CHECKING:
    from bitladder.ladder import Best, Status, TimeLeft
    from bitladder.rundir import RunLog


class RunDisplay:
    """Told of every moment of a run. On a terminal a table that stays above the bars; elsewhere, and in the log, a line
    for each step that is really done and for each rung that gets better.
    """

    def __init__(self, output: Output, log: "RunLog") -> None:
        self._output, self._log = output, log
        self._status: Status | None = None
        self._told = ""
        self._best: dict[str, Best] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While this is open the table is on the screen."""
        with self._output.header(self._table):
            yield

    def watch(self, status: "Status") -> None:
        """A new moment."""
        self._status = status
        self._log.begin()
        say = self._log.write if self._output.live else self._log.info
        if status.working and status.step != self._told:
            self._told = status.step
            left = f", {in_words(status.left)} left" if status.left is not None else ""
            say(f"[{status.number}/{status.count}] {status.step}{left}")
        for rung, best in status.best.items():
            if self._best.get(rung) != best and status.working:
                say(f"{rung}: {line(best)}")
        self._best = dict(status.best)

    def _table(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        status = self._status
        if status is None:
            return Text("")
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(2):
            table.add_column(no_wrap=True)
        for rung in status.rungs:
            best = status.best.get(rung)
            table.add_row(rung, line(best) if best else "–")
        left = in_words(status.left) if status.left is not None else "not known yet"
        head = f"step {status.number} of {status.count}, {status.step} · time left: {left}"
        return Group(Text(head, "bold"), table)


def in_words(left: "TimeLeft") -> str:
    """The time left: one number where it is known well enough, else from the least to the most."""
    least, most = duration(left.least), duration(left.most)
    if left.seconds is not None:
        return duration(left.seconds)
    return least if least == most else f"{least.removeprefix('about ')} to {most.removeprefix('about ')}"


def line(best: "Best") -> str:
    """The best of a rung in words."""
    from bitladder.evaluate import Figure
    from bitladder.report import with_error

    kld = with_error(Figure(value=best.kld, error=best.error))
    size = f"{best.bytes / 1e9:.3f} GB" if best.bytes >= 1e8 else f"{best.bytes / 1e6:.2f} MB"
    return f"{size}, KLD {kld}" + (f" ({best.name})" if best.name else "")
