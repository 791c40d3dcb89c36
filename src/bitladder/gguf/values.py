"""Metadata values of a GGUF file: a type number and the bytes as they lie in the file.

Source: docs/gguf.md in the ggml repository.
"""

import dataclasses
import struct
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


@dataclasses.dataclass(frozen=True)
class Value:
    """A metadata value.

    Parameters:
        kind: GGUF type number.
        raw: the little-endian bytes that follow the number in a file.
    """

    kind: int
    raw: bytes

    def python(self) -> Any:
        """The value as int, float, bool, str or list of these."""
        if self.kind == ARRAY:
            return _array(self.raw)
        if self.kind == STRING:
            return self.raw[8:].decode("utf-8", "replace")
        return struct.unpack("<" + SCALARS[self.kind], self.raw)[0]


def _array(raw: bytes) -> list[Any]:
    kind, count = struct.unpack_from("<IQ", raw)
    if kind in SCALARS:
        return list(struct.unpack_from(f"<{count}{SCALARS[kind]}", raw, 12))
    out, position = [], 12
    for _ in range(count):
        (size,) = struct.unpack_from("<Q", raw, position)
        out.append(raw[position + 8 : position + 8 + size].decode("utf-8", "replace"))
        position += 8 + size
    return out


def scalar(kind: int, value: float | bool) -> Value:
    """A number or boolean of a GGUF type."""
    return Value(kind, struct.pack("<" + SCALARS[kind], value))


def u16(value: int) -> Value:
    """An unsigned 16-bit integer."""
    return scalar(U16, value)


def u32(value: int) -> Value:
    """An unsigned 32-bit integer."""
    return scalar(U32, value)


def i32(value: int) -> Value:
    """A signed 32-bit integer."""
    return scalar(I32, value)


def string(text: str) -> Value:
    """A string."""
    return Value(STRING, _packed(text))


def strings(texts: list[str]) -> Value:
    """An array of strings."""
    return Value(ARRAY, struct.pack("<IQ", STRING, len(texts)) + b"".join(map(_packed, texts)))


def _packed(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
