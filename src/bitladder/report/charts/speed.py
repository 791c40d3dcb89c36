"""Speed against size."""

import html

from bitladder.report.charts.common import LOOKS, Chart, axis, errors, figure
from bitladder.report.numbers import gigabytes, with_error
from bitladder.report.rundir import Measured, Run


def speed(run: Run, test: str) -> Chart:
    """Tokens per second of a test against the size of the file, with ±."""
    models = [one for one in [*run.quants, run.base] if one.scores.speed(test)]
    data = [_trace(models, role, test) for role in ("base", "rung", "naive", "third-party")]
    sizes = [one.scores.bytes / 1e9 for one in models]
    return figure(
        [trace for trace in data if trace["x"]],
        x=axis("size in GB", sizes),
        y=axis(f"tokens/s ({test})", rangemode="tozero"),
    )


def _trace(models: list[Measured], role: str, test: str) -> Chart:
    name, colour, symbol = LOOKS.get(role, ("full precision", "@muted", "star"))
    shown = [(one, found) for one in models if one.role == role and (found := one.scores.speed(test))]
    return {
        "type": "scatter",
        "mode": "markers+text" if role in ("rung", "base") else "markers",
        "name": name,
        "x": [one.scores.bytes / 1e9 for one, _ in shown],
        "y": [found.value for _, found in shown],
        "error_y": errors([found for _, found in shown], colour),
        "text": [one.label for one, _ in shown],
        "textposition": "top center",
        "textfont": {"size": 11, "color": "@text"},
        "hovertext": [
            f"<b>{html.escape(one.label)}</b><br>{gigabytes(one.scores.bytes)} GB<br>{with_error(found)} tokens/s"
            for one, found in shown
        ],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 10},
        "cliponaxis": False,
    }
