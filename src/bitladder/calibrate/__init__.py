"""From texts to what guides quantization: the importance matrix, and second moments of inputs."""

from bitladder.calibrate.collect_imatrix import (
    IMATRIX,
    ImatrixOptions,
    ImatrixResult,
    collect_imatrix,
    merge_imatrices,
)
from bitladder.calibrate.collect_moments import (
    MOMENTS,
    MomentsOptions,
    MomentsResult,
    RoundingMomentsOptions,
    collect_for_rounding,
    collect_moments,
    merge_moments,
    model_sha256,
    usual_weighting,
)
from bitladder.calibrate.imatrix import Imatrix, ImatrixEntry, read_imatrix, write_imatrix, zeros_in
from bitladder.calibrate.inputs import MIN_CALIBRATION_CTX, watch_chunks
from bitladder.calibrate.moments import Moment, MomentsFile, MomentShape, Provenance, writing_moments
from bitladder.calibrate.unfinished import UnfinishedWork, job_key

__all__ = [
    "IMATRIX",
    "MIN_CALIBRATION_CTX",
    "MOMENTS",
    "Imatrix",
    "ImatrixEntry",
    "ImatrixOptions",
    "ImatrixResult",
    "Moment",
    "MomentShape",
    "MomentsFile",
    "MomentsOptions",
    "MomentsResult",
    "Provenance",
    "RoundingMomentsOptions",
    "UnfinishedWork",
    "collect_for_rounding",
    "collect_imatrix",
    "collect_moments",
    "job_key",
    "merge_imatrices",
    "merge_moments",
    "model_sha256",
    "read_imatrix",
    "usual_weighting",
    "watch_chunks",
    "write_imatrix",
    "writing_moments",
    "zeros_in",
]
