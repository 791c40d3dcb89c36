"""Charts of divergence: of everything that was measured against size, and measured against predicted.

A line leads through the files that are worth their size.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.evaluate import Figure
from bitladder.report.best import worth_their_size
from bitladder.report.chart import LOOKS, Chart, axis, describe, errors, figure
from bitladder.report.finished_run import FinishedRun, ReportedRecipe, RunModel
from bitladder.report.tables import count_text, gigabytes, with_error

# Powers of ten. Sizes that differ by less, as those of a rung and its preset, would stand between two ticks of an axis.
NARROW = 0.0008


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
