"""The shards of a split model: their names, and the check that they belong together.

Names and keys are llama.cpp's (llama_split_path in src/llama.cpp, tools/gguf-split): shard 2 of 3 of NAME.gguf is
NAME-00002-of-00003.gguf; `split.no` counts from zero; the first shard carries the metadata.
"""

import pathlib
import re
from collections.abc import Sequence

from bitladder.errors import BitladderError
from bitladder.files import sha256_bytes
from bitladder.gguf.header import GgufHeader, TensorInfo, shown
from bitladder.gguf.values import I32, U16

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
