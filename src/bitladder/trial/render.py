"""What a tensor becomes: the blocks that would really be written, their error, and a cache of both.

A rounding method is any function from weights, type and importance to blocks. Whatever prices types asks for blocks
here, so that another method changes the prices and nothing else.
"""

import hashlib
import os
import pathlib
import struct
import zlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine.types import RowKernels, TensorType
from bitladder.errors import BitladderError
from bitladder.gguf.reader import GgufFile, TensorInfo

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

ROWS = 1 << 22  # weights whose error is summed at a time: bounds the memory of float32 copies


class Rounding(Protocol):
    """A rounding method. `key` names it with all its options: blocks are cached under it."""

    key: str

    def __call__(self, name: str, weights: Floats, kind: TensorType, importance: Floats | None) -> Bytes:
        """The blocks of a tensor.

        `weights` float32 [matrices, rows, width]; `importance` float32 [matrices, width] (mean squared inputs) or
        None. Returns uint8 [matrices, rows, row bytes].
        """


class Stock:
    """The library's own kernel."""

    key = "stock"

    def __init__(self, kernels: RowKernels) -> None:
        self._kernels = kernels

    def __call__(self, name: str, weights: Floats, kind: TensorType, importance: Floats | None) -> Bytes:
        """See `Rounding`. Raises BitladderError that names the tensor."""
        try:
            parts = [
                self._kernels.quantize(matrix, kind, None if importance is None else importance[index])
                for index, matrix in enumerate(weights)
            ]
        except BitladderError as error:
            raise BitladderError(f"{name} as {kind.name}: {error}") from error
        return np.stack(parts)


class Renderer:
    """Renders tensors of a full-precision file, each (tensor, type) once.

    Parameters: `importance` float32 [matrices, width] by tensor name; `folder` where blocks are kept under a key of
    their content (weights, type, importance, method), None to keep nothing; `max_bytes` of blocks are kept there at
    most, the rest is rendered again when needed.
    """

    def __init__(
        self,
        file: GgufFile,
        importance: Mapping[str, Floats],
        *,
        rounding: Rounding | None = None,
        folder: pathlib.Path | None = None,
        max_bytes: int = 16 << 30,
        threads: int | None = None,
    ) -> None:
        self.file = file
        self.kernels = RowKernels(threads)
        self.rounding: Rounding = rounding or Stock(self.kernels)
        self._importance, self._folder = importance, folder
        self._hashes: dict[str, str] = {}
        self._errors: dict[tuple[str, str], float] = {}
        self._room = max_bytes
        if folder is not None and folder.is_dir():
            self._room -= sum(path.stat().st_size for path in folder.glob("*.blocks"))

    def close(self) -> None:
        """Stop the threads."""
        self.kernels.close()

    def importance(self, name: str) -> Floats | None:
        """The importance of a tensor's columns, float32 [matrices, width], or None."""
        return self._importance.get(name)

    def key(self, name: str, kind: TensorType) -> str:
        """The hash of all that decides a rendered tensor's blocks."""
        if name not in self._hashes:
            digest = hashlib.sha256(self.file.read(self.file.tensors[name]).data)
            importance = self._importance.get(name)
            digest.update(b"none" if importance is None else np.ascontiguousarray(importance).data)
            self._hashes[name] = digest.hexdigest()
        text = f"{self._hashes[name]} {self.file.tensors[name].shape} {kind.name} {self.rounding.key}"
        return hashlib.sha256(text.encode()).hexdigest()

    def blocks(self, name: str, kind: TensorType) -> Bytes:
        """The tensor's rows as they would be written, uint8 [rows, row bytes]. Raises BitladderError that names it."""
        return self._rendered(name, kind)[0]

    def _rendered(self, name: str, kind: TensorType) -> tuple[Bytes, float]:
        """Blocks and their error, from the folder or made."""
        tensor = self.file.tensors[name]
        row = kind.row_bytes(tensor.width)
        path = None if self._folder is None else self._folder / f"{self.key(name, kind)}.blocks"
        if path is not None and (kept := _read(path, tensor.rows * row)) is not None:
            return kept[0].reshape(tensor.rows, row), kept[1]
        importance, weights = self._importance.get(name), self.weights(name)
        shape = (-1, tensor.rows_per_matrix, tensor.width)
        blocks = self.rounding(name, weights.reshape(shape), kind, importance).reshape(tensor.rows, row)
        values = self.kernels.dequantize(blocks, kind, tensor.width)
        error = _error(weights, values, importance, tensor)
        if path is not None and blocks.nbytes <= self._room:
            _write(path, blocks, error)
            self._room -= blocks.nbytes
        return blocks, error

    def weights(self, name: str) -> Floats:
        """The full-precision tensor, float32 [rows, width]."""
        tensor = self.file.tensors[name]
        return self.kernels.dequantize(self.file.read(tensor), tensor.type, tensor.width)

    def values(self, name: str, kind: TensorType) -> Floats:
        """What the rendered tensor stands for, float32 [rows, width]."""
        return self.kernels.dequantize(self.blocks(name, kind), kind, self.file.tensors[name].width)

    def error(self, name: str, kind: TensorType) -> float:
        """Σ w (ŵ − w)² over the rendered tensor, w the mean squared input of the column (1 without importance)."""
        if (name, kind.name) not in self._errors:
            self._errors[name, kind.name] = self._rendered(name, kind)[1]
        return self._errors[name, kind.name]


def _write(path: pathlib.Path, blocks: Bytes, error: float) -> None:
    """Keep blocks, their error and a checksum of both.

    There are thousands of these files and none is precious: they are not forced to the disk one by one, so the
    checksum must tell what a power cut has left of one.
    """
    body = blocks.tobytes() + struct.pack("<d", error)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
        temporary.replace(path)
    except OSError as problem:
        raise BitladderError(f"cannot write {path}: {problem.strerror}") from problem
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: pathlib.Path, size: int) -> tuple[Bytes, float] | None:
    """What `_write` kept, if it is whole."""
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise BitladderError(f"cannot read {path}: {problem.strerror}") from problem
    if len(body) != size + 12 or zlib.crc32(body[:-4]) != struct.unpack_from("<I", body, size + 8)[0]:
        return None
    return np.frombuffer(body, np.uint8, size), float(struct.unpack_from("<d", body, size)[0])


def _error(weights: Floats, values: Floats, importance: Floats | None, tensor: TensorInfo) -> float:
    step = max(1, ROWS // tensor.width)
    total = 0.0
    for start in range(0, tensor.rows, step):
        gap = values[start : start + step] - weights[start : start + step]
        columns = np.square(gap, out=gap)
        if importance is None:
            total += float(columns.sum(dtype=np.float64))
            continue
        matrices = np.arange(start, min(start + step, tensor.rows)) // tensor.rows_per_matrix
        for matrix in np.unique(matrices):
            total += float(columns[matrices == matrix].sum(axis=0, dtype=np.float64) @ importance[matrix])
    return total
