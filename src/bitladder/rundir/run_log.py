"""The log of a run directory: what a run says, with times, so that it can be followed from another terminal."""

import contextlib
import datetime
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Self

from bitladder.files import is_alive
from bitladder.progress import Bar, LoggedBar, Progress
from bitladder.rundir.layout import Layout

LARGEST, KEPT = 1 << 20, 1 << 18  # bytes: a log that is larger keeps so many of its end
COMMAND = " $ "  # between the time and a command
LAST_LINES = 12  # that are shown before new ones are followed
POLL = 0.5  # seconds


class RunLog:
    """A Progress that passes everything on and writes it into the log. The file is begun by `begin`, not before.

    Parameters:
        progress: gets everything.
        layout: the run directory.
        command: the command line of the run.
    """

    def __init__(self, progress: Progress, layout: Layout, command: str) -> None:
        self._progress, self._path = progress, layout.log
        self._waiting: list[str] | None = [_line(f"$ {command}")]

    def begin(self) -> None:
        """Writes what was said so far: the run directory is there, and is this run's."""
        if self._waiting is not None:
            lines, self._waiting = self._waiting, None
            for line in lines:
                self._append(line)

    def write(self, text: str) -> None:
        """Adds a line to the log alone."""
        line = _line(text)
        if self._waiting is None:
            self._append(line)
        else:
            self._waiting.append(line)

    def info(self, text: str) -> None:
        """Passes a remark on, and writes it."""
        self.write(text)
        self._progress.info(text)

    def warn(self, text: str) -> None:
        """Passes a warning on, and writes it."""
        self.write(f"warning: {text}")
        self._progress.warn(text)

    @contextlib.contextmanager
    def task(self, label: str, total: float) -> Iterator[Bar]:
        """A bar, which the log has a line of each minute."""
        with self._progress.task(label, total) as bar:
            yield _Both(bar, LoggedBar(self.write, label, total))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if self._waiting is None:
            self.write("done" if kind is None else f"stopped: {error}" if str(error) else "interrupted")

    def _append(self, line: str) -> None:
        # The log is a convenience: a full disk is found by what must be written.
        with contextlib.suppress(OSError):
            with self._path.open("a", encoding="utf-8", errors="replace") as stream:
                stream.write(line)
                size = stream.tell()
            if size > LARGEST:
                end = self._path.read_bytes()[-KEPT:]
                self._path.write_bytes(end[end.index(b"\n") + 1 :])


class _Both:
    def __init__(self, *bars: Bar) -> None:
        self._bars = bars

    def advance(self, amount: float = 1) -> None:
        for bar in self._bars:
            bar.advance(amount)

    def note(self, text: str) -> None:
        for bar in self._bars:
            bar.note(text)


def _line(text: str) -> str:
    now = datetime.datetime.now().astimezone()
    return f"{now:%Y-%m-%d %H:%M:%S} {' '.join(text.splitlines())}\n"


def last_command(folder: pathlib.Path) -> str | None:
    """The command line of the last run in a directory, as it was typed; None if there is no log."""
    commands = [line.split(COMMAND, 1)[1] for line in _read(folder) if COMMAND in line[:22]]
    return commands[-1] if commands else None


def follow(folder: pathlib.Path, sleep: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The last lines of the log of a run, then each new one until no run is at work in the directory."""
    lines = _read(folder)
    yield from lines[-LAST_LINES:]
    while True:
        running = is_running(folder)
        seen, lines = lines, _read(folder)
        # A log that was shortened has lost its beginning; the last line that was seen tells where to go on.
        start = len(seen) if lines[: len(seen)] == seen else _place_after(lines, seen[-1])
        yield from lines[start:]
        if not running:
            return
        sleep(POLL)


def is_running(folder: pathlib.Path) -> bool:
    """Whether a run is at work in a directory: its lock file names a process that lives."""
    try:
        return is_alive(int(Layout(folder).lock.read_text(encoding="ascii")))
    except (OSError, ValueError):
        return False


def _place_after(lines: list[str], line: str) -> int:
    return lines.index(line) + 1 if line in lines else 0


def _read(folder: pathlib.Path) -> list[str]:
    try:
        return Layout(folder).log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
