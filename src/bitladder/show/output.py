"""The only place that prints: data on stdout, everything else on stderr.

In strings of strangers, what would move the cursor, hide text or turn it round is shown as an escape.
"""

import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import click

from bitladder.progress import Bar, LoggedBar, Progress

# Control characters but for tab and line break; half surrogates; characters that turn the direction of text.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with an escape such as \\u001b for each character that a terminal would obey. JSON stays JSON.

    Example:
        >>> printable("a\\x1b[2Jb")
        'a\\\\u001b[2Jb'
    """
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_printable_line(text: str) -> str:
    """The text for an error: printable, and on one line.

    Example:
        >>> one_printable_line("no file a\\nb")
        'no file a\\\\nb'
    """
    return printable(text.replace("\r", "\\r").replace("\n", "\\n"))


class Plain:
    """A hook of a rich console: the text of whatever it prints is printable."""

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        """See `rich.console.RenderHook`."""
        return [_Printable(renderable) for renderable in renderables]


class _Printable:
    def __init__(self, renderable: Any) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.segment import Segment

        for segment in console.render(self._renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)

    def __rich_measure__(self, console: Any, options: Any) -> Any:
        from rich.measure import Measurement

        return Measurement.get(console, options, self._renderable)


class Output:
    """How a command prints.

    Parameters:
        json: print data as JSON only.
        quiet: print no bars and no remarks; warnings stay.
        verbose: print what the native library logs.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        from rich.console import Console

        self.json, self.quiet, self.verbose = json, quiet, verbose
        _tame_hub(quiet)
        # A file or a pipe has no width unless COLUMNS gives one, so its tables are as wide as necessary.
        # Without a standard output (>&-) there is nobody to print to.
        sys.stdout, sys.stderr = sys.stdout or _null(), sys.stderr or _null()
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240
        self._stdout = Console(file=sys.stdout, highlight=False, width=width)
        self._stderr = Console(file=sys.stderr, highlight=False, stderr=True)
        for console in (self._stdout, self._stderr):
            console.push_render_hook(Plain())  # type: ignore[arg-type]  # it has the methods of the base class
        self._bars = _Bars(self._stderr, quiet)
        self.progress: Progress = self._bars
        # An earlier command of this process may have set it. The library is not loaded to say no.
        if verbose or "bitladder.engine.native" in sys.modules:
            from bitladder.engine import log

            log.verbose = verbose

    @property
    def live(self) -> bool:
        """Whether progress is drawn in place, and not written line by line."""
        return self._stderr.is_terminal and not self.quiet

    @contextlib.contextmanager
    def header(self, render: Callable[[], Any]) -> Iterator[None]:
        """Shows the result of `render` above the bars, several times a second, if progress is `live`."""
        if self.live:
            with self._bars.held(render):
                yield
        else:
            yield

    @property
    def width(self) -> int:
        """Characters of a line of stdout. A file or a pipe has long lines."""
        return self._stdout.width

    def print_json(self, value: Any) -> None:
        """Prints a value as indented JSON on stdout."""
        self.line(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))

    def line(self, text: str) -> None:
        """Prints a line of data on stdout."""
        sys.stdout.write(printable(text) + "\n")

    def print(self, renderable: Any) -> None:
        """Prints a table or another renderable of rich on stdout. A line that is too long is not cut."""
        self._stdout.print(renderable, crop=False)

    def remark(self, renderable: Any) -> None:
        """Prints a rich table or a line on stderr unless quiet, for a person who watches the work."""
        if not self.quiet:
            self._stderr.print(renderable, markup=False, crop=False, soft_wrap=isinstance(renderable, str))


def _tame_hub(quiet: bool) -> None:
    """Hides huggingface_hub's bars if ours are hidden, and its remarks on each attempt without a network.

    huggingface_hub reads these variables when it is imported, which every command does after it has its output.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # it is open as long as the process


class _Bars:
    """Progress as bars with the time left. In a file or a pipe, a line when a task begins and each minute."""

    def __init__(self, console: Any, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._live: Any = None
        self._header: Callable[[], Any] | None = None

    @contextlib.contextmanager
    def task(self, label: str, total: float) -> Iterator[Bar]:
        if self._quiet:
            yield _NoBar()
            return
        if not self._console.is_terminal:
            yield LoggedBar(self.info, label, total)
            return
        with self._drawing() as live:
            identity = live.add_task(label, total=total, note="")
            try:
                yield _Bar(live, identity)
            finally:
                live.remove_task(identity)

    @contextlib.contextmanager
    def held(self, render: Callable[[], Any]) -> Iterator[None]:
        """Keeps the bars on the screen, with the result of `render` above them."""
        self._header = render
        try:
            with self._drawing():
                yield
        finally:
            self._header = None

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[Any]:
        """The bars on the screen. The first caller removes them; further callers share them."""
        if self._live is not None:
            yield self._live
            return
        self._live = _with_header(self._console, lambda: self._header() if self._header else None)
        self._live.start()
        try:
            yield self._live
        finally:
            self._live.stop()
            self._live = None

    def info(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", markup=False, style="yellow", soft_wrap=True)


def _with_header(console: Any, header: Callable[[], Any]) -> Any:
    """Bars with the time left, below the result of `header`; None shows nothing above."""
    from rich import progress as bars

    class Headed(bars.Progress):
        def get_renderables(self) -> Iterator[Any]:
            # Live areas pass the console's hooks by.
            parts = [header(), self.make_tasks_table(self.tasks)]
            yield from Plain().process_renderables([part for part in parts if part is not None])

    return Headed(
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(compact=True),
        bars.TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
    )


class _Bar:
    def __init__(self, live: Any, identity: Any) -> None:
        self._live, self._identity = live, identity

    def advance(self, amount: float = 1) -> None:
        self._live.update(self._identity, advance=amount)

    def note(self, text: str) -> None:
        self._live.update(self._identity, note=text)


class _NoBar:
    def advance(self, amount: float = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --json, --quiet and -v to a command, and gives it an `output`."""

    @click.option("--json", "as_json", is_flag=True, help="Print figures as JSON on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Print no progress and no remarks, only warnings and errors.")
    @click.option("-v", "--verbose", is_flag=True, help="Show the log of the native library.")
    @functools.wraps(function)
    def wrapper(*args: Any, as_json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        return function(*args, output=Output(json=as_json, quiet=quiet, verbose=verbose), **kwargs)

    return wrapper
