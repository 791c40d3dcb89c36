"""Whether a file's weights are the base's but for rounding: the surest sign of another checkpoint.

Some rows of every matrix are expanded and set beside the base's. Their distance is compared with that which the stock
kernel makes when it rounds the same rows of the base to the same type. An importance matrix or error feedback moves
weights farther than plain rounding, by tens of percent; another checkpoint moves them by a multiple, except where the
type is so coarse, or the checkpoint so near, that rounding hides it: so each kind and type is looked at by itself, as
nearly all quants have some tensors in 6 or 8 bits. Norms are not rounded by any quantizer, and show even a near one.
"""

import collections
import dataclasses
import math

import numpy as np
import numpy.typing as npt

from bitladder.compare.findings import Finding
from bitladder.engine.types import RowKernels, TensorType
from bitladder.errors import BitladderError
from bitladder.gguf.names import kind_of
from bitladder.gguf.reader import GgufFile, TensorInfo

Floats = npt.NDArray[np.float32]

ROWS = 32  # of each matrix, evenly spread
# Distances beyond so many times what rounding makes are not rounding. Seen of any kind and type: up to 1.1 with an
# imatrix, 1.5 where blocks were chosen for the output; ten steps of training away 3.7 in q6_K and 11.7 in q8_0.
LIMIT = 2.0
# Relative error of storage as BF16 (8 bits of mantissa), root mean square and largest: one maker may have started from
# a BF16 copy of what the other had in full.
STORAGE, VECTOR_LIMIT = 2**-9 / math.sqrt(3), 2**-9


@dataclasses.dataclass
class Distance:
    """Squared distances summed over rows: of the file from the base, of plain rounding from the base, and the base's
    own squares. `ratio` is the first over the second, as lengths.
    """

    actual: float = 0.0
    rounded: float = 0.0
    size: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times farther than plain rounding."""
        return self.share / self.expected if self.expected else 1.0

    @property
    def share(self) -> float:
        """The distance as a share of the weights' size."""
        return math.sqrt(self.actual / self.size) if self.size else 0.0

    @property
    def expected(self) -> float:
        """The share that plain rounding makes, or storage in 16 bits."""
        return max(math.sqrt(self.rounded / self.size), STORAGE) if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class WeightDistances:
    """Of a file from the base: matrices by kind and type ("attn_k", "q4_K"), and vectors (norms, biases) by kind."""

    matrices: dict[tuple[str, str], Distance]
    vectors: dict[str, Distance]

    @property
    def whole(self) -> Distance:
        """Over all matrices."""
        every = self.matrices.values()
        return Distance(
            sum(one.actual for one in every), sum(one.rounded for one in every), sum(one.size for one in every)
        )


def check_weights(base: GgufFile, model: GgufFile, threads: int | None = None) -> list[Finding]:
    """Signs that a file's weights are not the base's, rounded; empty if there are none."""
    return judge(distances(base, model, threads))


def distances(base: GgufFile, model: GgufFile, threads: int | None = None) -> WeightDistances:
    """Measure ROWS rows of every tensor that both have in the same shape."""
    found = WeightDistances(collections.defaultdict(Distance), collections.defaultdict(Distance))
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
                _add(found.vectors[kind], here, there, here)
                continue
            rounded = _round(here, theirs.type, kernels)
            if rounded is not None:
                _add(found.matrices[kind, theirs.type.name], here, there, rounded)
    finally:
        kernels.close()
    return found


def judge(found: WeightDistances) -> list[Finding]:
    """What distances say."""
    signs = []
    far = {key: one for key, one in found.matrices.items() if one.ratio > LIMIT}
    if far:
        (kind, type_name), one = max(far.items(), key=lambda item: item[1].ratio)
        signs.append(
            Finding(
                "sign",
                "weights",
                f"its weights are not the base's, rounded: {kind} in {type_name} is {one.share:.2%} away, and rounding "
                f"to that type makes {one.expected:.2%} ({len(far)} of {len(found.matrices)} kinds are too far); it "
                "was made from another checkpoint, or changed on purpose",
            )
        )
    moved = {kind: one.share for kind, one in found.vectors.items() if one.share > VECTOR_LIMIT}
    if moved:
        kind = max(moved, key=lambda name: moved[name])
        signs.append(
            Finding(
                "sign",
                "weights",
                f"norms or biases, which quantizers keep, differ from the base's (most of all {kind}, by "
                f"{moved[kind]:.2%}): it was made from another checkpoint, or tuned afterwards",
            )
        )
    return signs


def _rows(tensor: TensorInfo) -> list[tuple[int, int]]:
    """Spans of rows, spread evenly: of a large tensor 4 times ROWS / 4 rows."""
    if tensor.rows <= ROWS:
        return [(0, tensor.rows)]
    step = ROWS // 4
    return [(start, start + step) for start in np.linspace(0, tensor.rows - step, 4, dtype=int).tolist()]


def _read(file: GgufFile, tensor: TensorInfo, spans: list[tuple[int, int]], kernels: RowKernels) -> Floats:
    data = np.concatenate([file.read(tensor, start, stop) for start, stop in spans])
    return kernels.dequantize(data, tensor.type, tensor.width)


def _round(rows: Floats, kind: TensorType, kernels: RowKernels) -> Floats | None:
    """Rows of the base as the stock kernel rounds them; None for a type that cannot be made."""
    # Types of two bits and fewer ask for weights; the squares of the rows are the stock tool's own choice without any.
    importance = np.ones(rows.shape[1], np.float32)
    try:
        return kernels.dequantize(kernels.quantize(rows, kind, importance), kind, rows.shape[1])
    except BitladderError:
        return None


def _add(to: Distance, base: Floats, model: Floats, rounded: Floats) -> None:
    to.actual += float(np.square(model - base, dtype=np.float64).sum())
    to.rounded += float(np.square(rounded - base, dtype=np.float64).sum())
    to.size += float(np.square(base, dtype=np.float64).sum())
