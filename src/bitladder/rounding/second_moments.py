"""Second moments of a matrix, made ready once for all types that it is rounded to."""

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from bitladder.engine import single_threaded
from bitladder.errors import BitladderError
from bitladder.rounding.factors import Floats, couplings, damped, diagonal_blocks, shrunk, upper_factor
from bitladder.rounding.options import RoundingOptions

Order = npt.NDArray[np.int64]

# Columns whose errors are handed on to all others by one product of matrices. K-quants have blocks of 256.
COLUMNS = 256


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

    Attributes:
        inputs: H as it was given, float32.
        outputs: O as it was given, float32, or None.
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
    ) -> None:
        shapes = [moments.shape for moments in (inputs, outputs) if moments is not None]
        if any(len(shape) != 2 or shape[0] != shape[1] for shape in shapes):
            raise BitladderError(f"second moments of {shapes} are not square and do not fit any matrix")
        self.inputs = np.asarray(inputs, np.float32)
        self.outputs = None if outputs is None or not options.two_sided else np.asarray(outputs, np.float32)
        with single_threaded():  # several tensors are made ready at once
            self.h: Floats = np.asarray(damped(shrunk(inputs, options.shrinkage), options.damping), np.float32)
            self.leading, self.coupling, self.row_weights = couplings(
                None if self.outputs is None else shrunk(self.outputs, options.shrinkage), options.damping
            )
        self._factors: dict[bytes, tuple[Floats, Floats]] = {}
        self._local: dict[int, Local] = {}

    def check(self, rows: int, width: int) -> None:
        """Raises BitladderError unless the moments belong to a matrix of this size."""
        if self.inputs.shape != (width, width) or (self.outputs is not None and self.outputs.shape != (rows, rows)):
            raise BitladderError(f"second moments of {self.inputs.shape} do not fit a matrix of {rows} × {width}")

    def factor(self, order: Order) -> tuple[Floats, Floats]:
        """Uᵀ [n, n] and D [n] with H = U D Uᵀ, rows and columns in an order of rounding, float32."""
        key = order.tobytes()
        if key not in self._factors:
            natural = bool((order == np.arange(len(order))).all())
            upper, d = upper_factor((self.h if natural else self.h[np.ix_(order, order)]).astype(np.float64))
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
        """tr(O Δ H Δᵀ) of errors [rows, n], without any damping."""
        left = delta if self.outputs is None else self.outputs @ delta
        return float(np.vdot(left @ self.inputs, delta))


def column_parts(width: int) -> list[slice]:
    """The columns of a row in parts of `COLUMNS`."""
    return [slice(start, min(start + COLUMNS, width)) for start in range(0, width, COLUMNS)]
