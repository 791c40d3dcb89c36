"""What the charts have in common: looks by role, logarithmic axes with round ticks, and texts for hovering.

A chart is a figure of plotly.js as a value: data and layout. Nothing is drawn here. Colours are names such as "@rung".
The page replaces them by the colours of its light or dark theme.
"""

import collections
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from bitladder.evaluate import Figure
from bitladder.gguf import kind_of, reading_order
from bitladder.recipe import Recipe
from bitladder.report.finished_run import RunModel
from bitladder.report.tables import gigabytes, with_error
from bitladder.units import number_of

Chart = dict[str, Any]
# Role → name in the legend, colour and symbol. Groups differ by symbol too, for readers who cannot tell the colours.
LOOKS = {
    "rung": ("rungs", "@rung", "circle"),
    "naive": ("plain presets", "@naive", "diamond"),
    "third-party": ("by others", "@other", "square"),
    "candidate": ("candidates", "@candidate", "circle-open"),
}


def figure(
    data: Sequence[Chart], *, x: Chart, y: Chart, y2: Chart | None = None, height: int = 420, **layout: Any
) -> Chart:
    """A figure of plotly.js with the common looks. `y2` is a second axis, at the right."""
    if y2:
        layout["yaxis2"] = _axis({"overlaying": "y", "side": "right", "showgrid": False, **y2})
    return {
        "data": list(data),
        "layout": {
            "height": height,
            "margin": {"l": 64, "r": 16, "t": 24, "b": 52},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": "@text", "size": 13, "family": "system-ui, sans-serif"},
            "hoverlabel": {"align": "left", "bgcolor": "@paper", "bordercolor": "@text", "font": {"color": "@text"}},
            "hovermode": "closest",
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "@muted", "activecolor": "@text"},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "xaxis": _axis(x),
            "yaxis": _axis(y),
            **layout,
        },
    }


def axis(title: str, values: Iterable[float] = (), **more: Any) -> Chart:
    """An axis with its title. With `values` it is logarithmic and has round ticks for their span."""
    properties: Chart = {"title": {"text": title}, **more}
    positive = [value for value in values if value > 0]
    if positive:
        ticks = log_ticks(min(positive), max(positive))
        properties |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return properties


def _axis(properties: Chart) -> Chart:
    return {"gridcolor": "@grid", "zerolinecolor": "@grid", "linecolor": "@grid", "automargin": True, **properties}


def log_ticks(least: float, most: float) -> list[float]:
    """Round numbers for a logarithmic axis, more of them if the span is short.

    They begin a decade below the least value and end a decade above the largest, for readers who zoom out.

    Example:
        >>> log_ticks(1.0, 50.0)
        [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]
    """
    ratio = most / least
    if ratio < 1.2:  # no round mantissa is within: even steps, which look even on so short a part of the axis
        step = 10.0 ** math.floor(math.log10(max(most - least, most / 1000)))
        middle = round((least + most) / 2 / step)
        return [float(f"{number * step:.6g}") for number in range(max(1, middle - 12), middle + 13)]
    if ratio < 3:
        mantissas: tuple[float, ...] = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    elif ratio < 12:
        mantissas = (1, 1.5, 2, 3, 4, 5, 6, 8)
    elif ratio < 1000:
        mantissas = (1, 2, 5)
    else:
        mantissas = (1,)
    first, last = math.floor(math.log10(least)) - 1, math.floor(math.log10(most)) + 1
    return [float(f"{mantissa}e{power}") for power in range(first, last + 1) for mantissa in mantissas]


def errors(figures: Sequence[Figure], colour: str) -> Chart:
    """Error bars of one standard error."""
    return {"type": "data", "array": [value.error for value in figures], "color": colour, "thickness": 1.2, "width": 3}


def describe(model: RunModel) -> str:
    """The text for hovering over a model: size, KLD, and its types by kind."""
    scores = model.scores
    lines = [f"<b>{html.escape(model.label)}</b>", f"{gigabytes(scores.bytes)} GB, {scores.bpw:.2f} bits per weight"]
    if scores.kld:
        lines.append(f"KLD {with_error(scores.kld)}")
    if scores.predicted_kld is not None:
        lines.append(f"predicted {scores.predicted_kld:.4g}")
    if scores.source:
        lines.append(f"from {html.escape(scores.source)}")
    return "<br>".join(lines + (recipe_lines(model.recipe) if model.recipe else []))


def recipe_lines(recipe: Recipe, most: int = 12) -> list[str]:
    """A recipe with a line for each kind, such as "ffn_down: 20 q4_K, 10 q6_K". Tensors in F32 are left out."""
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name in sorted(recipe.tensors, key=reading_order):
        if recipe.tensors[name].lower() != "f32":
            kinds[kind_of(name)][recipe.tensors[name]] += 1
    lines = []
    for kind, counts in kinds.items():
        alone = counts.total() == 1
        types = ", ".join(name if alone else f"{count} {name}" for name, count in counts.most_common())
        lines.append(html.escape(f"{kind}: {types}"))
    return [*lines[:most], f"… and {number_of(len(lines) - most, 'more kind')}"] if len(lines) > most else lines
