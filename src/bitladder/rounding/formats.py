"""The block layouts of every scalar type: bytes to parts and back. Source: ggml-common.h and ggml-quants.c.

A layout is a row of fields; each field says where its bytes lie and how numbers are laid out in them.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bitladder.rounding.blocks import Blocks, Bytes, Floats, Format, Integers

# The 16 levels of IQ4_NL and IQ4_XS (kvalues_iq4nl).
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

Array = npt.NDArray[np.generic]
Unpack = Callable[[Format, Bytes], Blocks]
Pack = Callable[[Blocks], Bytes]


def _range(first: int, last: int) -> Floats:
    return np.arange(first, last + 1, dtype=np.float32)


# fmt: off
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("q4_0", 32, 32, _range(-8, 7)),
        Format("q4_1", 32, 32, _range(0, 15), offset="plus"),
        Format("q5_0", 32, 32, _range(-16, 15)),
        Format("q5_1", 32, 32, _range(0, 31), offset="plus"),
        # −128 can be stored, but some kernels negate it in eight bits.
        Format("q8_0", 32, 32, _range(-128, 127)),
        Format("iq4_nl", 32, 32, _IQ4),
        Format("iq4_xs", 256, 32, _IQ4, scales=(-32, 31)),
        Format("q2_K", 256, 16, _range(0, 3), scales=(0, 15), offset="minus", minimums=(0, 15)),
        Format("q3_K", 256, 16, _range(-4, 3), scales=(-32, 31)),
        Format("q4_K", 256, 32, _range(0, 15), scales=(0, 63), offset="minus", minimums=(0, 63)),
        Format("q5_K", 256, 32, _range(0, 31), scales=(0, 63), offset="minus", minimums=(0, 63)),
        Format("q6_K", 256, 16, _range(-32, 31), scales=(-128, 127)),
    )
}
# fmt: on


def unpack(name: str, data: Bytes, width: int) -> Blocks:
    """Rows of a type as parts: uint8 [rows, row bytes] (or flat) to `Blocks` of rows of `width` weights.

    Raises KeyError for a type that is not in FORMATS.
    """
    form = FORMATS[name]
    size = BLOCK_BYTES[name]
    per_row = width // form.block
    blocks = _UNPACK[name](form, np.ascontiguousarray(data).reshape(-1, size))
    rows = len(blocks.indices) // per_row
    for field in ("indices", "d", "dmin", "scale", "minimum"):
        value = getattr(blocks, field)
        if value is not None:
            setattr(blocks, field, np.ascontiguousarray(value.reshape(rows, -1)))
    return blocks


def pack(blocks: Blocks) -> Bytes:
    """Parts as bytes, uint8 [rows, row bytes]: `unpack` undone, to the last bit."""
    form = blocks.format
    rows, width = blocks.indices.shape
    count = rows * width // form.block
    flat = Blocks(
        form,
        blocks.indices.reshape(count, form.block),
        blocks.d.reshape(count, 1),
        None if blocks.dmin is None else blocks.dmin.reshape(count, 1),
        None if blocks.scale is None else blocks.scale.reshape(count, -1),
        None if blocks.minimum is None else blocks.minimum.reshape(count, -1),
    )
    return _PACK[form.name](flat).reshape(rows, -1)


def _half(data: Bytes) -> Floats:
    """Two bytes of each block as an F16 number, float32 [blocks, 1]."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _half_bytes(values: Floats) -> Bytes:
    return np.ascontiguousarray(values.astype(np.float16)).view(np.uint8)


# Indices of w bits, interleaved: in a group of `span` weights, byte i holds weights i, i + stride, i + 2·stride, …


def _above(low: Bytes, high: Bytes, bits: int) -> Bytes:
    """Low bits with high ones above them."""
    return np.asarray(low | (high << np.uint8(bits)), np.uint8)


def _split(data: Bytes, bits: int, stride: int) -> Bytes:
    """Bits to indices, [blocks, bytes] → [blocks, bytes · 8/bits]."""
    parts = data.reshape(len(data), -1, 1, stride)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    kept = np.asarray((parts >> shifts) & np.uint8((1 << bits) - 1), np.uint8)
    flat: Bytes = kept.reshape(len(data), -1)
    return flat


