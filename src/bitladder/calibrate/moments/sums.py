"""Adding up w xxᵀ: the upper triangle only, in panels, each batch in float32 and the total in float64."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.moments.moments_file import Floats, triangle

PANEL = 256  # rows of H that are multiplied at once: half the work of a full product, and a small temporary


def panels(width: int) -> list[slice]:
    """Rows of an H of this width, some at a time."""
    return [slice(start, min(start + PANEL, width)) for start in range(0, width, PANEL)]


def sums_bytes(width: int) -> int:
    """Memory that `Sums` of one matrix takes."""
    return 8 * sum(min(PANEL, width - start) * (width - start) for start in range(0, width, PANEL))


class Sums:
    """Σ w xxᵀ over tokens, of one matrix of a weight."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.panels = [np.zeros((rows.stop - rows.start, width - rows.start)) for rows in panels(width)]

    def packed(self, count: int) -> Floats:
        """The mean over `count` tokens, upper triangle by rows, float32 (zeros if there were none)."""
        out, start = np.empty(triangle(self.width), np.float32), 0
        for panel in self.panels:
            for index, row in enumerate(panel):
                stop = start + len(row) - index
                out[start:stop] = row[index:] / max(count, 1)
                start = stop
        return out

    def diagonal(self) -> npt.NDArray[np.float64]:
        """Σ w x² by column."""
        return np.concatenate([panel.diagonal() for panel in self.panels])


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Sums and the weights of the tokens to add: `common` for most of them, `others` float32 [n] for the rest."""

    sums: Sums
    common: float
    others: Floats


def add(rows: Floats, rest: Floats, targets: Sequence[Weighted]) -> None:
    """Add inputs to several sums at once: `rows` float32 [tokens, width], which all weights of one target count alike,
    and `rest` [n, width], which have weights of their own.

    The product of `rows` is made once for all targets. No weight is subtracted from another, so that a token that
    counts nothing leaves nothing, however large it is.
    """
    scaled = [rest * np.sqrt(target.others)[:, None] for target in targets]
    for index, part in enumerate(panels(rows.shape[1])):
        if len(rows):
            product = rows[:, part].T @ rows[:, part.start :]
            for target in targets:
                if target.common == 1:
                    target.sums.panels[index] += product
                else:
                    target.sums.panels[index] += product * np.float64(target.common)
        if len(rest):
            for target, own in zip(targets, scaled, strict=True):
                target.sums.panels[index] += own[:, part].T @ own[:, part.start :]
