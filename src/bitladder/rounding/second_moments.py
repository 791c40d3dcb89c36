"""Second moments of a matrix, made ready once for all types: shrunk, damped, factored, cut into blocks."""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bitladder.engine import as_torch, single_threaded
from bitladder.errors import BitladderError
from bitladder.rounding.options import RoundingOptions

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Cholesky = Callable[[Doubles], Doubles]

# Of the mean diagonal. With less damping float32 cannot tell a small eigenvalue from 0, and no block can be inverted.
LEAST_DAMPING = 1e-4


def shrunk(h: npt.NDArray[np.floating], shrinkage: float) -> Floats:
    """H [n, n] whose entries off the diagonal are reduced by the fraction `shrinkage`, float32.

    Correlations in a calibration text belong in part to that text alone, and the more so the fewer its tokens. What is
    fitted to them harms on other text.

    Example:
        >>> shrunk(np.array([[2.0, 1.0], [1.0, 2.0]]), 0.25).tolist()
        [[2.0, 0.75], [0.75, 2.0]]
    """
    reduced = h.astype(np.float32) * np.float32(1 - shrinkage)
    reduced[np.diag_indices(len(reduced))] = np.diag(h)
    return reduced


def damped(h: npt.NDArray[np.floating], damping: float) -> Doubles:
    """H [n, n], scaled to a mean diagonal of 1, with `damping` (at least LEAST_DAMPING) added to the diagonal, float64.

    Channels that no token reached get the damping alone: each of their weights is rounded by itself. A matrix of zeros
    becomes the unit matrix. Raises BitladderError if H is not finite, or its diagonal is negative somewhere.

    Example:
        >>> damped(np.array([[3.0, 1.0], [1.0, 1.0]]), 0.5).tolist()
        [[2.0, 0.5], [0.5, 1.0]]
    """
    full = np.asarray(h, np.float64)
    if not np.isfinite(full).all():
        raise BitladderError("second moments are not finite; collect them again")
    if np.diag(full).min(initial=0) < 0:
        raise BitladderError("second moments have a negative diagonal, which no squares have; collect them again")
    full = (full + full.T) / 2
    mean = float(np.trace(full)) / len(full)
    if mean <= 0:
        return np.eye(len(full))
    full /= mean
    full[np.diag_indices(len(full))] += max(damping, LEAST_DAMPING)
    return full


def upper_factor(h: Doubles, cholesky: Cholesky | None = None) -> tuple[Doubles, Doubles]:
    """U [n, n], unit upper triangular, and D [n] with H = U diag(D) Uᵀ: Cholesky's factor of H turned upside down.

    The diagonal of a matrix that rounding made indefinite is raised until the matrix is positive definite. Raises
    BitladderError if that takes more than the matrix itself: it is then no matrix of second moments.

    Parameters:
        h: the matrix.
        cholesky: gives its lower factor, or raises LinAlgError; None is NumPy's.

    Example:
        >>> upper, d = upper_factor(np.array([[2.0, 1.0], [1.0, 1.0]]))
        >>> upper.tolist(), d.tolist()
        ([[1.0, 1.0], [0.0, 1.0]], [1.0, 1.0])
    """
    turned = h[::-1, ::-1]
    size = float(np.abs(np.diag(h)).mean()) or 1.0
    for extra in (0.0, *(10.0**power * size for power in range(-10, 1))):
        try:
            lower = (cholesky or np.linalg.cholesky)(turned + extra * np.eye(len(h)) if extra else turned)
            break
        except np.linalg.LinAlgError:
            continue
    else:
        raise BitladderError("second moments are far from positive definite: the file is damaged; collect them again")
    upper = lower[::-1, ::-1]
    root = np.diag(upper)
    return upper / root, root**2


def diagonal_blocks(matrix: Floats, width: int) -> Floats:
    """The diagonal blocks of a matrix [n, n], [n/width, width, width]."""
    return np.stack([matrix[at : at + width, at : at + width] for at in range(0, len(matrix), width)])


