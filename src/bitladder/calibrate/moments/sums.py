"""Adding up w xxᵀ: the upper triangle only, in panels, in float32.

At some hundred chunks the rounding of float32, 10⁻⁶ of a diagonal entry, is far below the sampling error.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bitladder.calibrate.moments.triangles import Floats, triangle

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


def add_tokens(rows: Floats, rest: Floats, targets: Sequence[WeightedSums]) -> None:
    """Adds inputs to several sums at once. The product of `rows` is made once for all.

    No weight is subtracted from another, so that a token that counts 0 leaves nothing, however large it is.

    Parameters:
        rows: inputs that count `common` for each target, float32 [tokens, width].
        rest: inputs that count `others`, float32 [n, width].
        targets: the sums.

    Example:
        >>> sums = MomentSums(2)
        >>> common, rest = np.array([[1.0, 2.0]], np.float32), np.array([[3.0, 0.0]], np.float32)
        >>> add_tokens(common, rest, [WeightedSums(sums, 1.0, np.array([2.0], np.float32))])
        >>> sums.packed(1).round(3).tolist()
        [19.0, 2.0, 4.0]
    """
    scaled = [rest * np.sqrt(target.others)[:, None] for target in targets]
    for index, part in enumerate(panels(rows.shape[1])):
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
