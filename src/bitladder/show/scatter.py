"""Draws points on two logarithmic axes with characters."""

import dataclasses
import math
from collections.abc import Callable, Sequence

# Mantissas of ticks, from fine to coarse. The first set with at most MOST ticks on the axis is used.
STEPS: tuple[tuple[float, ...], ...] = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 5), (1,))
MOST = 7


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
