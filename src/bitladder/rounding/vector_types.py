"""The types that store indices of points of a grid, and how their bytes lie.

Four or eight columns share the index of a point, which holds their magnitudes. Signs are stored apart:

    weight = ± point[column] · step,   step = d · offset · (1 + 2 · scale)

The grids are the library's: its own kernel decodes blocks that hold every index once.

Example:
    >>> VECTOR_TYPES["iq3_s"].grid.shape, float(VECTOR_TYPES["iq3_s"].grid.max())
    ((512, 4), 15.0)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitladder.engine import dequantize_into, type_by_name
from bitladder.rounding.block_types import (
    Blocks,
    BlockType,
    Bytes,
    Floats,
    Integers,
    as_bytes,
    half_bytes,
    halves,
    join_bits,
    split_bits,
    times_in_half,
)

BLOCK = 256
# Signs are stored in bytes of eight columns; where only seven are, the eighth makes the number of minuses even.
SIGNS = 8
HIGHEST_SCALE = 15

Codes = npt.NDArray[np.uint16]


@dataclasses.dataclass(frozen=True, eq=False)
class VectorType(BlockType):
    """A type with an index for a group of weights.

    Parameters:
        group: columns that share a point.
        points: how many points the grid has.
        even: whether eight columns have an even number of minuses.
        offset: multiplier of d for scale 0.
        layout: how bytes become parts, and back.
    """

    group: int
    points: int
    even: bool
    offset: float
    layout: "PointLayout"

    @property
    def unit(self) -> int:
        """How many columns cannot be chosen apart from each other."""
        return SIGNS if self.even else self.group

    @property
    def multipliers(self) -> Floats:
        """What d is multiplied by, for each scale: float32 [16]. One scale more adds twice the offset."""
        scales = np.arange(HIGHEST_SCALE + 1, dtype=np.float32)
        return np.float32(self.offset) + np.float32(2 * self.offset) * scales

    @functools.cached_property
    def grid(self) -> Floats:
        """The magnitudes that each index stands for, float32 [points, group]."""
        blocks = self.points // (BLOCK // self.group)
        every = VectorBlocks(
            self,
            np.arange(self.points, dtype=np.uint16)[None],
            np.zeros((1, blocks * BLOCK), np.uint8),
            np.ones((1, blocks), np.float32),
            np.zeros((1, blocks * BLOCK // self.sub), np.int16),
        )
        out = np.empty((1, blocks * BLOCK), np.float32)
        dequantize_into(every.pack(), type_by_name(self.name), out)
        points: Floats = (out / self.multipliers[0]).reshape(self.points, self.group)
        points.flags.writeable = False
        return points

    def unpack(self, data: Bytes, width: int) -> "VectorBlocks":
        """See `BlockType`."""
        data = np.ascontiguousarray(data).reshape(-1, self.block_bytes)
        rows = len(data) * BLOCK // width
        parts = self.layout.unpack(data[:, 2:])
        return VectorBlocks(
            self,
            parts.codes.astype(np.uint16).reshape(rows, -1),
            np.unpackbits(parts.signs, axis=1, bitorder="little").reshape(rows, width),
            halves(data[:, :2]).reshape(rows, -1),
            parts.scale.astype(np.int16).reshape(rows, -1),
        )


@dataclasses.dataclass
class VectorBlocks(Blocks):
    """The rows of a tensor.

    Parameters:
        type: the type.
        codes: index of each group's point, uint16 [rows, width/group].
        minus: uint8 [rows, width], 1 where the sign is negative.
        d: float32 [rows, width/256], exact in F16.
        scale: int16 [rows, width/sub].
    """

    type: VectorType
    codes: Codes
    minus: Bytes
    d: Floats
    scale: Integers

    def steps(self) -> Floats:
        """What points are multiplied by, float32 [rows, width/sub]."""
        spread = np.repeat(self.d, BLOCK // self.type.sub, axis=1)
        return spread * self.type.multipliers[self.scale]

    def signed(self) -> Floats:
        """Points with their signs, float32 [rows, width]."""
        magnitudes = self.type.grid[self.codes].reshape(self.minus.shape)
        return np.where(self.minus != 0, -magnitudes, magnitudes)

    def values(self) -> Floats:
        """See `Blocks`."""
        rows, width = self.minus.shape
        values = self.signed().reshape(rows, -1, self.type.sub) * self.steps()[:, :, None]
        return values.reshape(rows, width)

    def terms(self) -> list[Floats]:
        """See `Blocks`."""
        return [self.values()]

    def integers(self) -> list[npt.NDArray[np.generic]]:
        """See `Blocks`."""
        return [self.codes, self.minus, self.scale]

    def rescaled(self, factors: Sequence[Floats]) -> "VectorBlocks":
        """See `Blocks`."""
        return dataclasses.replace(self, d=times_in_half(self.d, factors[0]))

    def pack(self) -> Bytes:
        """See `Blocks`."""
        rows, count = len(self.minus), self.d.size
        signs = np.packbits(self.minus.reshape(count, BLOCK), axis=1, bitorder="little")
        parts = PointParts(self.codes.reshape(count, -1), signs, self.scale.reshape(count, -1).astype(np.uint8))
        return np.hstack([half_bytes(self.d.reshape(count, 1)), *self.type.layout.pack(parts)]).reshape(rows, -1)


class PointParts(NamedTuple):
    """What follows d in blocks: codes [blocks, 256/group], bytes of signs [blocks, 32], scales [blocks, 256/sub]."""

    codes: npt.NDArray[np.integer]
    signs: Bytes
    scale: Bytes


class PointLayout(NamedTuple):
    """Bytes that follow d to parts; and parts to pieces of bytes from left to right."""

    unpack: Callable[[Bytes], PointParts]
    pack: Callable[[PointParts], list[Bytes]]


def _full_signs(sevens: npt.NDArray[np.integer]) -> Bytes:
    """Seven signs and the eighth that makes minuses even, as bytes."""
    low = as_bytes(sevens & 127)
    odd = np.unpackbits(low[..., None], axis=-1).sum(axis=-1, dtype=np.uint8) & 1
    return as_bytes(low | (odd << 7))


def _unpack_iq3s(data: Bytes) -> PointParts:
    # Low eight bits of the codes, their ninth bits, signs, scales of four bits.
    high = np.unpackbits(data[:, 64:72], axis=1, bitorder="little").astype(np.uint16)
    return PointParts(data[:, :64] | (high << 8), data[:, 72:104], split_bits(data[:, 104:108], 4, 1))


def _pack_iq3s(parts: PointParts) -> list[Bytes]:
    high = np.packbits(as_bytes(parts.codes >> 8), axis=1, bitorder="little")
    return [as_bytes(parts.codes & 255), high, parts.signs, join_bits(parts.scale, 4, 1)]


def _unpack_iq2s(data: Bytes) -> PointParts:
    # Low eight bits of the codes, signs, two high bits of each code, scales of four bits.
    codes = data[:, :32] | (split_bits(data[:, 64:72], 2, 1).astype(np.uint16) << 8)
    return PointParts(codes, data[:, 32:64], split_bits(data[:, 72:80], 4, 1))


def _pack_iq2s(parts: PointParts) -> list[Bytes]:
    high = join_bits(as_bytes(parts.codes >> 8), 2, 1)
    return [as_bytes(parts.codes & 255), parts.signs, high, join_bits(parts.scale, 4, 1)]


def _unpack_iq2xs(data: Bytes) -> PointParts:
    # Sixteen bits for eight columns: nine of the code, seven signs.
    words = np.ascontiguousarray(data[:, :64]).view("<u2")
    return PointParts(words & 511, _full_signs(words >> 9), split_bits(data[:, 64:72], 4, 1))


def _pack_iq2xs(parts: PointParts) -> list[Bytes]:
    words = (parts.codes | ((parts.signs & 127).astype(np.uint16) << 9)).astype("<u2")
    return [words.view(np.uint8), join_bits(parts.scale, 4, 1)]


# Words of four times seven signs and, on top, the scale.
_SEVENS = np.arange(0, 28, 7, dtype=np.uint32)


def _unpack_words(data: Bytes) -> tuple[Bytes, Bytes]:
    words = np.ascontiguousarray(data).view("<u4")
    signs = _full_signs((words[:, :, None] >> _SEVENS) & 127)
    return signs.reshape(len(data), -1), as_bytes(words >> 28)


def _pack_words(parts: PointParts) -> Bytes:
    sevens = (parts.signs & 127).astype(np.uint32).reshape(len(parts.signs), -1, 4) << _SEVENS
    words = np.bitwise_or.reduce(sevens, axis=2) | (parts.scale.astype(np.uint32) << 28)
    as_bytes: Bytes = words.astype("<u4").view(np.uint8)
    return as_bytes


def _unpack_iq3xxs(data: Bytes) -> PointParts:
    return PointParts(data[:, :64], *_unpack_words(data[:, 64:]))


def _pack_iq3xxs(parts: PointParts) -> list[Bytes]:
    return [as_bytes(parts.codes), _pack_words(parts)]


def _unpack_iq2xxs(data: Bytes) -> PointParts:
    # Eight bytes for 32 columns: four codes, then a word of signs and scale.
    both = data.reshape(len(data), 8, 8)
    words = both[:, :, 4:].reshape(len(data), -1)
    return PointParts(both[:, :, :4].reshape(len(data), -1), *_unpack_words(words))


def _pack_iq2xxs(parts: PointParts) -> list[Bytes]:
    codes, words = (part.reshape(len(part), 8, 4) for part in (as_bytes(parts.codes), _pack_words(parts)))
    return [np.concatenate([codes, words], axis=2).reshape(len(codes), -1)]


VECTOR_TYPES = {
    kind.name: kind
    for kind in (
        VectorType("iq2_xxs", BLOCK, 32, 66, 8, 256, True, 0.125, PointLayout(_unpack_iq2xxs, _pack_iq2xxs)),
        VectorType("iq2_xs", BLOCK, 16, 74, 8, 512, True, 0.125, PointLayout(_unpack_iq2xs, _pack_iq2xs)),
        VectorType("iq2_s", BLOCK, 16, 82, 8, 1024, False, 0.125, PointLayout(_unpack_iq2s, _pack_iq2s)),
        VectorType("iq3_xxs", BLOCK, 32, 98, 4, 256, True, 0.25, PointLayout(_unpack_iq3xxs, _pack_iq3xxs)),
        VectorType("iq3_s", BLOCK, 32, 110, 4, 512, False, 1, PointLayout(_unpack_iq3s, _pack_iq3s)),
    )
}
