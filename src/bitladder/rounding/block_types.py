"""What the block types of ggml have in common: bytes of rows to the parts of blocks, and back.

A block holds integers, and one or two F16 numbers that they are multiplied by. The layouts are ggml's (source:
ggml-common.h and ggml-quants.c); the values are equal to the library's to the last bit.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int16]

LARGEST_F16 = float(np.finfo(np.float16).max)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockType(abc.ABC):
    """A type whose blocks can be chosen.

    Parameters:
        name: the library's name of it, such as "q4_K".
        block: weights of a block, which share its F16 numbers.
        sub: weights of a sub-block, which share a scale.
        block_bytes: bytes of a block.
    """

    name: str
    block: int
    sub: int
    block_bytes: int

    @abc.abstractmethod
    def unpack(self, data: Bytes, width: int) -> "Blocks":
        """The parts of rows: uint8 [rows, row bytes] (or flat) to blocks of rows of `width` weights."""


class Blocks(abc.ABC):
    """The rows of a tensor in the parts of their type.

    Attributes:
        type: the type.
        d: the first F16 number of each block, float32 [rows, width/block].
    """

    type: Any
    d: Floats

    @abc.abstractmethod
    def pack(self) -> Bytes:
        """The parts as bytes, uint8 [rows, row bytes]: `unpack` reversed, to the last bit."""

    @abc.abstractmethod
    def terms(self) -> list[Floats]:
        """Products of integers and F16 numbers, a term for each F16 number of a block, float32 [rows, width] each.

        Their sum is the weights, up to rounding.
        """

    @abc.abstractmethod
    def values(self) -> Floats:
        """The weights, float32 [rows, width], equal to the library's to the last bit."""

    @abc.abstractmethod
    def integers(self) -> list[npt.NDArray[np.generic]]:
        """All parts but the F16 numbers."""

    @abc.abstractmethod
    def rescaled(self, factors: Sequence[Floats]) -> "Blocks":
        """Blocks of the same integers with other F16 numbers.

        Parameters:
            factors: what each F16 number is multiplied by, in the order of `terms`, float32 [rows, width/block] each.
        """


def halves(data: Bytes) -> Floats:
    """Two bytes of each block as an F16 number, uint8 [blocks, 2] to float32 [blocks, 1]."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def half_bytes(values: Floats) -> Bytes:
    """`halves` reversed."""
    return np.ascontiguousarray(values.astype(np.float16)).view(np.uint8)


def as_bytes(values: npt.NDArray[np.integer]) -> Bytes:
    """Numbers from 0 to 255 as uint8."""
    return np.asarray(values, np.uint8)


def times_in_half(numbers: Floats, factors: Floats) -> Floats:
    """F16 numbers times factors, rounded to F16 again and kept finite."""
    products: Floats = np.clip(numbers * factors, -LARGEST_F16, LARGEST_F16)
    return products.astype(np.float16).astype(np.float32)


# Indices of a few bits lie interleaved: in a group of bytes, byte i holds the weights i, i + stride, i + 2·stride, …


def split_bits(data: Bytes, bits: int, stride: int) -> Bytes:
    """Bits to indices, [blocks, bytes] to [blocks, bytes · 8/bits].

    Example:
        >>> split_bits(np.array([[0x21, 0x43]], np.uint8), 4, 2).tolist()
        [[1, 3, 2, 4]]
    """
    parts = data.reshape(len(data), -1, 1, stride)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    kept = np.asarray((parts >> shifts) & np.uint8((1 << bits) - 1), np.uint8)
    flat: Bytes = kept.reshape(len(data), -1)
    return flat


def join_bits(indices: npt.NDArray[np.integer], bits: int, stride: int) -> Bytes:
    """`split_bits` reversed."""
    parts = indices.reshape(len(indices), -1, 8 // bits, stride)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    joined: Bytes = np.asarray(np.bitwise_or.reduce(parts << shifts, axis=2), np.uint8)
    return joined.reshape(len(indices), -1)


def high_and_low(low: Bytes, high: Bytes, bits: int) -> Bytes:
    """Low bits with high bits above them."""
    return np.asarray(low | (high << np.uint8(bits)), np.uint8)
