"""Predicted against measured divergence: how far a plan can be trusted."""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.report.charts.common import LOOKS, Chart, axis, describe, errors, figure
from bitladder.report.charts.pareto import told
from bitladder.report.numbers import Figure
from bitladder.report.rundir import Run


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prediction and the measurement, nats per token; `group` is "rung" or "candidate", `told` for hovering."""

    group: str
    label: str
    predicted: float
    measured: Figure
    told: str


@dataclasses.dataclass(frozen=True)
class Agreement:
    """`ranks` is Spearman's correlation; `ratio` the median of measured / predicted, `spread` its 10th and 90th %."""

    count: int
    ranks: float
    ratio: float
    spread: tuple[float, float]


def pairs(run: Run) -> list[Pair]:
    """All that was predicted and measured, with positive figures (others have no place on a logarithmic axis)."""
    found = [
        Pair("candidate", f"{one.rung}: {one.name}", one.predicted_kld, one.kld, told(one))
        for one in (run.candidates.candidates if run.candidates else [])
        if one.kld and one.predicted_kld is not None
    ]
    found += [
        Pair("rung", one.label, one.scores.predicted_kld, one.scores.kld, describe(one))
        for one in run.rungs
        if one.scores.kld and one.scores.predicted_kld is not None
    ]
    return [pair for pair in found if pair.predicted > 0 and pair.measured.value > 0]


def predicted(found: list[Pair]) -> Chart | None:
    """The chart; None without pairs."""
    if not found:
        return None
    values = [pair.predicted for pair in found] + [pair.measured.value for pair in found]
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
    data = [line, *(_trace(found, group) for group in ("candidate", "rung") if any(p.group == group for p in found))]
    return figure(data, x=axis("predicted KLD, nats per token", values), y=axis("measured KLD", values))


def _trace(found: list[Pair], group: str) -> Chart:
    name, colour, symbol = LOOKS[group]
    shown = [pair for pair in found if pair.group == group]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [pair.predicted for pair in shown],
        "y": [pair.measured.value for pair in shown],
        "error_y": errors([pair.measured for pair in shown], colour),
        "hovertext": [pair.told for pair in shown],
        "hoverinfo": "text",
        "marker": {"color": colour, "symbol": symbol, "size": 9},
    }


def agreement(found: list[Pair]) -> Agreement | None:
    """How well predictions fit; None for fewer than three pairs, of which nothing can be said."""
    if len(found) < 3:
        return None
    said = np.array([pair.predicted for pair in found])
    seen = np.array([pair.measured.value for pair in found])
    low, middle, high = np.percentile(seen / said, [10, 50, 90])
    correlation = np.corrcoef(_ranks(said), _ranks(seen))[0, 1] if said.std() and seen.std() else float("nan")
    return Agreement(len(found), float(correlation), float(middle), (float(low), float(high)))


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    ordered = np.sort(values)
    first = np.searchsorted(ordered, values, "left")
    last = np.searchsorted(ordered, values, "right") - 1
    ranks: npt.NDArray[np.float64] = (first + last) / 2
    return ranks
