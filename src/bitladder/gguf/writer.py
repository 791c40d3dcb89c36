"""Streaming a GGUF file out: the header first, since all sizes are known, then tensors in order."""

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from bitladder.engine import TensorType
from bitladder.errors import BitladderError
from bitladder.gguf.header import DEFAULT_ALIGNMENT as ALIGNMENT
from bitladder.gguf.header import Value, string


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A tensor to write: its name, its shape in GGUF order, and its type."""

    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def nbytes(self) -> int:
        """Bytes of data, without padding."""
        return self.type.row_bytes(self.shape[0]) * math.prod(self.shape[1:])


def header(metadata: Mapping[str, Value], tensors: Sequence[TensorPlan]) -> bytes:
    """The bytes before the data section, for tensors that follow one another at 32-byte boundaries."""
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [string(key).raw, struct.pack("<I", value.kind), value.raw]
    offset = 0
    for tensor in tensors:
        dimensions = len(tensor.shape)
        parts += [string(tensor.name).raw, struct.pack(f"<I{dimensions}Q", dimensions, *tensor.shape)]
        parts.append(struct.pack("<IQ", tensor.type.id, offset))
        offset += padded(tensor.nbytes)
    joined = b"".join(parts)
    return joined + bytes(padded(len(joined)) - len(joined))


def padded(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def file_size(metadata: Mapping[str, Value], tensors: Sequence[TensorPlan]) -> int:
    """Bytes of the file that GgufWriter writes."""
    return len(header(metadata, tensors)) + sum(padded(tensor.nbytes) for tensor in tensors)


class GgufWriter:
    """Writes the header at once, then takes the bytes of the tensors in the planned order, in pieces of any size."""

    def __init__(self, stream: BinaryIO, metadata: Mapping[str, Value], tensors: Sequence[TensorPlan]) -> None:
        if "general.alignment" in metadata:
            raise ValueError("the writer has the default alignment only")
        self._stream = stream
        self._waiting = list(tensors)[::-1]
        self._left = 0
        stream.write(header(metadata, tensors))

    @property
    def complete(self) -> bool:
        """Whether every tensor is complete."""
        return not self._waiting

    def write(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """Appends bytes to tensor `name`, which must be the current or the next one."""
        if not self._left:
            if not self._waiting or self._waiting[-1].name != name:
                raise ValueError(f"tensor {name} is out of turn")
            self._left = self._waiting[-1].nbytes
        if self._waiting[-1].name != name or data.nbytes > self._left:
            raise ValueError(f"tensor {name} got bytes that are not its own")
        self._stream.write(np.ascontiguousarray(data).data)
        self._left -= data.nbytes
        if not self._left:
            size = self._waiting.pop().nbytes
            self._stream.write(bytes(padded(size) - size))

    def finish(self) -> None:
        """Checks that every tensor is complete."""
        if not self.complete:
            raise BitladderError(f"internal: tensor {self._waiting[-1].name} was not written")
