"""Second moments made ready for rounding: shrunk, damped, factored, and cut into the blocks of a type."""

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

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


def upper_factor(h: Doubles) -> tuple[Doubles, Doubles]:
    """U [n, n], unit upper triangular, and D [n] with H = U diag(D) Uᵀ: Cholesky's factor of H turned upside down.

    The diagonal of a matrix that rounding made indefinite is raised until the matrix is positive definite. Raises
    BitladderError if that takes more than the matrix itself: it is then no matrix of second moments.

    Example:
        >>> upper, d = upper_factor(np.array([[2.0, 1.0], [1.0, 1.0]]))
        >>> upper.tolist(), d.tolist()
        ([[1.0, 1.0], [0.0, 1.0]], [1.0, 1.0])
    """
    turned = h[::-1, ::-1]
    size = float(np.abs(np.diag(h)).mean()) or 1.0
    for extra in (0.0, *(10.0**power * size for power in range(-10, 1))):
        try:
            lower = np.linalg.cholesky(turned + extra * np.eye(len(h)) if extra else turned)
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


def couplings(outputs: npt.NDArray[np.floating] | None, damping: float) -> tuple[Floats, Floats, Floats]:
    """How rows make up for each other's errors.

    With O = U D Uᵀ, tr(O Δ H Δᵀ) is Σ_i D_i |Δ_i + Σ_{k<i} U_ki Δ_k|²_H. That counts while rows are rounded one after
    the other. Seen from one row, with all others as they are, it is O_ii |Δ_i + Σ_k O_ik/O_ii Δ_k|²_H.

    Parameters:
        outputs: second moments O of the gradients at the outputs, [rows, rows], or None.
        damping: as for `damped`.

    Returns:
        U_ki at [i, k], and O_ik/O_ii at [i, k], float32 [rows, rows] each; O_ii, float32 [rows]. All are empty without
        output moments.
    """
    if outputs is None:
        return np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    full = damped(outputs, damping)
    upper, _ = upper_factor(full)
    leading = np.ascontiguousarray(upper.T, np.float32)
    own = np.diag(full)
    return leading, np.ascontiguousarray(full / own[:, None], np.float32), own.astype(np.float32)
