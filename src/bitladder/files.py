"""Files are written in one step, so that no reader sees half of one; and hashes of files."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from bitladder.errors import BitladderError, UsageError, nearest

if TYPE_CHECKING:
    import numpy.typing as npt

PathLike = str | os.PathLike[str]
# Bytes of a file name that `file_name` makes. File systems allow 255; names of rungs and temporary files are longer.
LONGEST_NAME = 160


def file_name(text: str, ending: str = "") -> str:
    """A file name from a text that somebody else wrote, such as the name in a model card.

    Letters, digits and the signs . _ + - stay. Anything else, such as a path separator, "..", a space or a control
    character, becomes "-". The name does not begin with "." or "-".

    Parameters:
        text: the text.
        ending: what the name ends in, such as ".gguf". It stays as it is.

    Returns:
        A name of at most 160 bytes; "model" and the ending if nothing of the text is left.
    """
    stem = re.sub(r"(?:[^\w.+-]|\.\.)+", "-", text).lstrip(".-")
    room = LONGEST_NAME - len(ending.encode())
    stem = stem.encode("utf-8", "ignore")[:room].decode("utf-8", "ignore").rstrip(".-")
    return (stem or "model") + ending


def shown_name(path: PathLike) -> str:
    """The name of a file for messages. A temporary file has the name of the file that it becomes.

    Example:
        >>> shown_name("run/.model-Q6_K.gguf.d3x9_k2a.tmp")
        'model-Q6_K.gguf'
        >>> shown_name("run/..model-Q6_K.gguf.tmp.d3x9_k2a.tmp")
        'model-Q6_K.gguf'
    """
    name, outer = pathlib.Path(path).name, ""
    while name != outer:  # a temporary file that replaces one has two of these
        name, outer = re.sub(r"^\.(.+?)(\.[a-z0-9_]{8})?\.tmp$", r"\1", name), name
    return name


def close_paths(path: PathLike) -> str:
    """The end of an error about a path that is not there: what is beside it under a close name, or nothing.

    Most names in a folder end alike, so a name that is close has little that differs.
    """
    path = pathlib.Path(path)
    try:
        close = nearest(path.name, sorted(other.name for other in path.parent.iterdir()), least=0.8)
    except (OSError, ValueError):  # no such folder, or a zero byte in the path
        return ""
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in close)}?" if close else ""


_unfinished: set[pathlib.Path] = set()


def discard_unfinished() -> None:
    """Removes the temporary files of `replacing` that are being written, in a process that dies."""
    for temporary in list(_unfinished):
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: PathLike, *, sync: bool = True) -> Iterator[pathlib.Path]:
    """Yields a temporary path in the folder of `path`. After success the file is synced and renamed to `path`.

    Without `sync`, a crash of the machine (not of the process) can leave a damaged file: for what can be made again.

    After an exception, Ctrl-C included, the temporary file is removed and `path` stays as it was. Raises BitladderError
    that names `path` if a write fails for want of space or rights.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise BitladderError(f"{path} is a directory; name a file")
    if path.exists() and not path.is_file():
        # A rename would replace a device or a pipe.
        raise BitladderError(f"{path} is not a regular file; name another one")
    if path.is_symlink():
        path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise BitladderError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    temporary = pathlib.Path(name)
    _unfinished.add(temporary)
    try:
        yield temporary
        # mkstemp makes private files. The result gets the rights of any new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        if sync:
            sync_file(temporary)
        temporary.replace(path)
    except OSError as error:
        # numpy says only how much was written.
        reason = error.strerror or f"the disk takes no more ({error})"
        raise BitladderError(f"cannot write {path}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # of a disk that can no longer be written to
            temporary.unlink(missing_ok=True)
        _unfinished.discard(temporary)


def sync_file(path: pathlib.Path) -> None:
    """Waits until the disk has taken a file. Raises OSError if it does not."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file in one step (see `replacing`). Of a file name that is not UTF-8, "?" stands for odd bytes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: PathLike, value: Any) -> None:
    """Writes indented JSON in one step (see `replacing`). Raises ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_arrays(path: PathLike) -> "dict[str, npt.NDArray[Any]]":
    """The arrays of a file that `numpy.savez` wrote, by name. Nothing in it is unpickled.

    Raises BitladderError that names the file if it is missing or damaged. A packed file, which `savez` does not write
    and which could fill the memory, is damaged too.
    """
    import numpy as np  # not for commands that only show their help

    try:
        with np.load(path, allow_pickle=False) as file:
            if any(entry.compress_type for entry in file.zip.infolist()):
                raise ValueError("it is packed")
            arrays = {name: np.asanyarray(file[name]) for name in file.files}
    except Exception as error:  # a damaged zip or array raises errors of a dozen classes
        raise BitladderError(
            f"{path} is damaged ({type(error).__name__}); delete it, so that it is made again"
        ) from error
    if any(array.dtype.hasobject or array.dtype.kind == "S" for array in arrays.values()):
        raise BitladderError(f"{path} is damaged (it holds no arrays); delete it, so that it is made again")
    return arrays


def same_file(a: PathLike, b: PathLike) -> bool:
    """Whether two paths name one file: hard and symbolic links and other spellings included, also of no file yet."""
    first, second = pathlib.Path(a), pathlib.Path(b)
    try:
        return first.samefile(second)
    except OSError:
        return first.resolve() == second.resolve()


def refuse_inputs(outputs: Iterable[PathLike], inputs: Iterable[PathLike]) -> None:
    """Raises UsageError if one of the files to write is one of the files that are read."""
    inputs = list(inputs)
    for path in outputs:
        if any(same_file(path, read) for read in inputs):
            raise UsageError(f"{path} is an input; name another output")


def sha256_file(path: PathLike) -> str:
    """The SHA-256 of a file in hexadecimal digits. Raises BitladderError if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of bytes in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


SEAL = 4  # bytes of the checksum behind what is kept: a damaged byte would change a result unnoticed


def seal(path: pathlib.Path) -> None:
    """Puts the checksum (CRC-32, little-endian) of a file behind it. Who reads it stops before that."""
    total = _sum_of(path, path.stat().st_size)
    with path.open("ab") as stream:
        stream.write(total)


def check_seal(path: pathlib.Path) -> None:
    """Reads a whole file. Raises ValueError if it is not as it was sealed."""
    size = path.stat().st_size - SEAL
    with path.open("rb") as stream:
        stream.seek(max(size, 0))
        kept = stream.read()
    if kept != _sum_of(path, size):
        raise ValueError("another checksum")


def _sum_of(path: pathlib.Path, size: int) -> bytes:
    """The checksum of the first `size` bytes of a file."""
    crc = 0
    with path.open("rb") as stream:
        while size > 0 and (part := stream.read(min(size, 1 << 20))):
            crc, size = zlib.crc32(part, crc), size - len(part)
    return crc.to_bytes(SEAL, "little")


def is_alive(process: int) -> bool:
    """Whether there is a process of this number. On Windows it is taken to be there."""
    if sys.platform == "win32":  # `os.kill` would end it
        return True
    try:
        os.kill(process, 0)
    except PermissionError:
        return True  # somebody else's process
    except (OSError, OverflowError):
        return False
    return True


class Closing:
    """The base of objects that hold native memory or a file. The end of a `with` calls `close`."""

    def close(self) -> None:
        """Frees it. A second call does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
