"""From texts to what guides quantization: the importance matrix, and second moments of inputs."""

from bitladder.calibrate.collect import ImatrixResult, collect_imatrix
from bitladder.calibrate.imatrix import Imatrix, read_imatrix, write_imatrix
from bitladder.calibrate.moments import MomentsFile
from bitladder.calibrate.secondmoments import MomentsResult, collect_moments

__all__ = [
    "Imatrix",
    "ImatrixResult",
    "MomentsFile",
    "MomentsResult",
    "collect_imatrix",
    "collect_moments",
    "read_imatrix",
    "write_imatrix",
]
