"""The map of a figure as a picture: PNG by matplotlib, or an HTML page with SVG that needs nothing else."""

import html
import importlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from bitladder.errors import BitladderError, UsageError
from bitladder.files import replacing, write_text
from bitladder.show.imatrix.heatmap import FigureMap, text_colour
from bitladder.show.imatrix.tables import DASH, FigureColumn, FigureRow

_CELL_WIDTH, _CELL_HEIGHT, _MARGIN, _HEAD = 92, 20, 48, 40
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em }
body { color: #222; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15em .6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
.name { text-align: left } .wide { overflow-x: auto }
svg text { font: 11px system-ui, sans-serif }
"""


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
