"""One figure of every tensor as a map of layers × kinds: its colours, and its form in a terminal."""

import dataclasses
import math
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bitladder.calibrate import TensorDifference, TensorStatistics, weighted_mean
from bitladder.errors import BitladderError
from bitladder.show.imatrix.tables import DASH, FigureColumn

Colour = tuple[int, int, int]
# Dark to light, also in grey and for the colour-blind (the anchors of matplotlib's viridis and RdBu).
_RISING: list[Colour] = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]
_SIGNED: list[Colour] = [(33, 102, 172), (247, 247, 247), (178, 24, 43)]


@dataclasses.dataclass(frozen=True)
class FigureMap:
    """A figure by layer and kind.

    Parameters:
        column: which figure.
        layers: numbers of blocks; None is what lies outside of blocks.
        kinds: kinds of tensors.
        values: [layers][kinds], None where there is no value.
    """

    column: FigureColumn
    layers: list[int | None]
    kinds: list[str]
    values: list[list[float | None]]

    def span(self) -> tuple[float, float]:
        """The least and the largest finite value: above 0 on a logarithmic scale, and ± the largest on a signed one."""
        finite = [v for row in self.values for v in row if v is not None and math.isfinite(v)]
        if self.column.scale == "signed":
            most = max(map(abs, finite), default=0.0)
            return -most, most
        if self.column.scale == "log":
            finite = [v for v in finite if v > 0]
        return min(finite, default=0.0), max(finite, default=0.0)

    def place(self, value: float) -> float:
        """Where a value lies on the scale: 0 to 1.

        Example:
            >>> FigureMap(FigureColumn("sum", "Σ", scale="log"), [0], ["q", "k"], [[1.0, 100.0]]).place(10.0)
            0.5
        """
        least, most = self.span()
        value = min(max(value, least), most)
        if self.column.scale == "log" and least > 0:
            value, least, most = math.log(value), math.log(least), math.log(most)
        return (value - least) / (most - least) if most > least else 0.5

    def colour(self, value: float) -> Colour:
        """The red, green and blue (0–255) of a value."""
        anchors = _SIGNED if self.column.scale == "signed" else _RISING
        position = self.place(value) * (len(anchors) - 1)
        index = min(int(position), len(anchors) - 2)
        share = position - index
        red, green, blue = (round(x + share * (y - x)) for x, y in zip(*anchors[index : index + 2], strict=True))
        return red, green, blue

    def short(self, value: float | None) -> str:
        """The value in three digits."""
        if value is None or not math.isfinite(value):
            return self.column.cell(value)
        shown = value * 100 if self.column.percent else value
        whole = 1000 <= abs(shown) < 1e6
        return f"{shown:.0f}" if whole else f"{shown:.3g}"

    def title(self) -> str:
        """What is shown, with its unit."""
        unit = ", in %" if self.column.percent and "%" not in self.column.heading else ""
        return f"{self.column.heading}{unit} by layer and kind"

    def legend(self) -> str:
        """The ends of the scale."""
        least, most = self.span()
        scale = " (logarithmic)" if self.column.scale == "log" else ""
        return f"from {self.column.cell(least)} to {self.column.cell(most)}{scale}"


def make_map(rows: Iterable[TensorStatistics | TensorDifference], column: FigureColumn) -> FigureMap:
    """A column of tensors' rows as layers × kinds. Tensors that share a place are averaged, weighted by N.

    Raises BitladderError if no tensor has a value.
    """
    places: dict[tuple[int | None, str], list[tuple[int, float | None]]] = {}
    for row in rows:
        places.setdefault((row.layer, row.kind or ""), []).append((row.n, getattr(row, column.name)))
    if all(value is None for pairs in places.values() for _, value in pairs):
        raise BitladderError(f"no tensor has a {column.heading}: there is nothing to draw")
    layers = sorted({layer for layer, _ in places}, key=lambda layer: (layer is None, layer))
    kinds = sorted({kind for _, kind in places})
    values = [[weighted_mean(places.get((layer, kind), [])) for kind in kinds] for layer in layers]
    return FigureMap(column, layers, kinds, values)


def text_colour(colour: Colour) -> Colour:
    """Black or white: the colour of text that is read better on a colour (by its luma, Rec. 601)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


class TerminalMap:
    """A rich renderable: coloured cells with their values, and the scale below them.

    Kinds that do not fit beside each other go into further strips, so that nothing is cut off.
    """

    def __init__(self, figures: FigureMap) -> None:
        self.map = figures

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        figures = self.map
        yield Text(figures.title(), style="bold")
        labels = [DASH if layer is None else str(layer) for layer in figures.layers]
        margin = max(map(len, ["Layer", *labels]))
        cells = [[figures.short(value) for value in row] for row in figures.values]
        widths = [2 + max(len(kind), *(len(row[i]) for row in cells)) for i, kind in enumerate(figures.kinds)]
        for strip in _strips(widths, options.max_width - margin - 1):
            head = Text("Layer".rjust(margin) + " ")
            for i in strip:
                head.append(figures.kinds[i].center(widths[i]))
            yield head
            for label, row, texts in zip(labels, figures.values, cells, strict=True):
                line = Text(label.rjust(margin) + " ", no_wrap=True)
                for i in strip:
                    line.append(texts[i].center(widths[i]), style=self._style(row[i]))
                yield line
        yield self._legend(bar=console.color_system is not None)

    def _style(self, value: float | None) -> str:
        if value is None:
            return "dim"
        colour = self.map.colour(value)
        return f"{_hex(text_colour(colour))} on {_hex(colour)}"

    def _legend(self, *, bar: bool) -> Text:
        least, most = self.map.span()
        line = Text()
        if bar and most > least:
            for step in range(24):
                share = step / 23
                logarithmic = self.map.column.scale == "log" and least > 0
                value = least * (most / least) ** share if logarithmic else least + share * (most - least)
                line.append(" ", style=self._style(value))
            line.append(" ")
        return line.append(self.map.legend())


def _strips(widths: list[int], room: int) -> list[list[int]]:
    """Indices of columns that fit beside each other. A column that is too wide gets its own strip."""
    strips: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if strips[-1] and sum(widths[j] for j in strips[-1]) + width > room:
            strips.append([])
        strips[-1].append(i)
    return strips


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
