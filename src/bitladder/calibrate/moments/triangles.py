"""Symmetric matrices: sums of w xxᵀ, and their form in files, triangles or factors in half precision.

Sums are the upper triangle in panels, in float32. At some hundred chunks its rounding, 10⁻⁶ of a diagonal entry, is far
below the sampling error.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]


def triangle(n: int) -> int:
    """Numbers in the upper triangle of an n × n matrix, the diagonal included."""
    return n * (n + 1) // 2


def width_of(size: int) -> int:
    """n of an n × n matrix whose triangle has so many numbers."""
    return (math.isqrt(8 * size + 1) - 1) // 2


def pack_triangle(matrix: npt.NDArray[np.floating]) -> Floats:
    """The upper triangle by rows: [n, n] → float32 [n(n+1)/2].

    Example:
        >>> pack_triangle(np.array([[1.0, 2.0], [2.0, 3.0]])).tolist()
        [1.0, 2.0, 3.0]
    """
    packed, start = np.empty(triangle(len(matrix)), np.float32), 0
    for index, row in enumerate(matrix):
        stop = start + len(row) - index
        packed[start:stop] = row[index:]
        start = stop
    return packed


def unpack_triangle(packed: Floats) -> Floats:
    """The symmetric matrix, float32 [n, n], whose upper triangle is given. It undoes `pack_triangle`."""
    n = width_of(packed.size)
    full, start = np.empty((n, n), np.float32), 0
    for index in range(n):
        stop = start + n - index
        full[index, index:] = full[index:, index] = packed[start:stop]
        start = stop
    return full


def unpack_blocks(packed: Floats) -> Floats:
    """The matrix, float32 [n, n], with the diagonal blocks of these triangles, float32 [blocks, …], and 0 elsewhere."""
    if len(packed) == 1:
        return unpack_triangle(packed[0])
    width = width_of(packed.shape[1])
    full = np.zeros((len(packed) * width, len(packed) * width), np.float32)
    for index, block in enumerate(packed):
        part = slice(index * width, (index + 1) * width)
        full[part, part] = unpack_triangle(block)
    return full


@dataclasses.dataclass(frozen=True)
class Correlations:
    """Packed matrices M in half precision: M_ij / sqrt(M_ii M_jj), and the diagonals.

    A correlation is at most 1, and F16 keeps it to 2⁻¹² of itself. Half the size of F32 costs no KLD (docs/moments.md).

    Parameters:
        values: float16 [matrices, n(n+1)/2].
        diagonals: float32 [matrices, n].
    """

    values: Halves
    diagonals: Floats

    @classmethod
    def of(cls, packed: Floats) -> "Correlations":
        """Of packed matrices, float32 [matrices, n(n+1)/2]. What `packed` returned gives the same halves again.

        Example:
            >>> Correlations.of(np.array([[4.0, 1.0, 1.0]], np.float32)).values.tolist()
            [[1.0, 0.5, 1.0]]
        """
        starts = _row_starts(width_of(packed.shape[1]))
        diagonals = np.maximum(packed[:, starts], 0)
        values = np.empty(packed.shape, np.float16)
        for place, row in enumerate(packed):
            roots = np.sqrt(diagonals[place])
            inverse = np.divide(1, roots, out=np.zeros_like(roots), where=roots > 0)
            _scale(row, inverse, starts, values[place])
        return cls(values, diagonals)

    def packed(self) -> Floats:
        """The packed matrices, float32 [matrices, n(n+1)/2]."""
        starts = _row_starts(self.diagonals.shape[1])
        packed = np.empty(self.values.shape, np.float32)
        for place, row in enumerate(self.values):
            _scale(row, np.sqrt(self.diagonals[place]), starts, packed[place])
        packed[:, starts] = self.diagonals
        return packed

    def matrix(self) -> Floats:
        """The matrix, float32 [n, n], with these diagonal blocks and 0 elsewhere."""
        return unpack_blocks(self.packed())

    def ordered(self, order: npt.NDArray[np.int64]) -> "Correlations":
        """The matrices of the same numbers in another order, int64 [n]. Correlations stay what they are.

        Example:
            >>> three = Correlations.of(np.array([[1.0, 0.5, 0.75, 4.0, 0.25, 1.0]], np.float32))
            >>> three.ordered(np.array([2, 0, 1])).packed().tolist()
            [[1.0, 0.75, 0.25, 1.0, 0.5, 4.0]]
        """
        places = _ordered_places(np.asarray(order, np.int64).tobytes())
        # `take` lets other threads of Python run meanwhile.
        return Correlations(np.take(self.values, places, axis=1), self.diagonals[:, order])


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A matrix M near F Fᵀ, in half precision: F_i / sqrt(M_ii), and the diagonal of M itself.

    Parameters:
        values: float16 [n, rank].
        diagonals: float32 [1, n].
    """

    values: Halves
    diagonals: Floats

    @classmethod
    def of(cls, factors: Floats, diagonal: Floats) -> "LowRank":
        """Of F, float32 [n, rank], and the diagonal of M, float32 [n].

        Example:
            >>> LowRank.of(np.array([[2.0], [1.0]], np.float32), np.array([4.0, 4.0], np.float32)).matrix().tolist()
            [[4.0, 2.0], [2.0, 4.0]]
        """
        diagonal = np.maximum(diagonal, 0)
        # A row cannot be longer than the root of its diagonal number, but for rounding errors.
        lengths = np.maximum(np.linalg.norm(factors, axis=1), np.sqrt(diagonal))
        inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        return cls((factors * inverse[:, None]).astype(np.float16), diagonal[None].astype(np.float32))

    def factors(self) -> Floats:
        """F, float32 [n, rank]."""
        return np.asarray(self.values.astype(np.float32) * np.sqrt(self.diagonals[0])[:, None])

    def matrix(self) -> Floats:
        """F Fᵀ with the diagonal of M, float32 [n, n]."""
        factors = self.factors()
        full = factors @ factors.T
        full[np.diag_indices(len(full))] = self.diagonals[0]
        return np.asarray(full)


