"""Strings of strangers on a terminal: what would move the cursor, hide text or turn it round is shown as an escape."""

import re
from collections.abc import Iterator
from typing import Any

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
