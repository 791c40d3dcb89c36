"""From texts to the importance matrix that guides quantization."""

from bitladder.calibrate.collect import ImatrixResult, collect_imatrix
from bitladder.calibrate.imatrix import Imatrix, read_imatrix, write_imatrix

__all__ = ["Imatrix", "ImatrixResult", "collect_imatrix", "read_imatrix", "write_imatrix"]
