"""Files are written in one step, so that no reader sees half of one; and hashes of files."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from bitladder.errors import BitladderError

PathLike = str | os.PathLike[str]


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
    try:
        yield temporary
        # mkstemp makes private files. The result gets the rights of any new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        if sync:
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise BitladderError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file in one step (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any) -> None:
    """Writes indented JSON in one step (see `replacing`). Raises ValueError for NaN, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
