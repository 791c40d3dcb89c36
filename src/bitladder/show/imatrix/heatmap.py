"""The grid in a terminal."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bitladder.show.imatrix.grid import Grid, on_top
from bitladder.show.imatrix.tables import DASH


class HeatMap:
    """A rich renderable: coloured cells with their values, and below them the scale.

    Kinds that do not fit beside each other go into further strips, so that nothing is cut off.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = self.grid
        yield Text(grid.title(), style="bold")
        labels = [DASH if layer is None else str(layer) for layer in grid.layers]
        margin = max(map(len, ["Layer", *labels]))
        cells = [[grid.short(value) for value in row] for row in grid.values]
        widths = [2 + max(len(kind), *(len(row[i]) for row in cells)) for i, kind in enumerate(grid.kinds)]
        for strip in _strips(widths, options.max_width - margin - 1):
            head = Text("Layer".rjust(margin) + " ")
            for i in strip:
                head.append(grid.kinds[i].center(widths[i]))
            yield head
            for label, row, texts in zip(labels, grid.values, cells, strict=True):
                line = Text(label.rjust(margin) + " ", no_wrap=True)
                for i in strip:
                    line.append(texts[i].center(widths[i]), style=self._style(row[i]))
                yield line
        yield self._legend(bar=console.color_system is not None)

    def _style(self, value: float | None) -> str:
        if value is None:
            return "dim"
        colour = self.grid.colour(value)
        return f"{_hex(on_top(colour))} on {_hex(colour)}"

    def _legend(self, *, bar: bool) -> Text:
        least, most = self.grid.span()
        line = Text()
        if bar and most > least:
            for step in range(24):
                share = step / 23
                logarithmic = self.grid.column.scale == "log" and least > 0
                value = least * (most / least) ** share if logarithmic else least + share * (most - least)
                line.append(" ", style=self._style(value))
            line.append(" ")
        return line.append(self.grid.legend())


def _strips(widths: list[int], room: int) -> list[list[int]]:
    """Indices of the columns that fit beside each other; one that is too wide gets a strip of its own."""
    strips: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if strips[-1] and sum(widths[j] for j in strips[-1]) + width > room:
            strips.append([])
        strips[-1].append(i)
    return strips


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