def within_one(values: Halves) -> bool:
    """Whether all numbers are between −1 and 1, as correlations are; one that is not finite is not.

    Their bits say so as integers, with and without a sign: NumPy compares numbers in half precision far slower.

    Example:
        >>> [within_one(np.array([0.5, value], np.float16)) for value in (-1.0, 1.001, -1.001, np.nan)]
        [True, False, False, False]
    """
    most_negative, most = (np.float16(one).view(kind) for one, kind in ((-1, np.uint16), (1, np.int16)))
    return bool(values.view(np.uint16).max(initial=0) <= most_negative and values.view(np.int16).max(initial=0) <= most)


def _row_starts(n: int) -> npt.NDArray[np.int64]:
    """Where each row of a packed triangle begins, which is the place of its diagonal number."""
    rows = np.arange(n, dtype=np.int64)
    return rows * n - rows * (rows - 1) // 2


@functools.lru_cache(maxsize=2)  # all matrices of a model have one order, of some 10^7 numbers
def _ordered_places(order: bytes) -> npt.NDArray[np.int64]:
    """Where each number of a packed triangle is from, if it is of the matrix in another order (int64)."""
    numbers = np.frombuffer(order, np.int64)
    starts, places = _row_starts(len(numbers)), np.empty(triangle(len(numbers)), np.int64)
    for index, start in enumerate(starts.tolist()):
        low, high = np.minimum(numbers[index], numbers[index:]), np.maximum(numbers[index], numbers[index:])
        places[start : start + len(low)] = starts[low] + high - low
    return places


def _scale(
    packed: npt.NDArray[np.floating], factors: Floats, starts: npt.NDArray[np.int64], out: npt.NDArray[np.floating]
) -> None:
    """Multiplies M_ij by the factors of i and j. A correlation that rounding left above 1 becomes 1."""
    n = len(factors)
    for index, start in enumerate(starts.tolist()):
        stop = start + n - index
        # One factor after the other: the product of two can be too large for float32.
        scaled = packed[start:stop] * factors[index] * factors[index:]
        out[start:stop] = np.clip(scaled, -1, 1) if out.dtype == np.float16 else scaled


PANEL = 256  # rows of H that are multiplied at once: half the work of a full product, and a small temporary


def panels(width: int) -> list[slice]:
    """The rows of each panel of an H of this width."""
    return [slice(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]


def sums_bytes(width: int) -> int:
    """Bytes of memory that `MomentSums` of one matrix take."""
    return 4 * sum(min(PANEL, width - start) * (width - start) for start in range(0, width, PANEL))


class MomentSums:
    """Σ w xxᵀ over tokens, of one matrix of a weight with inputs of `width` numbers."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.panels = [np.zeros((rows.stop - rows.start, width - rows.start), np.float32) for rows in panels(width)]

    def packed(self, count: int) -> Floats:
        """The mean over `count` tokens: the upper triangle by rows, float32. It is 0 where there were no tokens."""
        out, start = np.empty(triangle(self.width), np.float32), 0
        for panel in self.panels:
            for index, row in enumerate(panel):
                stop = start + len(row) - index
                out[start:stop] = row[index:] / np.float32(max(count, 1))
                start = stop
        return out


@dataclasses.dataclass(frozen=True)
class WeightedSums:
    """Sums, and what the tokens to add count for them.

    Parameters:
        sums: the sums.
        common: what most tokens count.
        others: what the rest count, float32 [n].
    """

    sums: MomentSums
    common: float
    others: Floats


def add_tokens(rows: Floats, rest: Floats, targets: Sequence[WeightedSums], pool: Executor | None = None) -> None:
    """Adds inputs to several sums at once. The product of `rows` is made once for all.

    The threads of a pool take a panel each: NumPy's own threads would spin beside those that decode, and there are as
    many of them as processors. Sums do not depend on the pool.

    No weight is subtracted from another, so that a token that counts 0 leaves nothing, however large it is.

    Parameters:
        rows: inputs that count `common` for each target, float32 [tokens, width].
        rest: inputs that count `others`, float32 [n, width].
        targets: the sums.
        pool: threads that add; None adds in the calling thread.

    Example:
        >>> sums = MomentSums(2)
        >>> common, rest = np.array([[1.0, 2.0]], np.float32), np.array([[3.0, 0.0]], np.float32)
        >>> add_tokens(common, rest, [WeightedSums(sums, 1.0, np.array([2.0], np.float32))])
        >>> sums.packed(1).round(3).tolist()
        [19.0, 2.0, 4.0]
    """
    scaled = [rest * np.sqrt(target.others)[:, None] for target in targets]

    def add(index: int, part: slice) -> None:
        if len(rows):
            product = rows[:, part].T @ rows[:, part.start :]
            for target in targets:
                if target.common == 1:
                    target.sums.panels[index] += product
                else:
                    target.sums.panels[index] += product * np.float32(target.common)
        if len(rest):
            for target, own in zip(targets, scaled, strict=True):
                target.sums.panels[index] += own[:, part].T @ own[:, part.start :]

    parts = panels(rows.shape[1])
    if pool is None or len(parts) == 1:
        for index, part in enumerate(parts):
            add(index, part)
    else:
        list(pool.map(add, range(len(parts)), parts))
