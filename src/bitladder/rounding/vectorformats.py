"""The block layouts of the types that store indices of points: bytes to parts and back. Source: ggml-quants.c.

Four or eight columns share the index of a point of a grid, which holds their magnitudes; signs are kept apart:

    weight = ± point[column] · step,   step = d · (offset + spread · scale)

The grids are the library's: blocks that hold every index once are given to its own kernel.
"""

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from bitladder.engine.types import dequantize_into, type_by_name
from bitladder.rounding.blocks import Bytes, Floats, Integers

BLOCK = 256
# Signs are stored in bytes of eight columns; where only seven are, the eighth makes the number of minuses even.
SIGNS = 8
HIGHEST_SCALE = 15

Codes = npt.NDArray[np.uint16]


@dataclasses.dataclass(frozen=True)
class VectorFormat:
    """A type as data.

    Blocks are of 256 columns in so many `bytes`. `sub` columns share a scale, `group` of them a point of the grid, one
    of `points`. `even`: eight columns have an even number of minuses.
    """

    name: str
    bytes: int
    sub: int
    group: int
    points: int
    even: bool
    offset: float
    spread: float

    @property
    def unit(self) -> int:
        """How many columns cannot be chosen apart from each other."""
        return SIGNS if self.even else self.group

    @property
    def multipliers(self) -> Floats:
        """What d is taken times, by scale: float32 [16]."""
        scales = np.arange(HIGHEST_SCALE + 1, dtype=np.float32)
        return np.float32(self.offset) + np.float32(self.spread) * scales


# fmt: off
VECTOR_FORMATS: dict[str, VectorFormat] = {
    form.name: form
    for form in (
        VectorFormat("iq2_xxs", 66, 32, 8, 256, True, 0.125, 0.25),
        VectorFormat("iq2_xs", 74, 16, 8, 512, True, 0.125, 0.25),
        VectorFormat("iq2_s", 82, 16, 8, 1024, False, 0.125, 0.25),
        VectorFormat("iq3_xxs", 98, 32, 4, 256, True, 0.25, 0.5),
        VectorFormat("iq3_s", 110, 32, 4, 512, False, 1, 2),
    )
}
# fmt: on


