"""Charts of what was measured: divergence against size and against its prediction, benchmarks, percentiles and speed.

Through a chart of divergence a line leads that has the files that are worth their size.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.evaluate import Figure, RunScores
from bitladder.report.best import worth_their_size
from bitladder.report.chart import LOOKS, Chart, axis, describe, errors, figure
from bitladder.report.finished_run import FinishedRun, ReportedRecipe, RunModel
from bitladder.report.tables import count_text, gigabytes, label, with_error

# Powers of ten. Sizes that differ by less, as those of a rung and its preset, would stand between two ticks of an axis.
NARROW = 0.0008
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


def pareto(run: FinishedRun) -> Chart | None:
    """The chart; None if no divergence was measured. The `meta` of a trace names its group.

    Candidates that were measured on another text have an axis of their own, and are hidden at first.
    """
    quants = [model for model in run.quants if model.scores.kld]
    tried = [recipe for recipe in run.tried.candidates if recipe.kld] if run.tried else []
    if not quants:
        return None
    apart = run.other_text is not None
    data = [_candidates(tried) | ({"yaxis": "y2", "visible": False} if apart else {})] if tried else []
    data.append(_front(quants))
    data += [_models(quants, role) for role in ("naive", "third-party", "rung") if any(q.role == role for q in quants)]
    sizes = [model.scores.bytes / 1e9 for model in quants] + [recipe.bytes / 1e9 for recipe in tried]
    losses = [model.scores.kld.value for model in quants if model.scores.kld]
    others = [recipe.kld.value for recipe in tried if recipe.kld]
    losses += [] if apart else others
    # Labels stand to the left of their dots, so the leftmost one needs room. The range is in powers of ten.
    least, most = math.log10(min(sizes)), math.log10(max(sizes))
    if most - least < NARROW:
        least, most = least - NARROW, most + NARROW
    span = most - least
    return figure(
        data,
        x=axis("size in GB", sizes, range=[least - 0.18 * span, most + 0.06 * span]),
        y=axis("mean KLD in nats per token", losses),
        height=480,
        y2=axis("KLD of candidates, on their text", others) if apart else None,
    )


def _models(quants: Sequence[RunModel], role: str) -> Chart:
    name, colour, symbol = LOOKS[role]
    models = [model for model in quants if model.role == role]
    losses = [model.scores.kld for model in models if model.scores.kld]
    return {
        "type": "scatter",
        "mode": "markers+text" if role == "rung" else "markers",
        "name": name,
        "meta": role,
        "x": [model.scores.bytes / 1e9 for model in models],
        "y": [loss.value for loss in losses],
        "error_y": errors(losses, colour),
        "text": [model.label for model in models],
        "textposition": "bottom left",
        "textfont": {"size": 11, "color": "@text"},
        "hovertext": [describe(model) for model in models],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 10, "line": {"color": "@paper", "width": 1}},
        "cliponaxis": False,
    }


def _front(quants: Sequence[RunModel]) -> Chart:
    """Steps through the models that are better than every smaller one."""
    labels = worth_their_size([(model.label, model.scores) for model in quants])
    models = [model for model in sorted(quants, key=lambda model: model.size_order) if model.label in labels]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "better than every smaller file",
        "meta": "front",
        "x": [model.scores.bytes / 1e9 for model in models],
        "y": [model.scores.kld.value for model in models if model.scores.kld],
        "line": {"color": "@muted", "width": 1.5, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _candidates(tried: Sequence[ReportedRecipe]) -> Chart:
    name, colour, symbol = LOOKS["candidate"]
    losses = [recipe.kld for recipe in tried if recipe.kld]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "meta": "candidate",
        "x": [recipe.bytes / 1e9 for recipe in tried],
        "y": [loss.value for loss in losses],
        "error_y": errors(losses, colour),
        "hovertext": [describe_tried(recipe) for recipe in tried],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 7},
    }


def describe_tried(candidate: ReportedRecipe) -> str:
    """The text for hovering over a candidate."""
    lines = [
        f"<b>{html.escape(candidate.name)}</b> for {html.escape(candidate.rung)}" + (", chosen" * candidate.chosen),
        f"{gigabytes(candidate.bytes)} GB" + (f", {candidate.bpw:.2f} bits per weight" if candidate.bpw else ""),
    ]
    if candidate.kld:
        lines.append(f"KLD {with_error(candidate.kld)}")
    if candidate.predicted_kld is not None:
        lines.append(f"predicted {candidate.predicted_kld:.4g}")
    if candidate.types:
        lines.append(html.escape(count_text(candidate.types)))
    return "<br>".join(lines)


@dataclasses.dataclass(frozen=True)
class PredictionPair:
    """A prediction and its measurement.

    Parameters:
        group: "rung" or "candidate".
        label: the name of the recipe.
        predicted: predicted KLD, nats per token.
        measured: measured KLD, nats per token.
        description: the text for hovering.
    """

    group: str
    label: str
    predicted: float
    measured: Figure
    description: str


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well predictions fit measurements.

    Parameters:
        count: number of pairs.
        ranks: Spearman's rank correlation.
        ratio: median of measured / predicted.
        spread: 10th and 90th percentile of measured / predicted.
    """

    count: int
    ranks: float
    ratio: float
    spread: tuple[float, float]


