"""Opening a GGUF model: metadata, tensors, and rows of weights on request.

Only headers are read when the file is opened. The shards of a split model are found by their names, checked to belong
together, opened together and look like one file.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.files import Closing, sha256_bytes
from bitladder.gguf.header import I32, U16, GgufHeader, TensorInfo, open_regular, read_header, shown
from bitladder.gguf.names import block_of
from bitladder.units import number_of

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = (NUMBER, COUNT, TENSORS)
MAX_SHARDS = 0xFFFF  # split.count is a u16
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def shard_path(out: pathlib.Path, number: int, count: int) -> pathlib.Path:
    """The path of shard `number` (from 1) of `count`. `out` is NAME.gguf, NAME, or the path of any shard."""
    return out.with_name(f"{stem(out)}-{number:05d}-of-{count:05d}.gguf")


def stem(path: pathlib.Path) -> str:
    """The name of a model file without folder, ".gguf" and the number of a shard."""
    match = _NAME.fullmatch(path.name)
    return match["stem"] if match else path.name.removesuffix(".gguf")


def plain_path(out: pathlib.Path) -> pathlib.Path:
    """The path of a model that is not split: NAME.gguf for the path of a shard; any other path is returned as it is."""
    return out.with_name(f"{stem(out)}.gguf") if _NAME.fullmatch(out.name) else out


def shards_of(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The files of a model by its name: the file itself, or all shards if it is named as the first of several."""
    match = _NAME.fullmatch(path.name)
    if not match or int(match["number"]) != 1:
        return (path,)
    count = int(match["count"])
    return (path, *(shard_path(path, number, count) for number in range(2, count + 1)))


def joined_sha256(hashes: Sequence[str]) -> str:
    """The SHA-256 of a model from those of its files: the only one, or the SHA-256 of all, joined in order."""
    return hashes[0] if len(hashes) == 1 else sha256_bytes("".join(hashes).encode())


def rest_of(first: GgufHeader) -> tuple[pathlib.Path, ...]:
    """The other shards of the model whose first shard has this header; none if the model is not split.

    Raises BitladderError if the file is not the first shard, if its name and its metadata disagree, or if a shard is
    missing.
    """
    path, count = first.path, first.number(COUNT, U16, 0)
    named = _NAME.fullmatch(path.name)
    if count <= 1:
        if named and int(named["count"]) > 1:
            raise BitladderError(
                f"{path} is named as shard {int(named['number'])} of {int(named['count'])}, but its metadata have "
                "no split; give it a plain name, or fetch it again"
            )
        return ()
    number = first.number(NUMBER, U16)
    if number:
        raise BitladderError(f"{path} is shard {number + 1} of {count}; name the first: {shard_path(path, 1, count)}")
    if path.name != shard_path(path, 1, count).name:
        raise BitladderError(
            f"{path} is the first of {number_of(count, 'shard')}, which are found by their names: call it "
            f"{shard_path(path, 1, count).name}, and the others alike"
        )
    others = shards_of(path)[1:]
    missing = [(number, other) for number, other in enumerate(others, 2) if not other.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BitladderError(f"shard {missing[0][0]} of {count} is missing: {missing[0][1]}{more}; fetch it")
    return others


def join(headers: Sequence[GgufHeader]) -> dict[str, TensorInfo]:
    """The tensors of all shards, in order. Raises BitladderError if the shards are not of one model."""
    first, tensors = headers[0], dict(headers[0].tensors)
    if len(headers) == 1:
        return tensors
    total = first.number(TENSORS, I32)
    for index, header in enumerate(headers[1:], 1):
        number = header.number(NUMBER, U16)
        if number != index:
            raise BitladderError(f"{header.path} is shard {number + 1}, not {index + 1}: the names are mixed up")
        claims = header.number(COUNT, U16, len(headers)), header.number(TENSORS, I32, total)
        if claims != (len(headers), total):
            raise BitladderError(
                f"{header.path} is of another model than {first.path.name}: a shard of {claims[0]} with "
                f"{number_of(claims[1], 'tensor')} in all, not of {len(headers)} with {total}"
            )
        for name, tensor in header.tensors.items():
            if name in tensors:
                other = headers[tensors[name].part].path.name
                raise BitladderError(f"{header.path}: tensor {shown(name)} is also in {other}: not of one model")
            tensors[name] = tensor
    if len(tensors) != total:
        raise BitladderError(
            f"{first.path}: the {number_of(len(headers), 'shard')} should have {number_of(total, 'tensor')} and have "
            f"{len(tensors)}: they are not of one model, or damaged; fetch them again"
        )
    return tensors


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
