"""The shards of a split model: names, the check that they belong together, and a writer that leaves all or none."""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.files import Closing, replacing, sha256_bytes
from bitladder.gguf.header import I32, U16, GgufHeader, TensorInfo, Value, i32, shown, u16
from bitladder.gguf.writer import GgufWriter, TensorPlan, file_size, padded

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
            f"{path} is the first of {count} shards, which are found by their names: "
            f"call it {shard_path(path, 1, count).name}, and the others alike"
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
                f"{header.path} is of another model than {first.path.name}: a shard of {claims[0]} with {claims[1]} "
                f"tensors in all, not of {len(headers)} with {total}"
            )
        for name, tensor in header.tensors.items():
            if name in tensors:
                other = headers[tensors[name].part].path.name
                raise BitladderError(f"{header.path}: tensor {shown(name)} is also in {other}: not of one model")
            tensors[name] = tensor
    if len(tensors) != total:
        raise BitladderError(
            f"{first.path}: the {len(headers)} shards should have {total} tensors and have {len(tensors)}: "
            "they are not of one model, or damaged; fetch them again"
        )
    return tensors


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
        raise BitladderError(f"{out} would have {len(groups)} shards, {MAX_SHARDS} are allowed; use a larger limit")
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