@dataclasses.dataclass
class VectorBlocks:
    """A tensor's rows in the parts of its format.

    `codes` uint16 [rows, width/group]; `minus` uint8 [rows, width], 1 where the sign is; `d` float32 [rows, width/256],
    exact in F16; `scale` int16 [rows, width/sub].
    """

    format: VectorFormat
    codes: Codes
    minus: Bytes
    d: Floats
    scale: Integers

    def steps(self) -> Floats:
        """What points are taken times, float32 [rows, width/sub]."""
        spread = np.repeat(self.d, BLOCK // self.format.sub, axis=1)
        return spread * self.format.multipliers[self.scale]

    def signed(self) -> Floats:
        """Points with their signs, float32 [rows, width]."""
        magnitudes = grid(self.format.name)[self.codes].reshape(self.minus.shape)
        return np.where(self.minus != 0, -magnitudes, magnitudes)

    def values(self) -> Floats:
        """The weights, float32 [rows, width], equal to the library's to the last bit."""
        rows, width = self.minus.shape
        values = self.signed().reshape(rows, -1, self.format.sub) * self.steps()[:, :, None]
        return values.reshape(rows, width)


@functools.cache
def grid(name: str) -> Floats:
    """The magnitudes that each index stands for, float32 [points, group]."""
    form = VECTOR_FORMATS[name]
    per_block = BLOCK // form.group
    blocks = form.points // per_block
    ones = np.ones((1, blocks), np.float32)
    every = VectorBlocks(
        form,
        np.arange(form.points, dtype=np.uint16)[None],
        np.zeros((1, blocks * BLOCK), np.uint8),
        ones,
        np.zeros((1, blocks * BLOCK // form.sub), np.int16),
    )
    out = np.empty((1, blocks * BLOCK), np.float32)
    dequantize_into(pack_vector(every), type_by_name(name), out)
    points: Floats = (out / form.multipliers[0]).reshape(form.points, form.group)
    points.flags.writeable = False
    return points


def unpack_vector(name: str, data: Bytes, width: int) -> VectorBlocks:
    """Rows of a type as parts: uint8 [rows, row bytes] (or flat) to `VectorBlocks` of rows of `width` weights.

    Raises KeyError for a type that is not in VECTOR_FORMATS.
    """
    form = VECTOR_FORMATS[name]
    data = np.ascontiguousarray(data).reshape(-1, form.bytes)
    rows = len(data) * BLOCK // width
    d = np.ascontiguousarray(data[:, :2]).view(np.float16).astype(np.float32)
    codes, signs, scale = _UNPACK[name](data[:, 2:])
    return VectorBlocks(
        form,
        codes.astype(np.uint16).reshape(rows, -1),
        np.unpackbits(signs, axis=1, bitorder="little").reshape(rows, width),
        d.reshape(rows, -1),
        scale.astype(np.int16).reshape(rows, -1),
    )


def pack_vector(blocks: VectorBlocks) -> Bytes:
    """Parts as bytes, uint8 [rows, row bytes]: `unpack_vector` undone, to the last bit."""
    form = blocks.format
    rows, width = blocks.minus.shape
    count = rows * width // BLOCK
    d = np.ascontiguousarray(blocks.d.reshape(count, 1).astype(np.float16)).view(np.uint8)
    signs = np.packbits(blocks.minus.reshape(count, BLOCK), axis=1, bitorder="little")
    scale = blocks.scale.reshape(count, -1).astype(np.uint8)
    parts = _PACK[form.name](blocks.codes.reshape(count, -1), signs, scale)
    return np.hstack([d, *parts]).reshape(rows, -1)


# Codes [blocks, 256/group], bytes of signs [blocks, 32] and scales [blocks, 256/sub] from what follows d, and back.


Parts = tuple[npt.NDArray[np.integer], Bytes, Bytes]


def _bytes(values: npt.NDArray[np.integer]) -> Bytes:
    """Numbers below 256 as such."""
    return values.astype(np.uint8)


def _nibbles(data: Bytes) -> Bytes:
    return _bytes(np.stack([data & 15, data >> 4], axis=2)).reshape(len(data), -1)


def _nibble_bytes(scale: Bytes) -> Bytes:
    return _bytes(scale[:, 0::2] | (scale[:, 1::2] << 4))


def _full_signs(sevens: npt.NDArray[np.integer]) -> Bytes:
    """Seven signs and the eighth that makes minuses even, as bytes."""
    low = _bytes(sevens & 127)
    odd = np.unpackbits(low[..., None], axis=-1).sum(axis=-1, dtype=np.uint8) & 1
    return _bytes(low | (odd << 7))


def _unpack_iq3s(data: Bytes) -> Parts:
    # Low eight bits of the codes, their ninth bits, signs, scales of four bits.
    high = np.unpackbits(data[:, 64:72], axis=1, bitorder="little").astype(np.uint16)
    return data[:, :64] | (high << 8), data[:, 72:104], _nibbles(data[:, 104:108])


def _pack_iq3s(codes: Codes, signs: Bytes, scale: Bytes) -> list[Bytes]:
    high = np.packbits(_bytes(codes >> 8), axis=1, bitorder="little")
    return [_bytes(codes & 255), high, signs, _nibble_bytes(scale)]


def _unpack_iq2s(data: Bytes) -> Parts:
    # Low eight bits of the codes, signs, two high bits of each code, scales of four bits.
    high = (data[:, 64:72, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    codes = data[:, :32] | (high.reshape(len(data), -1).astype(np.uint16) << 8)
    return codes, data[:, 32:64], _nibbles(data[:, 72:80])


def _pack_iq2s(codes: Codes, signs: Bytes, scale: Bytes) -> list[Bytes]:
    high = _bytes(codes >> 8).reshape(len(codes), -1, 4) << np.arange(0, 8, 2, dtype=np.uint8)
    return [_bytes(codes & 255), signs, _bytes(np.bitwise_or.reduce(high, axis=2)), _nibble_bytes(scale)]


def _unpack_iq2xs(data: Bytes) -> Parts:
    # Sixteen bits for eight columns: nine of the code, seven signs.
    words = np.ascontiguousarray(data[:, :64]).view("<u2")
    return words & 511, _full_signs(words >> 9), _nibbles(data[:, 64:72])


def _pack_iq2xs(codes: Codes, signs: Bytes, scale: Bytes) -> list[Bytes]:
    words = (codes | ((signs & 127).astype(np.uint16) << 9)).astype("<u2")
    return [words.view(np.uint8), _nibble_bytes(scale)]


_SEVENS = np.arange(0, 28, 7, dtype=np.uint32)


def _unpack_words(data: Bytes) -> tuple[Bytes, Bytes]:
    """Signs and scales of words with four times seven signs and, on top, the scale."""
    words = np.ascontiguousarray(data).view("<u4")
    signs = _full_signs((words[:, :, None] >> _SEVENS) & 127)
    return signs.reshape(len(data), -1), _bytes(words >> 28)


def _words(signs: Bytes, scale: Bytes) -> Bytes:
    sevens = (signs & 127).astype(np.uint32).reshape(len(signs), -1, 4) << _SEVENS
    words = np.bitwise_or.reduce(sevens, axis=2) | (scale.astype(np.uint32) << 28)
    as_bytes: Bytes = words.astype("<u4").view(np.uint8)
    return as_bytes


def _unpack_iq3xxs(data: Bytes) -> Parts:
    return data[:, :64], *_unpack_words(data[:, 64:])


def _pack_iq3xxs(codes: Codes, signs: Bytes, scale: Bytes) -> list[Bytes]:
    return [_bytes(codes), _words(signs, scale)]


def _unpack_iq2xxs(data: Bytes) -> Parts:
    # Eight bytes for 32 columns: four codes, then a word of signs and scale.
    parts = data.reshape(len(data), 8, 8)
    return parts[:, :, :4].reshape(len(data), -1), *_unpack_words(parts[:, :, 4:].reshape(len(data), -1))


def _pack_iq2xxs(codes: Codes, signs: Bytes, scale: Bytes) -> list[Bytes]:
    code = _bytes(codes).reshape(len(codes), 8, 4)
    both = np.concatenate([code, _words(signs, scale).reshape(len(codes), 8, 4)], axis=2)
    return [both.reshape(len(codes), -1)]


_UNPACK = {
    "iq2_xxs": _unpack_iq2xxs,
    "iq2_xs": _unpack_iq2xs,
    "iq2_s": _unpack_iq2s,
    "iq3_xxs": _unpack_iq3xxs,
    "iq3_s": _unpack_iq3s,
}
_PACK = {
    "iq2_xxs": _pack_iq2xxs,
    "iq2_xs": _pack_iq2xs,
    "iq2_s": _pack_iq2s,
    "iq3_xxs": _pack_iq3xxs,
    "iq3_s": _pack_iq3s,
}
