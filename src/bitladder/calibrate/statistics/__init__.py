"""What an importance matrix says of a model: figures by tensor, layer and kind, gaps, and how two of them differ."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.calibrate.statistics.compare_imatrices import (
        ImatrixComparison,
        TensorDifference,
        compare_imatrices,
        grouped_differences,
    )
    from bitladder.calibrate.statistics.figures import (
        GroupStatistics,
        TensorStatistics,
        by_kind,
        by_layer,
        tensor_statistics,
        weighted_mean,
    )
    from bitladder.calibrate.statistics.gaps import Gaps, find_gaps, listed

__all__ = [
    "Gaps",
    "GroupStatistics",
    "ImatrixComparison",
    "TensorDifference",
    "TensorStatistics",
    "by_kind",
    "by_layer",
    "compare_imatrices",
    "find_gaps",
    "grouped_differences",
    "listed",
    "tensor_statistics",
    "weighted_mean",
]
open_door(__name__)
