"""The table of the terminal, for all commands: it has the width that is there, and cuts no figure."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text

from bitladder.units import number_of

GAP = 2  # spaces between columns
LONGEST_WORD = 24  # characters of a word that is not broken in a column that folds
Cell = str | Text


@dataclasses.dataclass(frozen=True)
class Column:
    """A column.

    Parameters:
        head: its heading; "\\n" begins another line.
        right: whether cells are aligned to the right, as figures are.
        rank: 0 for a column that is always shown; of others that with the highest rank is left out first.
        fold: whether cells may take several lines: names and lists, never figures.
    """

    head: str
    right: bool = False
    rank: int = 0
    fold: bool = False

    @property
    def title(self) -> str:
        """The heading on one line."""
        return self.head.replace("\n", "_")


def figures(*heads: str, rank: int = 0) -> list[Column]:
    """Columns of figures with these headings."""
    return [Column(head, right=True, rank=rank) for head in heads]


class Table:
    """A renderable of rich. Its columns follow from the width of the console:

    Columns that fold, and long headings, become narrower first. Then columns with a rank are left out, the highest rank
    first, and a line below names them. If those without a rank do not fit side by side, the table goes on below, with
    the first column repeated.

    Parameters:
        columns: the columns from left to right. Without any heading, the first line is a row.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = list(columns)
        self.rows: list[list[Text]] = []
        self._rules: set[int] = set()

    def add(self, *cells: Cell) -> None:
        """Adds a row. Raises ValueError if it has another number of cells than there are columns."""
        row = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
        if len(row) != len(self.columns):
            raise ValueError(f"{number_of(len(row), 'cell')} for {number_of(len(self.columns), 'column')}")
        self.rows.append(row)

    def rule(self) -> None:
        """Draws a line before the next row."""
        self._rules.add(len(self.rows))

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        width = options.max_width
        wide, narrow = self._widths(fold=False), self._widths(fold=True)
        shown = list(range(len(self.columns)))
        while _total(narrow, shown) > width:
            optional = [index for index in shown if self.columns[index].rank]
            if not optional:
                break
            shown.remove(max(optional, key=lambda index: (self.columns[index].rank, index)))
        for number, piece in enumerate(_pieces(narrow, shown, width)):
            if number:
                yield Text("")
            yield from self._lines(console, piece, _spread(narrow, wide, piece, width))
        if len(shown) < len(self.columns):
            names = ", ".join(column.title for i, column in enumerate(self.columns) if i not in shown)
            text = (
                f"Not shown in {width} columns: {names}. All are in "
                f"{number_of(_total(narrow, range(len(wide))), 'column')}, "
            )
            yield Text(text + "and with --json.", "dim")

    def _widths(self, *, fold: bool) -> list[int]:
        """The width of each column; with `fold`, the least one."""
        widths = []
        for index, column in enumerate(self.columns):
            head, cells = Text(column.head), [row[index] for row in self.rows]
            titles = [line.cell_len for line in head.split("\n")]
            lines = [line.cell_len for cell in cells for line in cell.split("\n")]
            if fold:
                titles = [min(LONGEST_WORD, size) for size in titles]
            if fold and column.fold:
                words = (Text(word).cell_len for text in (head, *cells) for word in _held(text.plain).split())
                titles, lines = [], [min(LONGEST_WORD, max(words, default=0))]
            widths.append(max([*titles, *lines], default=0))
        return widths

    def _lines(self, console: Any, piece: Sequence[int], widths: Sequence[int]) -> Iterator[Text]:
        heads = [Text(column.head, "bold") for column in self.columns]
        rule = Text("─" * (sum(widths) + GAP * (len(widths) - 1)), "dim")
        if any(column.head for column in self.columns):
            yield from self._line(console, heads, piece, widths, bottom=True)
            yield rule
        for number, row in enumerate(self.rows):
            if number in self._rules:
                yield rule
            yield from self._line(console, row, piece, widths)

    def _line(
        self, console: Any, cells: Sequence[Text], piece: Sequence[int], widths: Sequence[int], *, bottom: bool = False
    ) -> Iterator[Text]:
        """The lines of a row: the cells of `piece`, each wrapped to its width. Headings stand at the bottom."""
        stacks: list[list[Text]] = []
        for index, width in zip(piece, widths, strict=True):
            fold = self.columns[index].fold or (bottom and cells[index].cell_len > width)
            parts = [
                part
                for line in cells[index].split("\n", allow_blank=True)
                for part in (_wrapped(console, line, width) if fold and width else [line])
            ]
            for part in parts:
                part.rstrip()
            stacks.append(parts)
        height = max(map(len, stacks), default=0)
        if bottom:
            stacks = [[Text("")] * (height - len(stack)) + stack for stack in stacks]
        for layer in itertools.zip_longest(*stacks, fillvalue=Text("")):
            line = Text(no_wrap=True, overflow="ignore")
            for place, (index, width, part) in enumerate(zip(piece, widths, layer, strict=True)):
                blank = " " * (width - part.cell_len)
                line.append(" " * GAP if place else "")
                line.append_text(Text(blank) + part if self.columns[index].right else part + Text(blank))
            line.rstrip()
            yield line


HELD = "\ue000"  # a space at which no line ends; any character that occurs nowhere else will do


def _held(text: str) -> str:
    """The text with its counts ("5 × q5_K") as single words."""
    return text.replace(" × ", f"{HELD}×{HELD}")


def _wrapped(console: Any, line: Text, width: int) -> list[Text]:
    """The line in pieces of a width, which end between words and never within a count."""
    held = line.copy()
    held.plain = _held(line.plain)
    pieces = list(held.wrap(console, width, overflow="fold"))
    for piece in pieces:
        piece.plain = piece.plain.replace(HELD, " ")
    return pieces


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[index] for index in shown) + GAP * (len(shown) - 1)


def _pieces(widths: Sequence[int], shown: Sequence[int], width: int) -> Iterator[list[int]]:
    """Columns that are side by side: all, or as many as fit, each time after the first column."""
    first, *rest = shown
    piece = [first]
    for index in rest:
        if len(piece) > 1 and _total(widths, [*piece, index]) > width:
            yield piece
            piece = [first]
        piece.append(index)
    yield piece


def _spread(narrow: Sequence[int], wide: Sequence[int], piece: Sequence[int], width: int) -> list[int]:
    """The widths of columns that are side by side: those that fold share the room that is left, from the left."""
    spare = width - _total(narrow, piece)
    widths = []
    for index in piece:
        more = min(max(spare, 0), wide[index] - narrow[index])
        widths.append(narrow[index] + more)
        spare -= more
    return widths