def couplings(
    outputs: npt.NDArray[np.floating] | None,
    damping: float,
    cholesky: Cholesky | None = None,
) -> tuple[Floats, Floats, Floats, Floats]:
    """How rows make up for each other's errors.

    With O = U D Uᵀ, tr(O Δ H Δᵀ) is Σ_i D_i |Δ_i + Σ_{k<i} U_ki Δ_k|²_H. That counts while rows are rounded one after
    the other. Seen from one row, with all others as they are, it is O_ii |Δ_i + Σ_k O_ik/O_ii Δ_k|²_H.

    Parameters:
        outputs: second moments O of the gradients at the outputs, [rows, rows], or None.
        damping: as for `damped`.
        cholesky: as for `upper_factor`.

    Returns:
        U_ki at [i, k], and O_ik/O_ii at [i, k], float32 [rows, rows] each; O_ii and D_i, float32 [rows]. All are empty
        without output moments.
    """
    if outputs is None:
        return (
            np.zeros((0, 0), np.float32),
            np.zeros((0, 0), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.float32),
        )
    full = damped(outputs, damping)
    upper, d = upper_factor(full, cholesky)
    leading = np.ascontiguousarray(upper.T, np.float32)
    own = np.diag(full)
    coupling = np.ascontiguousarray(full / own[:, None], np.float32)
    return leading, coupling, own.astype(np.float32), d.astype(np.float32)


Order = npt.NDArray[np.int64]

# Columns whose errors are handed on to all others by one product of matrices. K-quants have blocks of 256.
COLUMNS = 256
# Random directions in which the loss of a wider matrix is measured. The standard error is about 2 %, and far smaller
# for the ratio of two losses, which are measured in the same directions.
DIRECTIONS = 256