def prediction_pairs(run: FinishedRun) -> list[PredictionPair]:
    """The recipes that were predicted and measured, all on one text: that of the candidates, if there are some.

    A logarithmic axis has room for positive figures only.
    """
    pairs = [
        PredictionPair(
            "candidate",
            f"{candidate.rung}: {candidate.name}",
            candidate.predicted_kld,
            candidate.kld,
            describe_tried(candidate),
        )
        for candidate in (run.tried.candidates if run.tried else [])
        if candidate.kld and candidate.predicted_kld is not None
    ]
    if not (pairs and run.other_text):
        pairs += [
            PredictionPair("rung", rung.label, rung.scores.predicted_kld, rung.scores.kld, describe(rung))
            for rung in run.rungs
            if rung.scores.kld and rung.scores.predicted_kld is not None
        ]
    return [pair for pair in pairs if pair.predicted > 0 and pair.measured.value > 0]


def predicted(pairs: list[PredictionPair]) -> Chart | None:
    """The chart; None without pairs."""
    if not pairs:
        return None
    values = [pair.predicted for pair in pairs] + [pair.measured.value for pair in pairs]
    ends = [min(values), max(values)]
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "as predicted",
        "x": ends,
        "y": ends,
        "line": {"color": "@muted", "dash": "dot", "width": 1.5},
        "hoverinfo": "skip",
    }
    data = [
        line,
        *(_trace(pairs, group) for group in ("candidate", "rung") if any(pair.group == group for pair in pairs)),
    ]
    return figure(data, x=axis("predicted KLD, nats per token", values), y=axis("measured KLD", values))


def _trace(pairs: list[PredictionPair], group: str) -> Chart:
    name, colour, symbol = LOOKS[group]
    shown = [pair for pair in pairs if pair.group == group]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [pair.predicted for pair in shown],
        "y": [pair.measured.value for pair in shown],
        "error_y": errors([pair.measured for pair in shown], colour),
        "hovertext": [pair.description for pair in shown],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 9},
    }


def agreement(pairs: list[PredictionPair]) -> Agreement | None:
    """How well predictions fit; None for fewer than three pairs."""
    if len(pairs) < 3:
        return None
    forecast = np.array([pair.predicted for pair in pairs])
    measured = np.array([pair.measured.value for pair in pairs])
    low, middle, high = np.percentile(measured / forecast, [10, 50, 90])
    varied = forecast.std() and measured.std()
    correlation = np.corrcoef(_ranks(forecast), _ranks(measured))[0, 1] if varied else float("nan")
    return Agreement(len(pairs), float(correlation), float(middle), (float(low), float(high)))


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0. Equal values have the mean of their ranks."""
    ordered = np.sort(values)
    first = np.searchsorted(ordered, values, "left")
    last = np.searchsorted(ordered, values, "right") - 1
    ranks: npt.NDArray[np.float64] = (first + last) / 2
    return ranks


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
