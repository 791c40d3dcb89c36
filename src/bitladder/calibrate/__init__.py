"""From texts to what guides quantization: the importance matrix, and second moments of inputs."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.calibrate.collect_imatrix import (
        IMATRIX,
        ImatrixOptions,
        ImatrixResult,
        batches_at_once,
        collect_imatrix,
        merge_imatrices,
    )
    from bitladder.calibrate.collect_moments import (
        MomentsResult,
        RoundingMoments,
        RoundingMomentsOptions,
        collect_job,
        collect_moments,
        collect_text,
        job_for_rounding,
        join_texts,
        merge_moments,
    )
    from bitladder.calibrate.coverage import Gaps, expert_lines, find_gaps, first_lines, listed
    from bitladder.calibrate.gradients.fisher import FISHER, FisherOptions, fisher_costs
    from bitladder.calibrate.gradients.forward import TorchModel
    from bitladder.calibrate.gradients.torch_weights import Routed, weight_gradient
    from bitladder.calibrate.gradients.usable import (
        check_logits,
        require_torch,
        torch_threads,
        why_no_gradients,
    )
    from bitladder.calibrate.gradients.weighted_moments import GradientOptions, weighted_moments
    from bitladder.calibrate.imatrix import Imatrix, ImatrixEntry, read_imatrix, write_imatrix, zeros_in
    from bitladder.calibrate.input_figures import (
        GroupStatistics,
        ImatrixComparison,
        TensorDifference,
        TensorStatistics,
        by_kind,
        by_layer,
        compare_imatrices,
        grouped_differences,
        tensor_statistics,
        weighted_mean,
    )
    from bitladder.calibrate.inputs import MIN_CALIBRATION_CTX, decode_columns
    from bitladder.calibrate.moments.moments_file import Moment, MomentsFile, MomentsWriter, writing_moments
    from bitladder.calibrate.moments.positions import PositionOptions, position_weights
    from bitladder.calibrate.moments.schema import MomentShape, Provenance
    from bitladder.calibrate.moments.triangles import Correlations, LowRank, pack_triangle, triangle, unpack_triangle
    from bitladder.calibrate.moments_job import MOMENTS, MomentsJob, MomentsOptions, model_sha256, usual_weighting
    from bitladder.calibrate.unfinished import UnfinishedWork, job_key

__all__ = [
    "FISHER",
    "IMATRIX",
    "MIN_CALIBRATION_CTX",
    "MOMENTS",
    "Correlations",
    "FisherOptions",
    "Gaps",
    "GradientOptions",
    "GroupStatistics",
    "Imatrix",
    "ImatrixComparison",
    "ImatrixEntry",
    "ImatrixOptions",
    "ImatrixResult",
    "LowRank",
    "Moment",
    "MomentShape",
    "MomentsFile",
    "MomentsJob",
    "MomentsOptions",
    "MomentsResult",
    "MomentsWriter",
    "PositionOptions",
    "Provenance",
    "RoundingMoments",
    "RoundingMomentsOptions",
    "Routed",
    "TensorDifference",
    "TensorStatistics",
    "TorchModel",
    "UnfinishedWork",
    "batches_at_once",
    "by_kind",
    "by_layer",
    "check_logits",
    "collect_imatrix",
    "collect_job",
    "collect_moments",
    "collect_text",
    "compare_imatrices",
    "decode_columns",
    "expert_lines",
    "find_gaps",
    "first_lines",
    "fisher_costs",
    "grouped_differences",
    "job_for_rounding",
    "job_key",
    "join_texts",
    "listed",
    "merge_imatrices",
    "merge_moments",
    "model_sha256",
    "pack_triangle",
    "position_weights",
    "read_imatrix",
    "require_torch",
    "tensor_statistics",
    "torch_threads",
    "triangle",
    "unpack_triangle",
    "usual_weighting",
    "weight_gradient",
    "weighted_mean",
    "weighted_moments",
    "why_no_gradients",
    "write_imatrix",
    "writing_moments",
    "zeros_in",
]
open_door(__name__)