def _join(indices: npt.NDArray[np.integer], bits: int, stride: int) -> Bytes:
    """`_split` undone."""
    parts = indices.reshape(len(indices), -1, 8 // bits, stride)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    joined: Bytes = np.asarray(np.bitwise_or.reduce(parts << shifts, axis=2), np.uint8)
    return joined.reshape(len(indices), -1)


# Blocks of 32: F16 d, perhaps F16 m, perhaps 32 fifth bits, then the low bits (or whole bytes).


def _unpack_simple(bits: int, offset: int, minimum: bool) -> Unpack:
    def run(form: Format, data: Bytes) -> Blocks:
        d = _half(data[:, :2])
        m = _half(data[:, 2:4]) if minimum else None
        at = 4 if minimum else 2
        if bits == 8:
            return Blocks(form, data[:, at:] ^ np.uint8(0x80), d)
        if bits == 5:
            high = np.unpackbits(data[:, at : at + 4], axis=1, bitorder="little")
            return Blocks(form, _above(_split(data[:, at + 4 :], 4, 16), high, 4), d, m)
        return Blocks(form, _split(data[:, at:], 4, 16), d, m)

    return run


def _pack_simple(bits: int) -> Pack:
    def run(blocks: Blocks) -> Bytes:
        head = [_half_bytes(blocks.d)] + ([_half_bytes(blocks.dmin)] if blocks.dmin is not None else [])
        q = blocks.indices
        if bits == 8:
            return np.hstack([*head, q ^ np.uint8(0x80)])
        if bits == 5:
            head.append(np.packbits(q >> 4, axis=1, bitorder="little"))
        return np.hstack([*head, _join(q & 15, 4, 16)])

    return run


# The twelve bytes of Q4_K and Q5_K: eight scales and eight minimums of six bits.


def _six_bits(data: Bytes) -> tuple[Integers, Integers]:
    low, high, both = data[:, 0:4], data[:, 4:8], data[:, 8:12]
    scale = np.hstack([low & 63, (both & 15) | ((low >> 6) << 4)])
    minimum = np.hstack([high & 63, (both >> 4) | ((high >> 6) << 4)])
    return scale.astype(np.int16), minimum.astype(np.int16)


def _six_bits_bytes(scale: Integers, minimum: Integers) -> Bytes:
    s, m = scale.astype(np.uint8), minimum.astype(np.uint8)
    low = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
    high = (m[:, :4] & 63) | ((m[:, 4:] >> 4) << 6)
    return np.hstack([low, high, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)])


def _unpack_q4k(form: Format, data: Bytes) -> Blocks:
    scale, minimum = _six_bits(data[:, 4:16])
    return Blocks(form, _split(data[:, 16:], 4, 32), _half(data[:, :2]), _half(data[:, 2:4]), scale, minimum)


def _head(blocks: Blocks) -> list[Bytes]:
    assert blocks.dmin is not None and blocks.scale is not None and blocks.minimum is not None
    return [
        _half_bytes(blocks.d),
        _half_bytes(blocks.dmin),
        _six_bits_bytes(blocks.scale, blocks.minimum),
    ]


def _pack_q4k(blocks: Blocks) -> Bytes:
    return np.hstack([*_head(blocks), _join(blocks.indices, 4, 32)])


def _unpack_q5k(form: Format, data: Bytes) -> Blocks:
    scale, minimum = _six_bits(data[:, 4:16])
    # Byte i of the high bits holds those of weights i, i + 32, …, i + 224.
    indices = _above(_split(data[:, 48:], 4, 32), _split(data[:, 16:48], 1, 32), 4)
    return Blocks(form, indices, _half(data[:, :2]), _half(data[:, 2:4]), scale, minimum)


def _pack_q5k(blocks: Blocks) -> Bytes:
    q = blocks.indices
    return np.hstack([*_head(blocks), _join(q >> 4, 1, 32), _join(q & 15, 4, 32)])


def _unpack_q2k(form: Format, data: Bytes) -> Blocks:
    both = data[:, :16]
    scale, minimum = (both & 15).astype(np.int16), (both >> 4).astype(np.int16)
    return Blocks(form, _split(data[:, 16:80], 2, 32), _half(data[:, 80:82]), _half(data[:, 82:84]), scale, minimum)


def _pack_q2k(blocks: Blocks) -> Bytes:
    assert blocks.dmin is not None and blocks.scale is not None and blocks.minimum is not None
    both = blocks.scale.astype(np.uint8) | (blocks.minimum.astype(np.uint8) << 4)
    return np.hstack([both, _join(blocks.indices, 2, 32), _half_bytes(blocks.d), _half_bytes(blocks.dmin)])


