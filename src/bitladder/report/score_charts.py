"""Charts of what models score: benchmarks, percentiles of the divergence, and speed against size."""

import html

from bitladder.evaluate import Figure, RunScores
from bitladder.report.chart import LOOKS, Chart, axis, errors, figure
from bitladder.report.finished_run import FinishedRun, RunModel
from bitladder.report.tables import gigabytes, label, with_error

ROW, FRAME = 26, 120  # height of a row and of what surrounds the rows, pixels
# Field of a divergence, its name, colour and symbol.
PERCENTILES = (
    ("p10", "10 %", "@seq1", "triangle-right"),
    ("median", "median", "@seq2", "line-ns-open"),
    ("value", "mean", "@rung", "circle"),
    ("p90", "90 %", "@seq3", "triangle-left"),
    ("p99", "99 %", "@seq4", "diamond"),
    ("p999", "99.9 %", "@seq5", "square"),
    ("max", "max", "@seq6", "x"),
)


def task_bars(run: FinishedRun, name: str) -> Chart:
    """The accuracy in a task in percent ("average": of the five benchmarks). A line shows what guessing gets."""
    models = [model for model in run.models if _accuracy(model.scores, name)]
    data = []
    for role in ("base", "rung", "naive", "third-party"):
        shown = [model for model in models if model.role == role]
        if shown:
            data.append(_bars(shown, role, name))
    chance = next((model.scores.tasks[name].chance for model in models if name in model.scores.tasks), None)
    if chance is not None:
        data.append(_guessing(100 * chance, [label(model) for model in models]))
    return figure(
        data,
        x=axis("correct answers, %", rangemode="tozero"),
        y=_models_axis(models),
        height=FRAME + ROW * len(models),
        bargap=0.35,
        barmode="overlay",
    )


def _bars(models: list[RunModel], role: str, name: str) -> Chart:
    legend, colour, _ = LOOKS.get(role, ("full precision", "@muted", ""))
    figures = [accuracy for model in models if (accuracy := _accuracy(model.scores, name))]
    return {
        "type": "bar",
        "orientation": "h",
        "name": legend,
        "y": [label(model) for model in models],
        "x": [100 * accuracy.value for accuracy in figures],
        "error_x": {**errors(figures, "@text"), "array": [100 * accuracy.error for accuracy in figures]},
        "marker": {"color": colour},
        "hovertext": [
            f"{html.escape(model.label)}: {with_error(accuracy, 100)} %"
            for model, accuracy in zip(models, figures, strict=True)
        ],
        "hoverinfo": "text",
    }


def percentiles(run: FinishedRun) -> Chart | None:
    """Percentiles of the KLD over tokens, a row for each model; None if no model has a KLD."""
    models = [model for model in run.quants if model.scores.kld]
    if not models:
        return None
    data: list[Chart] = []
    seen: list[float] = []
    for field, name, colour, symbol in PERCENTILES:
        points = [(model, value) for model in models if (value := getattr(model.scores.kld, field)) > 0]
        seen += [value for _, value in points]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": [value for _, value in points],
                "y": [label(model) for model, _ in points],
                "hovertext": [f"{html.escape(model.label)}: {name} {value:.4g}" for model, value in points],
                "hoverinfo": "text",
                "marker": {"color": colour, "symbol": symbol, "size": 9, "line": {"color": colour, "width": 2}},
            }
        )
    return figure(
        data, x=axis("KLD in nats", seen), y=_models_axis(models), height=FRAME + ROW * len(models), showlegend=True
    )


def _models_axis(models: list[RunModel]) -> Chart:
    """An axis of models by size, the smallest on top."""
    names = [label(model) for model in models]
    return {"type": "category", "categoryorder": "array", "categoryarray": names[::-1], "dtick": 1}


def _accuracy(scores: RunScores, name: str) -> Figure | None:
    if name == "average":
        return scores.average()
    return scores.tasks[name].accuracy if name in scores.tasks else None


def _guessing(share: float, names: list[str]) -> Chart:
    """A line at what guessing gets."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"guessing, {share:.3g} %",
        "x": [share] * len(names),
        "y": names,
        "line": {"color": "@text", "width": 2, "dash": "dash"},
        "hoverinfo": "skip",
    }


def speed(run: FinishedRun, test: str) -> Chart:
    """Tokens per second of a test against the size of the file, with error bars."""
    models = [model for model in [*run.quants, run.base] if model.scores.speed(test)]
    data = [_speeds(models, role, test) for role in ("base", "rung", "naive", "third-party")]
    sizes = [model.scores.bytes / 1e9 for model in models]
    return figure(
        [trace for trace in data if trace["x"]],
        x=axis("size in GB", sizes),
        y=axis(f"tokens/s ({test})", rangemode="tozero"),
    )


def _speeds(models: list[RunModel], role: str, test: str) -> Chart:
    name, colour, symbol = LOOKS.get(role, ("full precision", "@muted", "star"))
    shown = [(model, value) for model in models if model.role == role and (value := model.scores.speed(test))]
    return {
        "type": "scatter",
        "mode": "markers+text" if role in ("rung", "base") else "markers",
        "name": name,
        "x": [model.scores.bytes / 1e9 for model, _ in shown],
        "y": [value.value for _, value in shown],
        "error_y": errors([value for _, value in shown], colour),
        "text": [model.label for model, _ in shown],
        "textposition": "top center",
        "textfont": {"size": 11, "color": "@text"},
        "hovertext": [
            f"<b>{html.escape(model.label)}</b><br>{gigabytes(model.scores.bytes)} GB<br>{with_error(value)} tokens/s"
            for model, value in shown
        ],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 10},
        "cliponaxis": False,
    }
