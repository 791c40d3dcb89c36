"""Charts with a row for each model: benchmarks, and the percentiles of the divergence."""

import html

from bitladder.report.charts.common import LOOKS, Chart, axis, errors, figure
from bitladder.report.numbers import Figure, with_error
from bitladder.report.rundir import Measured, Run
from bitladder.report.scores import Scores
from bitladder.report.tables import label

ROW = 26  # pixels
FRAME = 120
# Field of a divergence, its name, colour and symbol. Half of all tokens diverge less than the median, and so on.
PERCENTILES = (
    ("p10", "10 %", "@seq1", "triangle-right"),
    ("median", "median", "@seq2", "line-ns-open"),
    ("value", "mean", "@rung", "circle"),
    ("p90", "90 %", "@seq3", "triangle-left"),
    ("p99", "99 %", "@seq4", "diamond"),
    ("p999", "99.9 %", "@seq5", "square"),
    ("max", "max", "@seq6", "x"),
)


def task_bars(run: Run, name: str) -> Chart:
    """Accuracy in a benchmark ("average": of all) in percent; a line shows what guessing would get."""
    models = [one for one in [run.base, *run.quants] if _accuracy(one.scores, name)]
    data = []
    for role in ("base", "rung", "naive", "third-party"):
        shown = [one for one in models if one.role == role]
        if shown:
            data.append(_bars(shown, role, name))
    chance = next((one.scores.tasks[name].chance for one in models if name in one.scores.tasks), None)
    if chance is not None:
        data.append(_guessing(100 * chance, [label(one) for one in models]))
    return figure(
        data,
        x=axis("questions answered rightly, %", rangemode="tozero"),
        y=_models_axis(models),
        height=FRAME + ROW * len(models),
        bargap=0.35,
        barmode="overlay",
    )


def _bars(models: list[Measured], role: str, name: str) -> Chart:
    legend, colour, _ = LOOKS.get(role, ("full precision", "@muted", ""))
    figures = [found for one in models if (found := _accuracy(one.scores, name))]
    return {
        "type": "bar",
        "orientation": "h",
        "name": legend,
        "y": [label(one) for one in models],
        "x": [100 * one.value for one in figures],
        "error_x": {**errors(figures, "@text"), "array": [100 * one.error for one in figures]},
        "marker": {"color": colour},
        "hovertext": [
            f"{html.escape(one.label)}: {with_error(found, 100)} %" for one, found in zip(models, figures, strict=True)
        ],
        "hoverinfo": "text",
    }


def percentiles(run: Run) -> Chart | None:
    """Percentiles of the KLD over tokens, a row per model; None where they were not kept."""
    models = [one for one in run.quants if one.scores.kld and one.scores.kld.median is not None]
    if not models:
        return None
    data: list[Chart] = []
    seen: list[float] = []
    for field, name, colour, symbol in PERCENTILES:
        points = [(one, value) for one in models if (value := getattr(one.scores.kld, field)) is not None and value > 0]
        seen += [value for _, value in points]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [value for _, value in points],
                "y": [label(one) for one, _ in points],
                "hovertext": [f"{html.escape(one.label)}: {name} {value:.4g}" for one, value in points],
                "hoverinfo": "text",
                "marker": {"color": colour, "symbol": symbol, "size": 9, "line": {"color": colour, "width": 2}},
            }
        )
    return figure(
        data, x=axis("KLD in nats", seen), y=_models_axis(models), height=FRAME + ROW * len(models), showlegend=True
    )


def _models_axis(models: list[Measured]) -> Chart:
    """Models by size, the smallest on top."""
    names = [label(one) for one in models]
    return {"type": "category", "categoryorder": "array", "categoryarray": names[::-1], "dtick": 1}


def _accuracy(scores: Scores, name: str) -> Figure | None:
    if name == "average":
        return scores.average()
    return scores.tasks[name].accuracy if name in scores.tasks else None


def _guessing(share: float, names: list[str]) -> Chart:
    """A line at what guessing would get."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"guessing, {share:.3g} %",
        "x": [share] * len(names),
        "y": names,
        "line": {"color": "@text", "width": 2, "dash": "dash"},
        "hoverinfo": "skip",
    }
