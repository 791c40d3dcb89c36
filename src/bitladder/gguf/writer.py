"""Streaming a GGUF file out, or shards: the header first, since all sizes are known, then tensors in order.

Of the shards of a split model the writer leaves all or none.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitladder.engine import TensorType
from bitladder.errors import BitladderError
from bitladder.files import Closing, replacing
from bitladder.gguf.header import DEFAULT_ALIGNMENT as ALIGNMENT
from bitladder.gguf.header import TensorInfo, Value, i32, string, u16
from bitladder.gguf.reader import COUNT, MAX_SHARDS, NUMBER, SPLIT_KEYS, TENSORS, plain_path, shard_path
from bitladder.units import number_of

if TYPE_CHECKING:
    from _typeshed import SupportsWrite


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

    def __init__(
        self, stream: "SupportsWrite[Any]", metadata: Mapping[str, Value], tensors: Sequence[TensorPlan]
    ) -> None:
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


Groups = Sequence[Sequence[TensorPlan]]  # the tensors of each shard; only the first may have none


def group_by_size(tensors: Sequence[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    """Tensors in their order, in groups whose padded bytes, without header, are at most `max_bytes`.

    A tensor is never split. A tensor that is larger than the limit has a group of its own.
    """
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        size += padded(tensor.nbytes)
        if groups[-1] and size > max_bytes:
            groups.append([])
            size = padded(tensor.nbytes)
        groups[-1].append(tensor)
    return groups


def group_as(tensors: Sequence[TensorPlan], source: Mapping[str, TensorInfo]) -> list[list[TensorPlan]]:
    """Tensors grouped and ordered as in the shards of a source (--keep-split).

    A shard without tensors is left out, except the first, which carries the metadata.

    Parameters:
        tensors: the tensors to write. The source must have each of them.
        source: `GgufFile.tensors` of the source.
    """
    place = {name: index for index, name in enumerate(source)}
    groups: dict[int, list[TensorPlan]] = {0: []}
    for tensor in sorted(tensors, key=lambda tensor: place[tensor.name]):
        groups.setdefault(source[tensor.name].part, []).append(tensor)
    return list(groups.values())


def split_sizes(metadata: Mapping[str, Value], groups: Groups) -> list[int]:
    """Exact bytes of each file that `writing` makes."""
    return [file_size(values, group) for values, group in zip(_metadata_of_each(metadata, groups), groups, strict=True)]


def output_paths(out: str | os.PathLike[str], groups: Groups) -> list[pathlib.Path]:
    """The files that `writing` makes: `out` for one group, OUT-00001-of-0000N.gguf and so on for several.

    An `out` that is named as a shard stands for the model: X-00001-of-00003.gguf for X.gguf. Raises BitladderError for
    more shards than the format can count.
    """
    if len(groups) > MAX_SHARDS:
        raise BitladderError(
            f"{out} would have {number_of(len(groups), 'shard')}, {MAX_SHARDS:,} are allowed; use a larger limit"
        )
    if len(groups) == 1:
        return [plain_path(pathlib.Path(out))]
    return [shard_path(pathlib.Path(out), number, len(groups)) for number in range(1, len(groups) + 1)]


@contextlib.contextmanager
def writing(out: str | os.PathLike[str], metadata: Mapping[str, Value], groups: Groups) -> Iterator["SplitWriter"]:
    """Yields a writer of a model, which takes the tensors of all groups in order.

    The files get their names when all are complete, the first shard last. After an exception, Ctrl-C included, none is
    left. Several files have the keys of a split; a single file has none.

    Parameters:
        out: the file, or the model's name for several files (see `output_paths`).
        metadata: values by key.
        groups: the tensors of each file.

    Raises:
        BitladderError: a file cannot be written.
    """
    paths = output_paths(out, groups)
    with _replacing_all(paths) as temporaries:
        files = map(_File, paths, temporaries, _metadata_of_each(metadata, groups), groups)
        with SplitWriter(list(files)) as writer:
            yield writer
            writer.finish()


@dataclasses.dataclass(frozen=True)
class _File:
    """A file to write: its path, its temporary path, and its content."""

    path: pathlib.Path
    temporary: pathlib.Path
    metadata: Mapping[str, Value]
    tensors: Sequence[TensorPlan]


class SplitWriter(Closing):
    """Takes the bytes of tensors in the planned order, as GgufWriter does, and changes files. See `writing`."""

    def __init__(self, files: Sequence[_File]) -> None:
        self._waiting = list(files)[::-1]
        self._begin_next()

    def write(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """Appends bytes to tensor `name`, which must be the current or the next one."""
        while self._writer.complete and self._waiting:
            self.close()
            self._begin_next()
        with _naming(self._path):
            self._writer.write(name, data)

    def finish(self) -> None:
        """Checks that every tensor is complete."""
        self._writer.finish()
        if self._waiting:
            raise BitladderError(f"internal: {self._waiting[-1].path.name} was not written")

    def close(self) -> None:
        """Closes the current file."""
        with _naming(self._path):
            self._stream.close()

    def _begin_next(self) -> None:
        file = self._waiting.pop()
        self._path = file.path
        with _naming(file.path):
            self._stream = file.temporary.open("wb")
            self._writer = GgufWriter(self._stream, file.metadata, file.tensors)


def _metadata_of_each(metadata: Mapping[str, Value], groups: Groups) -> list[dict[str, Value]]:
    own = {key: value for key, value in metadata.items() if key not in SPLIT_KEYS}
    if len(groups) == 1:
        return [own]
    total = sum(map(len, groups))
    keys = [{NUMBER: u16(i), COUNT: u16(len(groups)), TENSORS: i32(total)} for i in range(len(groups))]
    return [own | keys[0], *keys[1:]]


@contextlib.contextmanager
def _replacing_all(paths: Sequence[pathlib.Path]) -> Iterator[list[pathlib.Path]]:
    """`files.replacing` for several files: all of them get their names, or the files before them stay.

    Files that are replaced are moved aside first, the first shard before the others. If the process is killed at any
    moment, no first shard stands beside shards of another model.
    """
    if len(paths) == 1:
        with replacing(paths[0]) as temporary:
            yield [temporary]
        return
    inodes: set[int] = set()
    aside: dict[pathlib.Path, pathlib.Path] = {}
    try:
        with contextlib.ExitStack() as stack:
            # The stack closes in the opposite order: the first shard, which makes a model of the others, is last.
            temporaries = [stack.enter_context(replacing(path)) for path in paths]
            inodes |= {temporary.stat().st_ino for temporary in temporaries}
            yield temporaries
            for path in filter(pathlib.Path.exists, paths):
                with _naming(path):
                    kept = path.resolve()
                    aside[kept] = kept.rename(kept.with_name(f".{kept.name}.old.tmp"))
    except BaseException:
        for path in paths:
            if path.exists() and path.stat().st_ino in inodes:
                path.resolve().unlink()
        for kept, moved in reversed(aside.items()):
            with _naming(kept, f"; the file before it is {moved.name} now"):
                moved.replace(kept)
        raise
    for moved in aside.values():
        with _naming(moved):
            moved.unlink()


@contextlib.contextmanager
def _naming(path: pathlib.Path, more: str = "") -> Iterator[None]:
    """Names the file that could not be written: `replacing` would name the last shard for all of them."""
    try:
        yield
    except OSError as error:
        raise BitladderError(f"cannot write {path}: {error.strerror or error}{more}") from error
