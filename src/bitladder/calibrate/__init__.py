"""From texts to what guides quantization: the importance matrix, and second moments of inputs."""

from bitladder.calibrate.collect_imatrix import ImatrixResult, collect_imatrix
from bitladder.calibrate.collect_moments import MomentsResult, collect_moments
from bitladder.calibrate.imatrix import Imatrix, read_imatrix, write_imatrix
from bitladder.calibrate.moments.moments_file import MomentsFile

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