@dataclasses.dataclass(frozen=True)
class Local:
    """The diagonal blocks of H of one width, H_b = U D Uᵀ.

    Parameters:
        ut: Uᵀ, float32 [n/width, width, width].
        d: D, float32 [n/width, width].
        inverse: H_b⁻¹, float32 [n/width, width, width].
    """

    ut: Floats
    d: Floats
    inverse: Floats

    def part(self, start: int, stop: int) -> "Local":
        """The blocks of the columns start … stop−1."""
        blocks = slice(start // self.d.shape[1], stop // self.d.shape[1])
        return Local(self.ut[blocks], self.d[blocks], self.inverse[blocks])

    @property
    def triangles(self) -> Floats:
        """T = √D Uᵀ with TᵀT = H_b, float32 [n/width, width, width]."""
        return np.asarray(np.sqrt(self.d)[:, :, None] * self.ut, np.float32)


class SecondMoments:
    """H = E[xxᵀ] of the inputs of a matrix and O of the gradients at its outputs, shrunk, damped and factored.

    Parameters:
        inputs: H, [n, n].
        outputs: O, [rows, rows], or None, which stands for the unit matrix.
        options: what of them is shrunk and damped.
        device: what factors them (`engine.torch_device`); None is the CPU.

    Attributes:
        h: damped H, float32 [n, n].
        leading: float32 [rows, rows], or [0, 0] without O (`factors.couplings`).
        coupling: alike.
        row_weights: the diagonal of damped O, float32 [rows]; [0] without O.

    Raises:
        BitladderError: moments are not finite.
    """

    def __init__(
        self,
        inputs: npt.NDArray[np.floating],
        outputs: npt.NDArray[np.floating] | None,
        options: RoundingOptions,
        device: str | None = None,
    ) -> None:
        self._cholesky = _cholesky_on(device)
        shapes = [moments.shape for moments in (inputs, outputs) if moments is not None]
        if any(len(shape) != 2 or shape[0] != shape[1] for shape in shapes):
            raise BitladderError(f"second moments of {shapes} are not square and do not fit any matrix")
        if not options.two_sided:
            outputs = None
        with single_threaded():  # several tensors are made ready at once
            self.h: Floats = np.asarray(damped(shrunk(inputs, options.shrinkage), options.damping), np.float32)
            self.leading, self.coupling, self.row_weights, self._row_factors = couplings(
                None if outputs is None else shrunk(outputs, options.shrinkage), options.damping, self._cholesky
            )
        known = [moments for moments in (inputs, outputs) if moments is not None]
        self._scale = math.prod(max(float(np.diag(moments).mean()), 0.0) for moments in known)
        self._factors: dict[bytes, tuple[Floats, Floats]] = {}
        self._local: dict[int, Local] = {}

    def check(self, rows: int, width: int) -> None:
        """Raises BitladderError unless the moments belong to a matrix of this size."""
        if self.h.shape != (width, width) or len(self.leading) not in (0, rows):
            raise BitladderError(f"second moments of {self.h.shape} do not fit a matrix of {rows} × {width}")

    def factor(self, order: Order) -> tuple[Floats, Floats]:
        """Uᵀ [n, n] and D [n] with H = U D Uᵀ, rows and columns in an order of rounding, float32."""
        key = order.tobytes()
        if key not in self._factors:
            natural = bool((order == np.arange(len(order))).all())
            ordered = self.h if natural else self.h[np.ix_(order, order)]
            upper, d = upper_factor(ordered.astype(np.float64), self._cholesky)
            self._factors[key] = np.ascontiguousarray(upper.T, np.float32), d.astype(np.float32)
        return self._factors[key]

    def local(self, width: int) -> Local:
        """Factors of the diagonal blocks of a width."""
        if width not in self._local:
            blocks = diagonal_blocks(self.h, width).astype(np.float64)
            parts = [upper_factor(block) for block in blocks]
            self._local[width] = Local(
                np.stack([u.T for u, _ in parts]).astype(np.float32),
                np.stack([d for _, d in parts]).astype(np.float32),
                np.linalg.inv(blocks).astype(np.float32),
            )
        return self._local[width]

    @functools.cached_property
    def diagonal(self) -> list[Floats]:
        """The diagonal blocks of h of `COLUMNS` columns each; the last may have fewer."""
        return [np.ascontiguousarray(self.h[part, part]) for part in column_parts(len(self.h))]

    def loss(self, delta: Floats) -> float:
        """tr(O Δ H Δᵀ) of errors [rows, n], with both moments shrunk and damped: what rounding lowers.

        It is |√D_O U_Oᵀ Δ U_H √D_H|². The products of that take longer than rounding does, so a matrix of more than
        `DIRECTIONS` columns is multiplied by so many random vectors of mean square 1 (Hutchinson's estimate,
        doi 10.1080/03610918908812806).
        """
        rows = delta @ self._directions
        if len(self.leading):
            rows = np.sqrt(self._row_factors)[:, None] * (self.leading @ rows)
        return self._scale * float(np.square(rows, dtype=np.float64).sum())

    @functools.cached_property
    def _directions(self) -> Floats:
        """U_H √D_H, or its products with random vectors, float32 [n, at most DIRECTIONS]."""
        width = len(self.h)
        ut, d = self.factor(np.arange(width))
        root = ut.T * np.sqrt(d)
        if width <= DIRECTIONS:
            return np.asarray(root, np.float32)
        signs = np.random.default_rng(0).integers(0, 2, (width, DIRECTIONS), np.int8)
        return np.asarray(root @ ((2 * signs - 1) / np.float32(DIRECTIONS**0.5)).astype(np.float32), np.float32)


def column_parts(width: int) -> list[slice]:
    """The columns of a row in parts of `COLUMNS`."""
    return [slice(start, min(start + COLUMNS, width)) for start in range(0, width, COLUMNS)]


def _cholesky_on(device: str | None) -> Cholesky | None:
    """Cholesky's factor, computed on a device. Apple's GPUs have no float64."""
    if device in (None, "mps"):
        return None
    from bitladder.rounding.torch_tiles import cholesky

    return functools.partial(cholesky, device=as_torch(device))
