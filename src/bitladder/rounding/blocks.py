"""What a quantized tensor is made of, between bytes and numbers.

Every scalar type stores an index into a table of levels for each weight, and scales for blocks of them:

    weight = step · level[index] + offset,   step = d · scale,   offset = ± dmin · minimum

d and dmin are F16 numbers of a super-block (or of the only block there is), scale and minimum small integers of a
sub-block. The products are taken in float32, as the library's kernels take them.
"""

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int16]


@dataclasses.dataclass(frozen=True)
class Format:
    """A type as data.

    `block` weights share `d`; `sub` of them a `scale`. `levels` float32 [K], ascending. `offset` tells how a block is
    shifted: not at all, by +m of its own (Q4_1), or by −dmin · minimum of the sub-block (Q4_K). `scales` and `minimums`
    are the ranges of the integers, None where the type has none.
    """

    name: str
    block: int
    sub: int
    levels: Floats
    scales: tuple[int, int] | None = None
    offset: Literal["none", "plus", "minus"] = "none"
    minimums: tuple[int, int] | None = None

    @property
    def uniform(self) -> bool:
        """Whether the levels are consecutive integers."""
        return bool((np.diff(self.levels) == 1).all())


@dataclasses.dataclass
class Blocks:
    """A tensor's rows in the parts of its format.

    `indices` uint8 [rows, width]; `d` float32 [rows, width/block], exact in F16; `dmin` alike, or None; `scale` and
    `minimum` int16 [rows, width/sub], or None.
    """

    format: Format
    indices: Bytes
    d: Floats
    dmin: Floats | None = None
    scale: Integers | None = None
    minimum: Integers | None = None

    def steps(self) -> Floats:
        """Distance of levels, float32 [rows, width/sub]."""
        if self.scale is None:
            return self.d
        return np.repeat(self.d, self.format.block // self.format.sub, axis=1) * self.scale.astype(np.float32)

    def offsets(self) -> Floats:
        """What is added, float32 [rows, width/sub]."""
        if self.dmin is None:
            return np.zeros_like(self.d if self.scale is None else self.scale, np.float32)
        if self.minimum is None:
            return self.dmin
        spread = np.repeat(self.dmin, self.format.block // self.format.sub, axis=1)
        return -(spread * self.minimum.astype(np.float32))

    def scaled(self) -> Floats:
        """step · level, without offsets: float32 [rows, width]."""
        rows, width = self.indices.shape
        levels = self.format.levels[self.indices].reshape(rows, -1, self.format.sub)
        return (levels * self.steps()[:, :, None]).reshape(rows, width)

    def values(self) -> Floats:
        """The weights, float32 [rows, width], equal to the library's to the last bit."""
        values = self.scaled()
        if self.dmin is not None:
            values.reshape(len(values), -1, self.format.sub)[...] += self.offsets()[:, :, None]
        return values
