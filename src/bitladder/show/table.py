"""The table of the terminal, and points on two logarithmic axes, for all commands.

A table has the width that is there, and cuts no figure.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.text import Text

from bitladder.units import number_of

GAP = 2  # spaces between columns
LONGEST_WORD = 24  # characters of a word that is not broken in a column that folds
Cell = str | Text
HELD = "\ue000"  # a space at which no line ends; any character that occurs nowhere else will do
# Mantissas of ticks, from fine to coarse. The first set with at most MOST ticks on the axis is used.
STEPS: tuple[tuple[float, ...], ...] = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5), (1,))
MOST = 7


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


@dataclasses.dataclass(frozen=True)
class Point:
    """A point: its coordinates, which are above 0, its mark (one character), and a label beside the mark."""

    x: float
    y: float
    mark: str
    label: str = ""


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A logarithmic axis from `low` to `high` with a number of cells."""

    low: float
    high: float
    cells: int

    def place(self, value: float) -> int:
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return round(share * (self.cells - 1))

    def ticks(self) -> list[float]:
        """Round values on the axis: at most MOST, unless it spans more powers of ten."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values: list[float] = []
        for steps in STEPS:
            # Parsed from digits, because 1.2 · 10⁻⁴ is not the number nearest to 0.00012.
            round_values = [float(f"{step}e{power}") for power in powers for step in steps]
            values = [value for value in round_values if self.low <= value <= self.high]
            if len(values) <= MOST:
                break
        return values


def scatter(
    points: Sequence[Point],
    *,
    width: int,
    height: int,
    x_text: Callable[[float], str] = lambda value: f"{value:.3g}",
    y_text: Callable[[float], str] = lambda value: f"{value:.3g}",
) -> list[str]:
    """Draws points as lines of text: the plot, and the x axis below it.

    If two points have the same place the later one is drawn. A logarithmic axis has no place for points that are not
    above 0: they are left out.

    Parameters:
        points: the points.
        width: the largest number of characters of a line.
        height: lines of the plot.
        x_text: how a tick of the x axis is written.
        y_text: how a tick of the y axis is written.

    Returns:
        The lines; none if no point can be drawn.
    """
    points = [point for point in points if point.x > 0 and point.y > 0]
    if not points:
        return []
    y_axis = _axis([point.y for point in points], height)
    y_ticks = {height - 1 - y_axis.place(value): y_text(value) for value in y_axis.ticks()}
    margin = max((len(text) for text in y_ticks.values()), default=0) + 1
    x_axis = _axis([point.x for point in points], max(10, width - margin - 1))
    grid = [[" "] * x_axis.cells for _ in range(height)]
    places = [(height - 1 - y_axis.place(point.y), x_axis.place(point.x)) for point in points]
    for (row, column), point in zip(places, points, strict=True):
        grid[row][column] = point.mark
    for (row, column), point in zip(places, points, strict=True):
        if grid[row][column] == point.mark:
            _write_label(grid[row], column, point.label)
    lines = [
        f"{y_ticks.get(row, ''):>{margin - 1}} {'┤' if row in y_ticks else '│'}{''.join(cells)}".rstrip()
        for row, cells in enumerate(grid)
    ]
    return [*lines, *_x_lines(x_axis, margin, x_text)]


def _axis(values: Sequence[float], cells: int) -> _Axis:
    """An axis with some room on both sides."""
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, 1.05)
    return _Axis(low / room, high * room, cells)


def _write_label(row: list[str], column: int, label: str) -> None:
    """Writes a label to the right of the mark, or to the left, with a blank on both sides, if there is room."""
    size = len(label)
    for start in (column + 2, column - 1 - size):
        stop = start + size
        around = row[max(0, start - 1) : stop + 1] if start > column else row[max(0, start - 1) : stop]
        if label and start >= 0 and stop <= len(row) and all(character == " " for character in around):
            row[start:stop] = label
            return


def _x_lines(axis: _Axis, margin: int, text: Callable[[float], str]) -> list[str]:
    rule, words = ["─"] * axis.cells, [" "] * axis.cells
    end = -1
    for value in axis.ticks():
        place, shown = axis.place(value), text(value)
        rule[place] = "┬"
        start = max(0, min(place - len(shown) // 2, len(words) - len(shown)))
        if start > end:
            words[start : start + len(shown)] = shown
            end = start + len(shown)
    blank = " " * margin
    return [f"{blank}└{''.join(rule)}", f"{blank} {''.join(words)}".rstrip()]
