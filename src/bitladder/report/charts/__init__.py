"""Charts as values: each is a figure of plotly.js (data and layout). Nothing is drawn here.

Colours are names such as "@rung". The page replaces them by the colours of its light or dark theme.
"""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.report.charts.bars import percentiles, speed, task_bars
    from bitladder.report.charts.pareto import pareto
    from bitladder.report.charts.predicted import agreement, predicted, prediction_pairs

__all__ = ["agreement", "pareto", "percentiles", "predicted", "prediction_pairs", "speed", "task_bars"]
open_door(__name__)
