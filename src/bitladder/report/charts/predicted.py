"""Predicted against measured divergence: how well plans predict."""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.evaluate import Figure
from bitladder.report.charts.common import LOOKS, Chart, axis, describe, errors, figure
from bitladder.report.charts.pareto import describe_tried
from bitladder.report.finished_run import FinishedRun


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
