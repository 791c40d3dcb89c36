"""What an importance matrix says of a model: figures per tensor, layer and kind, gaps, and how two of them differ."""

from bitladder.calibrate.statistics.compare_imatrices import Comparison, TensorDifference, compare
from bitladder.calibrate.statistics.figures import TensorStatistics, tensor_statistics
from bitladder.calibrate.statistics.gaps import Gaps, find_gaps
from bitladder.calibrate.statistics.groups import GroupStatistics, by_kind, by_layer

__all__ = [
    "Comparison",
    "Gaps",
    "GroupStatistics",
    "TensorDifference",
    "TensorStatistics",
    "by_kind",
    "by_layer",
    "compare",
    "find_gaps",
    "tensor_statistics",
]
