"""Whether a file's weights are those of the base, rounded. This is the surest sign of another checkpoint.

Some rows of every matrix are expanded and compared with those of the base. The distance is compared with the distance
that the stock kernel makes when it rounds the same rows of the base to the same type. An importance matrix or error
feedback increases the distance by tens of percent. Another checkpoint increases it by a multiple, unless the type is so
coarse, or the checkpoint so near, that rounding hides the difference. So each kind and type is judged by itself: nearly
all quants have some tensors in 6 or 8 bits. No quantizer rounds norms, so they show even a near checkpoint.
"""

import collections
import dataclasses
import math

import numpy as np
import numpy.typing as npt

from bitladder.compare.structure import OriginFinding
from bitladder.engine import RowKernels, TensorType
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo, kind_of

Floats = npt.NDArray[np.float32]

ROWS = 32  # rows of each matrix, evenly spread
# A distance of more than this many times that of rounding is no rounding. Over all kinds and types the ratio was at
# most 1.1 with an imatrix and 1.5 with blocks chosen for the output; after ten steps of training it was 3.7 in q6_K and
# 11.7 in q8_0.
LIMIT = 2.0
# Relative error of storage as BF16 (8 bits of mantissa), root mean square and largest. One of two makers may have
# started from a BF16 copy.
STORAGE, VECTOR_LIMIT = 2**-9 / math.sqrt(3), 2**-9


@dataclasses.dataclass
class Distance:
    """Squares summed over rows.

    Parameters:
        actual: squared distance of the file from the base.
        rounded: squared distance of the rounded base from the base.
        size: squares of the base.

    Example:
        >>> Distance(actual=4.0, rounded=1.0, size=100.0).ratio
        2.0
    """

    actual: float = 0.0
    rounded: float = 0.0
    size: float = 0.0

    @property
    def ratio(self) -> float:
        """The distance as a multiple of that of plain rounding."""
        return self.share / self.expected if self.expected else 1.0

    @property
    def share(self) -> float:
        """The distance as a share of the weights' size."""
        return math.sqrt(self.actual / self.size) if self.size else 0.0

    @property
    def expected(self) -> float:
        """The share that plain rounding makes; at least that of storage in 16 bits."""
        return max(math.sqrt(self.rounded / self.size), STORAGE) if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class WeightDistances:
    """Distances of a file from the base: of matrices by kind and type, of vectors (norms, biases) by kind."""

    matrices: dict[tuple[str, str], Distance]
    vectors: dict[str, Distance]

    @property
    def whole(self) -> Distance:
        """The distance over all matrices."""
        parts = self.matrices.values()
        return Distance(
            sum(part.actual for part in parts), sum(part.rounded for part in parts), sum(part.size for part in parts)
        )


def check_weights(base: GgufFile, model: GgufFile, threads: int | None = None) -> list[OriginFinding]:
    """Signs that a file's weights are not those of the base, rounded; empty if there are none."""
    return judge(distances(base, model, threads))


def distances(base: GgufFile, model: GgufFile, threads: int | None = None) -> WeightDistances:
    """Measures ROWS rows of every tensor that both files have in the same shape."""
    result = WeightDistances(collections.defaultdict(Distance), collections.defaultdict(Distance))
    kernels = RowKernels(threads)
    try:
        for name, ours in base.tensors.items():
            theirs = model.tensors.get(name)
            if theirs is None or theirs.shape != ours.shape:
                continue
            rows = _rows(ours)
            here, there = (_read(file, tensor, rows, kernels) for file, tensor in ((base, ours), (model, theirs)))
            kind = kind_of(name)
            if len(ours.shape) == 1:
                _add(result.vectors[kind], here, there, here)
                continue
            rounded = _round(here, theirs.type, kernels)
            if rounded is not None:
                _add(result.matrices[kind, theirs.type.name], here, there, rounded)
    finally:
        kernels.close()
    return result


def judge(measured: WeightDistances) -> list[OriginFinding]:
    """The signs of another checkpoint in some distances."""
    signs = []
    far = {key: distance for key, distance in measured.matrices.items() if not distance.ratio <= LIMIT}
    if far:
        (kind, type_name), farthest = max(far.items(), key=lambda item: item[1].ratio)
        signs.append(
            OriginFinding(
                "sign",
                "weights",
                f"its weights are not rounded weights of the base: {kind} in {type_name} differs by "
                f"{farthest.share:.2%}, and rounding to that type gives {farthest.expected:.2%} ({len(far)} of "
                f"{len(measured.matrices)} kinds differ too much); it was made from another checkpoint, or changed on "
                "purpose",
            )
        )
    moved = {kind: norms.share for kind, norms in measured.vectors.items() if not norms.share <= VECTOR_LIMIT}
    if moved:
        kind = max(moved, key=lambda name: moved[name])
        signs.append(
            OriginFinding(
                "sign",
                "weights",
                f"norms or biases, which quantizers keep, differ from those of the base (mostly {kind}, by "
                f"{moved[kind]:.2%}): it was made from another checkpoint, or tuned afterwards",
            )
        )
    return signs


def _rows(tensor: TensorInfo) -> list[tuple[int, int]]:
    """Evenly spread spans of rows: of a large tensor, four spans of ROWS / 4 rows."""
    if tensor.rows <= ROWS:
        return [(0, tensor.rows)]
    step = ROWS // 4
    return [(start, start + step) for start in np.linspace(0, tensor.rows - step, 4, dtype=int).tolist()]


def _read(file: GgufFile, tensor: TensorInfo, spans: list[tuple[int, int]], kernels: RowKernels) -> Floats:
    data = np.concatenate([file.read(tensor, start, stop) for start, stop in spans])
    return kernels.dequantize(data, tensor.type, tensor.width)


def _round(rows: Floats, kind: TensorType, kernels: RowKernels) -> Floats | None:
    """Rows of the base as the stock kernel rounds them; None for a type that cannot be made."""
    # Types of two bits and fewer need an importance. With ones the kernel weights by the squares of the rows, as the
    # stock tool does without an imatrix.
    importance = np.ones(rows.shape[1], np.float32)
    try:
        return kernels.dequantize(kernels.quantize(rows, kind, importance), kind, rows.shape[1])
    except BitladderError:
        return None


def _add(to: Distance, base: Floats, model: Floats, rounded: Floats) -> None:
    to.actual += float(np.square(model - base, dtype=np.float64).sum())
    to.rounded += float(np.square(rounded - base, dtype=np.float64).sum())
    to.size += float(np.square(base, dtype=np.float64).sum())
