"""The types that store an index into a table of levels for each weight, and how their bytes lie.

    weight = step · level[index] + offset,   step = d · scale,   offset = sign · dmin · minimum

d and dmin are F16 numbers of a block, scale and minimum small integers of a sub-block. The products are computed in
float32, as the library's kernels compute them. A type without scales has 1 in their place, and so for minimums.

Example:
    >>> data = np.concatenate([np.array([0.5], np.float16).view(np.uint8), np.full(16, 0x8A, np.uint8)])
    >>> SCALAR_TYPES["q4_0"].unpack(data, 32).values()[0, [0, 16]].tolist()
    [1.0, 0.0]
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitladder.rounding.block_types import (
    Blocks,
    BlockType,
    Bytes,
    Floats,
    Integers,
    as_bytes,
    half_bytes,
    halves,
    high_and_low,
    join_bits,
    split_bits,
    times_in_half,
)

NONE = (1, 1)  # the range of scales or minimums that a type does not have


@dataclasses.dataclass(frozen=True, eq=False)
class ScalarType(BlockType):
    """A type with an index for each weight.

    Parameters:
        levels: float32 [K], ascending.
        layout: how bytes become parts, and back.
        scales: least and greatest scale.
        sign: of the offset; 0 where the type has none.
        minimums: least and greatest minimum.
        lowest: the first index that is used.
    """

    levels: Floats
    layout: "IndexLayout"
    scales: tuple[int, int] = NONE
    sign: int = 0
    minimums: tuple[int, int] = NONE
    lowest: int = 0

    @property
    def uniform(self) -> bool:
        """Whether the levels are consecutive integers."""
        return bool((np.diff(self.levels) == 1).all())

    def unpack(self, data: Bytes, width: int) -> "ScalarBlocks":
        """See `BlockType`."""
        data = np.ascontiguousarray(data).reshape(-1, self.block_bytes)
        parts, ones = self.layout.unpack(data), np.ones((len(data), self.block // self.sub), np.int16)
        blocks = ScalarBlocks(
            self,
            parts.indices,
            parts.d,
            np.zeros_like(parts.d) if parts.dmin is None else parts.dmin,
            ones if parts.scale is None else parts.scale,
            ones.copy() if parts.minimum is None else parts.minimum,
        )
        return blocks.reshaped(len(data) * self.block // width)


@dataclasses.dataclass
class ScalarBlocks(Blocks):
    """The rows of a tensor.

    Parameters:
        type: the type.
        indices: uint8 [rows, width].
        d: float32 [rows, width/block], exact in F16.
        dmin: as d; 0 where the type has no offsets.
        scale: int16 [rows, width/sub].
        minimum: int16 [rows, width/sub].
    """

    type: ScalarType
    indices: Bytes
    d: Floats
    dmin: Floats
    scale: Integers
    minimum: Integers

    def steps(self) -> Floats:
        """The distance of levels, float32 [rows, width/sub]."""
        return np.repeat(self.d, self.type.block // self.type.sub, axis=1) * self.scale.astype(np.float32)

    def offsets(self) -> Floats:
        """The value of level 0, float32 [rows, width/sub]."""
        spread = np.repeat(self.dmin, self.type.block // self.type.sub, axis=1)
        return np.float32(self.type.sign) * (spread * self.minimum.astype(np.float32))

    def terms(self) -> list[Floats]:
        """See `Blocks`."""
        rows, width = self.indices.shape
        levels = self.type.levels[self.indices].reshape(rows, -1, self.type.sub)
        scaled = (levels * self.steps()[:, :, None]).reshape(rows, width)
        return [scaled, np.repeat(self.offsets(), self.type.sub, axis=1)] if self.type.sign else [scaled]

    def values(self) -> Floats:
        """See `Blocks`."""
        values, *offsets = self.terms()
        for offset in offsets:
            values += offset
        return values

    def integers(self) -> list[npt.NDArray[np.generic]]:
        """See `Blocks`."""
        return [self.indices, self.scale, self.minimum]

    def rescaled(self, factors: Sequence[Floats]) -> "ScalarBlocks":
        """See `Blocks`."""
        dmin = times_in_half(self.dmin, factors[1]) if self.type.sign else self.dmin
        return dataclasses.replace(self, d=times_in_half(self.d, factors[0]), dmin=dmin)

    def reshaped(self, rows: int) -> "ScalarBlocks":
        """The same blocks, in order, in so many rows."""
        return ScalarBlocks(
            self.type,
            np.ascontiguousarray(self.indices.reshape(rows, -1)),
            np.ascontiguousarray(self.d.reshape(rows, -1)),
            np.ascontiguousarray(self.dmin.reshape(rows, -1)),
            np.ascontiguousarray(self.scale.reshape(rows, -1)),
            np.ascontiguousarray(self.minimum.reshape(rows, -1)),
        )

    def pack(self) -> Bytes:
        """See `Blocks`."""
        pieces = self.type.layout.pack(self.reshaped(self.d.size))
        return np.hstack(pieces).reshape(len(self.indices), -1)


class IndexParts(NamedTuple):
    """The parts of blocks as in `ScalarBlocks`, with a row for each block; None for what the type does not have."""

    indices: Bytes
    d: Floats
    dmin: Floats | None = None
    scale: Integers | None = None
    minimum: Integers | None = None


class IndexLayout(NamedTuple):
    """Bytes [blocks, block bytes] to parts; and blocks, with a row for each, to pieces of bytes from left to right."""

    unpack: Callable[[Bytes], IndexParts]
    pack: Callable[[ScalarBlocks], list[Bytes]]


def _simple(bits: int, minimum: bool = False) -> IndexLayout:
    """Blocks of 32: F16 d, perhaps F16 m, perhaps 32 fifth bits, then the low bits (or whole bytes)."""

    def unpack(data: Bytes) -> IndexParts:
        d = halves(data[:, :2])
        m = halves(data[:, 2:4]) if minimum else None
        at = 4 if minimum else 2
        if bits == 8:
            return IndexParts(data[:, at:] ^ np.uint8(0x80), d)
        if bits == 5:
            high = np.unpackbits(data[:, at : at + 4], axis=1, bitorder="little")
            return IndexParts(high_and_low(split_bits(data[:, at + 4 :], 4, 16), high, 4), d, m)
        return IndexParts(split_bits(data[:, at:], 4, 16), d, m)

    def pack(blocks: ScalarBlocks) -> list[Bytes]:
        head, q = [half_bytes(blocks.d)], blocks.indices
        if minimum:
            head.append(half_bytes(blocks.dmin))
        if bits == 8:
            return [*head, q ^ np.uint8(0x80)]
        if bits == 5:
            head.append(np.packbits(q >> 4, axis=1, bitorder="little"))
        return [*head, join_bits(q & 15, 4, 16)]

    return IndexLayout(unpack, pack)


# The head of Q4_K and Q5_K: d, dmin, then twelve bytes of eight scales and eight minimums of six bits.


def _unpack_head(data: Bytes) -> tuple[Floats, Floats, Integers, Integers]:
    low, high, both = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scale = np.hstack([low & 63, (both & 15) | ((low >> 6) << 4)])
    minimum = np.hstack([high & 63, (both >> 4) | ((high >> 6) << 4)])
    return halves(data[:, :2]), halves(data[:, 2:4]), scale.astype(np.int16), minimum.astype(np.int16)


def _pack_head(blocks: ScalarBlocks) -> list[Bytes]:
    s, m = as_bytes(blocks.scale), as_bytes(blocks.minimum)
    low = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
    high = (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6)
    both = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return [half_bytes(blocks.d), half_bytes(blocks.dmin), as_bytes(np.hstack([low, high, both]))]


def _unpack_q4k(data: Bytes) -> IndexParts:
    return IndexParts(split_bits(data[:, 16:], 4, 32), *_unpack_head(data))


def _pack_q4k(blocks: ScalarBlocks) -> list[Bytes]:
    return [*_pack_head(blocks), join_bits(blocks.indices, 4, 32)]


def _unpack_q5k(data: Bytes) -> IndexParts:
    # Byte i of the high bits holds those of weights i, i + 32, …, i + 224.
    indices = high_and_low(split_bits(data[:, 48:], 4, 32), split_bits(data[:, 16:48], 1, 32), 4)
    return IndexParts(indices, *_unpack_head(data))


def _pack_q5k(blocks: ScalarBlocks) -> list[Bytes]:
    q = blocks.indices
    return [*_pack_head(blocks), join_bits(q >> 4, 1, 32), join_bits(q & 15, 4, 32)]


def _unpack_q2k(data: Bytes) -> IndexParts:
    both = data[:, :16]
    scale, minimum = (both & 15).astype(np.int16), (both >> 4).astype(np.int16)
    return IndexParts(split_bits(data[:, 16:80], 2, 32), halves(data[:, 80:82]), halves(data[:, 82:84]), scale, minimum)


def _pack_q2k(blocks: ScalarBlocks) -> list[Bytes]:
    scale, minimum = as_bytes(blocks.scale), as_bytes(blocks.minimum)
    q = join_bits(blocks.indices, 2, 32)
    return [as_bytes(scale | (minimum << 4)), q, half_bytes(blocks.d), half_bytes(blocks.dmin)]


def _unpack_q3k(data: Bytes) -> IndexParts:
    indices = high_and_low(split_bits(data[:, 32:96], 2, 32), split_bits(data[:, :32], 1, 32), 2)
    # Sixteen scales of six bits: low four bits in eight bytes, high two in four.
    scale = high_and_low(split_bits(data[:, 96:104], 4, 8), split_bits(data[:, 104:108], 2, 4), 4)
    return IndexParts(indices, halves(data[:, 108:110]), scale=scale.astype(np.int16) - 32)


def _pack_q3k(blocks: ScalarBlocks) -> list[Bytes]:
    q, scale = blocks.indices, as_bytes(blocks.scale + 32)
    scales = [join_bits(scale & 15, 4, 8), join_bits(scale >> 4, 2, 4)]
    return [join_bits(q >> 2, 1, 32), join_bits(q & 3, 2, 32), *scales, half_bytes(blocks.d)]


def _unpack_q6k(data: Bytes) -> IndexParts:
    # Two halves of 128 weights, each with 64 bytes of low and 32 bytes of high bits.
    indices = high_and_low(split_bits(data[:, :128], 4, 64), split_bits(data[:, 128:192], 2, 32), 4)
    scale = np.ascontiguousarray(data[:, 192:208]).view(np.int8).astype(np.int16)
    return IndexParts(indices, halves(data[:, 208:210]), scale=scale)


def _pack_q6k(blocks: ScalarBlocks) -> list[Bytes]:
    q, scale = blocks.indices, np.ascontiguousarray(blocks.scale.astype(np.int8)).view(np.uint8)
    return [join_bits(q & 15, 4, 64), join_bits(q >> 4, 2, 32), scale, half_bytes(blocks.d)]


def _unpack_iq4xs(data: Bytes) -> IndexParts:
    # Eight scales of six bits: high two bits in two bytes, low four in four, both in order.
    scale = high_and_low(split_bits(data[:, 4:8], 4, 1), split_bits(data[:, 2:4], 2, 1), 4)
    return IndexParts(split_bits(data[:, 8:], 4, 16), halves(data[:, :2]), scale=scale.astype(np.int16) - 32)


def _pack_iq4xs(blocks: ScalarBlocks) -> list[Bytes]:
    scale = as_bytes(blocks.scale + 32)
    scales = [join_bits(scale >> 4, 2, 1), join_bits(scale & 15, 4, 1)]
    return [half_bytes(blocks.d), *scales, join_bits(blocks.indices, 4, 16)]


def _range(first: int, last: int) -> Floats:
    return np.arange(first, last + 1, dtype=np.float32)


# The 16 levels of IQ4_NL and IQ4_XS (kvalues_iq4nl).
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_SIX_BITS = (0, 63)

SCALAR_TYPES = {
    kind.name: kind
    for kind in (
        ScalarType("q4_0", 32, 32, 18, _range(-8, 7), _simple(4)),
        ScalarType("q4_1", 32, 32, 20, _range(0, 15), _simple(4, True), sign=1),
        ScalarType("q5_0", 32, 32, 22, _range(-16, 15), _simple(5)),
        ScalarType("q5_1", 32, 32, 24, _range(0, 31), _simple(5, True), sign=1),
        # −128 can be stored, but kernels that negate it in eight bits go wrong.
        ScalarType("q8_0", 32, 32, 34, _range(-128, 127), _simple(8), lowest=1),
        ScalarType("iq4_nl", 32, 32, 18, _IQ4, _simple(4)),
        ScalarType("iq4_xs", 256, 32, 136, _IQ4, IndexLayout(_unpack_iq4xs, _pack_iq4xs), (-32, 31)),
        ScalarType("q2_K", 256, 16, 84, _range(0, 3), IndexLayout(_unpack_q2k, _pack_q2k), (0, 15), -1, (0, 15)),
        ScalarType("q3_K", 256, 16, 110, _range(-4, 3), IndexLayout(_unpack_q3k, _pack_q3k), (-32, 31)),
        ScalarType("q4_K", 256, 32, 144, _range(0, 15), IndexLayout(_unpack_q4k, _pack_q4k), _SIX_BITS, -1, _SIX_BITS),
        ScalarType("q5_K", 256, 32, 176, _range(0, 31), IndexLayout(_unpack_q5k, _pack_q5k), _SIX_BITS, -1, _SIX_BITS),
        ScalarType("q6_K", 256, 16, 210, _range(-32, 31), IndexLayout(_unpack_q6k, _pack_q6k), (-128, 127)),
    )
}
