"""Second moments made ready for rounding: damped, factored, and cut into the blocks of a format."""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError

Floats = npt.NDArray[np.float32]

# Of the mean diagonal: less damping and float32 cannot tell a small eigenvalue from none, nor blocks be inverted.
LEAST_DAMPING = 1e-4


@dataclasses.dataclass(frozen=True)
class Factors:
    """H = U D Uᵀ with U unit upper triangular, whole and for each diagonal block.

    `h` float32 [n, n], damped. `order` int64 [n]: in which order columns are rounded; `ut` float32 [n, n] is Uᵀ in that
    order. `local_ut` [n/sub, sub, sub], `local_d` [n/sub, sub] and `local_inverse` [n/sub, sub, sub] belong to the
    diagonal blocks.
    """

    h: Floats
    ut: Floats
    order: npt.NDArray[np.int64]
    local_ut: Floats
    local_d: Floats
    local_inverse: Floats


def damped(h: npt.NDArray[np.floating], damping: float) -> npt.NDArray[np.float64]:
    """H in float64, scaled to a mean diagonal of 1, with `damping` (at least LEAST_DAMPING) added to it.

    Channels that no token reached get the damping alone, so that their weights are rounded each by itself. A matrix of
    zeros becomes the unit matrix. Raises BitladderError if H is not finite.
    """
    full = np.asarray(h, np.float64)
    if not np.isfinite(full).all():
        raise BitladderError("second moments are not finite; collect them again")
    full = (full + full.T) / 2
    mean = float(np.trace(full)) / len(full)
    if mean <= 0:
        return np.eye(len(full))
    full /= mean
    full[np.diag_indices(len(full))] += max(damping, LEAST_DAMPING)
    return full


def shrunk(h: npt.NDArray[np.floating], shrinkage: float) -> Floats:
    """H with what is off its diagonal made smaller by the fraction `shrinkage`, float32.

    Correlations seen on a calibration text are in part that text's alone, and the more so the fewer its tokens; what
    is fitted to them harms on other text.
    """
    less = h.astype(np.float32) * np.float32(1 - shrinkage)
    less[np.diag_indices(len(less))] = np.diag(h)
    return less


def upper_factor(h: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """U, unit upper triangular, and D with H = U diag(D) Uᵀ.

    Cholesky's factor of H turned upside down. A matrix that rounding has made indefinite gets its diagonal raised until
    it is not.
    """
    turned = h[::-1, ::-1]
    extra = 0.0
    while True:
        try:
            lower = np.linalg.cholesky(turned + extra * np.eye(len(h)))
            break
        except np.linalg.LinAlgError:
            extra = max(10 * extra, 1e-10 * float(np.trace(h)) / len(h))
    upper = lower[::-1, ::-1]
    root = np.diag(upper)
    return upper / root, root**2


def factor(h: npt.NDArray[np.floating], sub: int, damping: float, by_importance: bool = False) -> Factors:
    """Prepare second moments [n, n] for a format of `sub`-wide blocks.

    `by_importance` rounds columns in descending order of H's diagonal instead of from left to right. Raises
    BitladderError if H is not finite.
    """
    full = damped(h, damping)
    n = len(full)
    order = np.argsort(-np.diag(full), kind="stable") if by_importance else np.arange(n)
    upper, _ = upper_factor(full[np.ix_(order, order)])
    blocks = np.stack([full[at : at + sub, at : at + sub] for at in range(0, n, sub)])
    local = [upper_factor(block) for block in blocks]
    return Factors(
        np.ascontiguousarray(full, np.float32),
        np.ascontiguousarray(upper.T, np.float32),
        order.astype(np.int64),
        np.stack([u.T for u, _ in local]).astype(np.float32),
        np.stack([d for _, d in local]).astype(np.float32),
        np.linalg.inv(blocks).astype(np.float32),
    )


def couplings(outputs: npt.NDArray[np.floating] | None, damping: float) -> tuple[Floats, Floats]:
    """What rows make up for of each other's errors, float32 [rows, rows] twice; [0, 0] without output moments.

    With O = U D Uᵀ, tr(O Δ H Δᵀ) is Σ_i D_i |Δ_i + Σ_{k<i} U_ki Δ_k|²_H: [i, k] of the first is U_ki, for rows that are
    rounded one after the other. Seen from one row with all others as they are, it is O_ii |Δ_i + Σ_k O_ik/O_ii Δ_k|²_H:
    that is the second.
    """
    if outputs is None:
        return np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)
    full = damped(outputs, damping)
    upper, _ = upper_factor(full)
    leading = np.ascontiguousarray(upper.T, np.float32)
    return leading, np.ascontiguousarray(full / np.diag(full)[:, None], np.float32)