def _unpack_q3k(form: Format, data: Bytes) -> Blocks:
    indices = _above(_split(data[:, 32:96], 2, 32), _split(data[:, :32], 1, 32), 2)
    packed = data[:, 96:108]
    # Sixteen scales of six bits: low four bits in eight bytes, high two in four.
    scale = _above(_split(packed[:, :8], 4, 8), _split(packed[:, 8:], 2, 4), 4)
    return Blocks(form, indices, _half(data[:, 108:110]), scale=scale.astype(np.int16) - 32)


def _pack_q3k(blocks: Blocks) -> Bytes:
    assert blocks.scale is not None
    q, scale = blocks.indices, (blocks.scale + 32).astype(np.uint8)
    packed = [_join(scale & 15, 4, 8), _join(scale >> 4, 2, 4)]
    return np.hstack([_join(q >> 2, 1, 32), _join(q & 3, 2, 32), *packed, _half_bytes(blocks.d)])


def _unpack_q6k(form: Format, data: Bytes) -> Blocks:
    # Two halves of 128 weights, each with 64 bytes of low and 32 bytes of high bits.
    indices = _above(_split(data[:, :128], 4, 64), _split(data[:, 128:192], 2, 32), 4)
    scale = np.ascontiguousarray(data[:, 192:208]).view(np.int8).astype(np.int16)
    return Blocks(form, indices, _half(data[:, 208:210]), scale=scale)


def _pack_q6k(blocks: Blocks) -> Bytes:
    assert blocks.scale is not None
    q = blocks.indices
    scale = np.ascontiguousarray(blocks.scale.astype(np.int8)).view(np.uint8)
    return np.hstack([_join(q & 15, 4, 64), _join(q >> 4, 2, 32), scale, _half_bytes(blocks.d)])


def _unpack_iq4xs(form: Format, data: Bytes) -> Blocks:
    # Eight scales of six bits: high two bits in two bytes, low four in four, both in order.
    scale = _above(_split(data[:, 4:8], 4, 1), _split(data[:, 2:4], 2, 1), 4)
    return Blocks(form, _split(data[:, 8:], 4, 16), _half(data[:, :2]), scale=scale.astype(np.int16) - 32)


def _pack_iq4xs(blocks: Blocks) -> Bytes:
    assert blocks.scale is not None
    scale = (blocks.scale + 32).astype(np.uint8)
    packed = [_join(scale >> 4, 2, 1), _join(scale & 15, 4, 1)]
    return np.hstack([_half_bytes(blocks.d), *packed, _join(blocks.indices, 4, 16)])


BLOCK_BYTES = {
    "q4_0": 18,
    "q4_1": 20,
    "q5_0": 22,
    "q5_1": 24,
    "q8_0": 34,
    "iq4_nl": 18,
    "iq4_xs": 136,
    "q2_K": 84,
    "q3_K": 110,
    "q4_K": 144,
    "q5_K": 176,
    "q6_K": 210,
}

_UNPACK: dict[str, Unpack] = {
    "q4_0": _unpack_simple(4, 8, False),
    "q4_1": _unpack_simple(4, 0, True),
    "q5_0": _unpack_simple(5, 16, False),
    "q5_1": _unpack_simple(5, 0, True),
    "q8_0": _unpack_simple(8, 128, False),
    "iq4_nl": _unpack_simple(4, 0, False),
    "iq4_xs": _unpack_iq4xs,
    "q2_K": _unpack_q2k,
    "q3_K": _unpack_q3k,
    "q4_K": _unpack_q4k,
    "q5_K": _unpack_q5k,
    "q6_K": _unpack_q6k,
}
_PACK: dict[str, Pack] = {
    "q4_0": _pack_simple(4),
    "q4_1": _pack_simple(4),
    "q5_0": _pack_simple(5),
    "q5_1": _pack_simple(5),
    "q8_0": _pack_simple(8),
    "iq4_nl": _pack_simple(4),
    "iq4_xs": _pack_iq4xs,
    "q2_K": _pack_q2k,
    "q3_K": _pack_q3k,
    "q4_K": _pack_q4k,
    "q5_K": _pack_q5k,
    "q6_K": _pack_q6k,
}
