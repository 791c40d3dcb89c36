"""One figure of every tensor as a map of layers × kinds: its colours, and its form in a terminal or as a picture.

A picture is a PNG by matplotlib, or an HTML page with SVG that needs nothing else.
"""

import dataclasses
import html
import importlib
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from bitladder.calibrate import TensorDifference, TensorStatistics, weighted_mean
from bitladder.errors import BitladderError, UsageError
from bitladder.files import replacing, write_text
from bitladder.show.imatrix_tables import DASH, FigureColumn, FigureRow

Colour = tuple[int, int, int]
# Dark to light, also in grey and for the colour-blind (the anchors of matplotlib's viridis and RdBu).
_RISING: list[Colour] = [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]
_SIGNED: list[Colour] = [(33, 102, 172), (247, 247, 247), (178, 24, 43)]
_CELL_WIDTH, _CELL_HEIGHT, _MARGIN, _HEAD = 92, 20, 48, 40
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em }
body { color: #222; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15em .6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
.name { text-align: left } .wide { overflow-x: auto }
svg text { font: 11px system-ui, sans-serif }
"""


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
        return f"{shown:z.0f}" if whole else f"{shown:z.3g}"

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


def check_target(path: pathlib.Path) -> None:
    """Raises UsageError unless `path` ends in .png or .html, and BitladderError if matplotlib is missing for a PNG."""
    if path.suffix.lower() not in (".png", ".html"):
        raise UsageError(f"--plot {path}: name a file that ends in .png or .html")
    if path.suffix.lower() == ".png":
        _matplotlib("figure")


def write_plot(
    path: pathlib.Path,
    figures: FigureMap,
    heading: str,
    rows: Sequence[FigureRow],
    columns: Sequence[FigureColumn],
    notes: Sequence[str],
) -> None:
    """Draws the map to a .png, or to a .html page with the gaps and the table below it.

    Parameters:
        path: the file.
        figures: the map.
        heading: what it is of.
        rows: rows of the table.
        columns: columns of the table.
        notes: the gaps, a line each.

    Raises:
        UsageError: the file's name has another ending.
        BitladderError: a PNG needs matplotlib, or the file cannot be written.
    """
    check_target(path)
    if path.suffix.lower() == ".png":
        _write_png(path, figures, heading)
    else:
        write_text(path, page(figures, heading, rows, columns, notes))


def page(
    figures: FigureMap, heading: str, rows: Sequence[FigureRow], columns: Sequence[FigureColumn], notes: Sequence[str]
) -> str:
    """The HTML page. It has no script and loads nothing."""
    heading = html.escape(heading)
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{heading}</h1>\n"
        f"<h2>{html.escape(figures.title())}</h2>\n<p>Colours {html.escape(figures.legend())}.</p>\n"
        f'<div class="wide">{svg(figures)}</div>\n'
        f"<h2>Gaps</h2>\n{f'<ul>{listed}</ul>' if notes else '<p>None found.</p>'}\n"
        f'<h2>Figures</h2>\n<div class="wide">{_table(rows, columns)}</div>\n</body></html>\n'
    )


def svg(figures: FigureMap) -> str:
    """The map as an SVG element. A cell says its place and value when it is pointed at."""
    width = _MARGIN + _CELL_WIDTH * len(figures.kinds)
    height = _HEAD + _CELL_HEIGHT * len(figures.layers)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img">']
    for i, kind in enumerate(figures.kinds):
        parts.append(_text(_MARGIN + (i + 0.5) * _CELL_WIDTH, _HEAD - 8, kind, "#222"))
    for j, (layer, row) in enumerate(zip(figures.layers, figures.values, strict=True)):
        label, top = (DASH if layer is None else str(layer)), _HEAD + j * _CELL_HEIGHT
        parts.append(_text(_MARGIN / 2, top + 14, label, "#222"))
        for i, (kind, value) in enumerate(zip(figures.kinds, row, strict=True)):
            if value is None:
                continue
            colour, left = figures.colour(value), _MARGIN + i * _CELL_WIDTH
            parts.append(
                f'<g><title>{html.escape(kind)}, layer {label}: {figures.column.cell(value)}</title><rect x="{left}" '
                f'y="{top}" width="{_CELL_WIDTH - 1}" height="{_CELL_HEIGHT - 1}" fill="rgb{colour}"/>'
                f"{_text(left + _CELL_WIDTH / 2, top + 14, figures.short(value), f'rgb{text_colour(colour)}')}</g>"
            )
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, fill: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" fill="{fill}">{html.escape(text)}</text>'


def _table(rows: Sequence[FigureRow], columns: Sequence[FigureColumn]) -> str:
    head = "".join(f"<th{_class(column)}>{html.escape(column.heading)}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td{_class(c)}>{html.escape(c.cell(getattr(row, c.name)))}</td>" for c in columns) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _class(column: FigureColumn) -> str:
    return ' class="name"' if column.name == "kind" else ""


def _matplotlib(module: str) -> Any:
    # By name, so that neither the command line nor the type checker needs it.
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise BitladderError(
            "a PNG needs matplotlib: install it (pip install 'bitladder[plot]'), or name a file that ends in .html"
        ) from error


def _write_png(path: pathlib.Path, figures: FigureMap, heading: str) -> None:
    colours = _matplotlib("colors")
    values = np.array([[np.nan if v is None or not math.isfinite(v) else v for v in row] for row in figures.values])
    least, most = (v * (100 if figures.column.percent else 1) for v in figures.span())
    if figures.column.percent:
        values *= 100
    logarithmic = figures.column.scale == "log" and most > least > 0
    if logarithmic:
        values = np.maximum(values, least)
    scale = (colours.LogNorm if logarithmic else colours.Normalize)(least, most)
    kinds, layers = len(figures.kinds), len(figures.layers)
    # A figure without pyplot: no display, and no global state.
    figure = _matplotlib("figure").Figure(figsize=(2.5 + 0.7 * kinds, 2 + 0.2 * layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        values, aspect="auto", norm=scale, cmap="RdBu_r" if figures.column.scale == "signed" else "viridis"
    )
    axes.set_xticks(range(kinds), figures.kinds, rotation=45, ha="right")
    axes.set_yticks(range(layers), [DASH if layer is None else str(layer) for layer in figures.layers])
    axes.set_ylabel("layer")
    axes.set_title(f"{heading}\n{figures.title()}", fontsize="medium")
    figure.colorbar(image, ax=axes)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
