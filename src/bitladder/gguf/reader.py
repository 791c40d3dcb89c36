"""Opening a GGUF model: metadata, tensors, and rows of weights on request.

Only headers are read when the file is opened. The shards of a split model are opened together and look like one file.
"""

import contextlib
import os
import pathlib
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.files import Closing
from bitladder.gguf.header import GgufHeader, TensorInfo, open_regular, read_header, shown
from bitladder.gguf.names import block_of
from bitladder.gguf.splits import join, rest_of


class GgufFile(Closing):
    """An open GGUF file, or all shards of a split model.

    Parameters:
        path: the file, or the first shard.

    Attributes:
        metadata: values by key, in file order; of a split model, those of the first shard.
        tensors: tensors by name, in file order, of all shards.
        parts: the files.
        size: bytes of all files.
        data_start: the byte of the first file at which its tensors begin.

    Raises:
        BitladderError: the file is damaged, or a shard is missing; the message names the file, and the key or tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        with contextlib.ExitStack() as opened:
            self._streams: list[BinaryIO] = []
            headers = [self._open(self.path, opened)]
            headers += [self._open(other, opened) for other in rest_of(headers[0])]
            self.tensors = join(headers)
            self._opened = opened.pop_all()
        self.parts = tuple(header.path for header in headers)
        self.size = sum(header.size for header in headers)
        self.metadata = headers[0].metadata
        self.data_start = headers[0].data_start
        self._data_starts = [header.data_start for header in headers]

    def _open(self, path: pathlib.Path, opened: contextlib.ExitStack) -> GgufHeader:
        stream = opened.enter_context(open_regular(path))
        self._streams.append(stream)
        return read_header(stream, path, part=len(self._streams) - 1)

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object, or the default."""
        value = self.metadata.get(key)
        return default if value is None else value.python()

    @property
    def architecture(self) -> str:
        """general.architecture, or "" (an imatrix has none)."""
        return str(self.get("general.architecture", ""))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bpw(self) -> float:
        """Bits per weight over all weights, of tensor bytes, as llama-quantize states it; 0 without tensors."""
        return 8 * self.tensor_bytes / max(1, sum(tensor.elements for tensor in self.tensors.values()))

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Reads rows of a tensor as they are stored. Several threads may read at once.

        Parameters:
            tensor: one of `tensors`.
            start: the first row.
            stop: the row behind the last; None reads to the end.

        Returns:
            uint8, shape [rows, row bytes], a new array.

        Raises:
            BitladderError: the file cannot be read, or ends inside the tensor.
        """
        stop = tensor.rows if stop is None else stop
        row = tensor.type.row_bytes(tensor.width)
        out = np.empty((stop - start, row), np.uint8)
        view, position = out.reshape(-1).data, self._data_starts[tensor.part] + tensor.offset + start * row
        while view:
            try:
                count = os.preadv(self._streams[tensor.part].fileno(), [view], position)
            except OSError as error:
                raise BitladderError(f"cannot read {self.parts[tensor.part]}: {error.strerror}") from error
            if not count:
                raise BitladderError(f"{self.parts[tensor.part]}: the file ends inside tensor {tensor.name}")
            view, position = view[count:], position + count
        return out


def prediction_tensors(file: GgufFile) -> list[str]:
    """The tensors of heads that predict further tokens (NextN, MTP): those of the last blocks, by the metadata.

    The main graph of llama.cpp does not compute these blocks, so no text that is decoded reaches them.
    """
    heads, blocks = (file.get(f"{file.architecture}.{key}", 0) for key in ("nextn_predict_layers", "block_count"))
    if not (isinstance(heads, int) and isinstance(blocks, int) and 0 < heads < blocks):
        return []
    return [name for name in file.tensors if (block := block_of(name)) is not None and block >= blocks - heads]


# general.type → what such a file is; a model has "model", or nothing at all.
_KINDS = {
    "imatrix": "an importance matrix",
    "moments": "second moments",
    "adapter": "an adapter (LoRA), which must be merged into its model first",
    "mmproj": "the projector of images or sounds beside a model",
}


def open_model(path: str | os.PathLike[str]) -> GgufFile:
    """Opens a GGUF that must be a model. Raises BitladderError that says what it is otherwise, and as `GgufFile`."""
    file = GgufFile(path)
    kind = file.get("general.type", "model")
    if kind == "model" and file.architecture:
        return file
    file.close()
    what = _KINDS.get(str(kind), f"of the type {shown(str(kind))}" if kind != "model" else "without an architecture")
    raise BitladderError(f"{path} is no model but {what}; name the model's GGUF")


def describe_kind(file: GgufFile) -> str:
    """What a GGUF is, in words, for an error: "a model (llama)", "an importance matrix"."""
    kind = str(file.get("general.type", "model"))
    return _KINDS.get(kind, f"a {shown(kind)} ({shown(file.architecture or 'of no architecture')})")


def refuse_other_model(quant: GgufFile, original: GgufFile) -> None:
    """Raises BitladderError if a tensor of `quant` is not in `original` in the same shape."""
    for name, tensor in quant.tensors.items():
        other = original.tensors.get(name)
        if other is None or other.shape != tensor.shape:
            raise BitladderError(
                f"{quant.path} was not made from {original.path}: {name} is "
                f"{'not in it' if other is None else f'{list(other.shape)} there and {list(tensor.shape)} here'}"
            )


def refuse_other_vectors(quant: GgufFile, original: GgufFile) -> None:
    """Raises BitladderError if a norm or bias of `quant` differs from the original's in any bit.

    Quantizing does not change them. So this finds a model of the same shapes that was fine-tuned or smoothed.
    """
    for name, tensor in quant.tensors.items():
        other = original.tensors[name]
        if (
            len(tensor.shape) == 1
            and tensor.type == other.type
            and not np.array_equal(quant.read(tensor), original.read(other))
        ):
            raise BitladderError(
                f"{quant.path} was not made from {original.path}, but from a model of the same shapes: {name} has "
                "other values. Name the file that it was made from (the smoothed one, if it was)"
            )
