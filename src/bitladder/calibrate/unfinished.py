"""What interrupted work leaves beside its output, and the key that says whether it is still valid."""

import contextlib
import math
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine import versions
from bitladder.errors import BitladderError
from bitladder.files import SEAL, check_seal, replacing, seal, write_text
from bitladder.gguf import open_model
from bitladder.keys import Algorithm, key_of, versions_of
from bitladder.progress import Progress
from bitladder.text import Text
from bitladder.units import number_of

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]


def job_key(
    model: str | os.PathLike[str], texts: Sequence[Text], *algorithms: Algorithm, sha256: str = "", **settings: Any
) -> str:
    """The key of work on a model and texts (see `keys.key_of`). The library's commit is in it.

    The model counts by the names of its tensors and the sizes and times of its files, so that it need not be read.

    Parameters:
        model: path of a GGUF.
        texts: what is read.
        algorithms: whose results the work is made of.
        sha256: of the model's content, where another machine must find the same key; it counts instead of the times.
        settings: whatever else decides the result.
    """
    with open_model(model) as file:
        stats = [part.stat() for part in file.parts]
        files = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
        header = [list(file.tensors), sha256 or files]
    return key_of(
        {
            "model": header,
            "texts": [text.sha256 for text in texts],
            "algorithms": versions_of(*algorithms),
            "library": versions(),
            **settings,
        }
    )


class UnfinishedWork:
    """A folder OUT.parts beside an output: finished pieces, and the state of the piece that is being made.

    The folder is emptied if it has another key. Saving takes at most a sixth of the time between two saves.

    Parameters:
        out: path of the output.
        key: of all that decides the result.
        seconds: time between two saves, at least.

    Raises:
        BitladderError: a folder of that name is there, and is not of this kind.
    """

    def __init__(self, out: pathlib.Path, key: str, seconds: float = 50.0) -> None:
        self.folder = out.with_name(out.name + ".parts")
        self._key = key
        self._seconds = seconds
        self._next = time.monotonic() + seconds
        self._checked = set[str]()  # pieces whose sums were right
        if self.folder.exists() and not self._has_key():
            self.remove()

    def _has_key(self) -> bool:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.folder / "key").read_text(encoding="utf-8") == self._key
        return False

    def path(self, name: str) -> pathlib.Path:
        """Where a piece of this name is or will be. The folder is made."""
        if not self._has_key():
            # The folder comes to its name with the key in it, so that a kill leaves none without a key.
            self._clear_aside()
            write_text(self._aside / "key", self._key)
            self._aside.rename(self.folder)
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether a piece is there."""
        return (self.folder / name).is_file()

    def put(self, name: str, array: npt.NDArray[Any]) -> None:
        """Keeps an array."""
        with replacing(self.path(name)) as temporary:
            with temporary.open("wb") as stream:
                np.save(stream, array)
            seal(temporary)

    def put_rows(self, name: str, shape: tuple[int, int], rows: Iterable[Floats]) -> None:
        """Keeps a float32 array of this shape, whose rows are made one after the other."""
        # No memory map: where the disk is full, a write fails, but a map kills the process.
        with replacing(self.path(name)) as temporary:
            with temporary.open("wb") as stream:
                head = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, head)
                for row in rows:
                    stream.write(np.ascontiguousarray(row, np.float32).data)
            seal(temporary)

    def put_arrays(self, name: str, arrays: Arrays) -> None:
        """Keeps some arrays in one piece, which has checksums."""
        with replacing(self.path(name)) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]

    def get_arrays(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """Arrays that were kept in one piece. Raises BitladderError (`damaged`)."""
        path = self.folder / name
        try:
            with np.load(path, allow_pickle=False) as data:
                return dict(data)
        except Exception as error:  # whatever a damaged zip or array may raise
            raise self.damaged(f"{path} is damaged") from error

    def get(self, name: str) -> npt.NDArray[Any]:
        """An array that was kept, read from the file when it is used. Raises BitladderError (`damaged`)."""
        path = self.folder / name
        try:
            if name not in self._checked:
                check_seal(path)
                self._checked.add(name)
            array: npt.NDArray[Any] = np.lib.format.open_memmap(path, "r")
            return array
        except Exception as error:  # a damaged header raises errors of its tokenizer too
            raise self.damaged(f"{path} is damaged") from error

    def kept_rows(self, name: str, shape: tuple[int, ...]) -> int:
        """How many arrays of this shape were appended to a piece. What a crash left of another one does not count."""
        path = self.folder / name
        return path.stat().st_size // (4 * math.prod(shape) + SEAL) if path.is_file() else 0

    def append_row(self, name: str, index: int, row: Floats) -> None:
        """Puts a float32 array at the end of a piece, after the first `index` of them. What is behind is cut off."""
        path = self.path(name)
        try:
            self._write_row(path, index, row)
        except OSError as error:
            raise BitladderError(f"cannot write {path}: {error.strerror}") from error

    def _write_row(self, path: pathlib.Path, index: int, row: Floats) -> None:
        with path.open("r+b" if path.exists() else "wb") as stream:
            stream.truncate(index * (row.nbytes + SEAL))
            stream.seek(index * (row.nbytes + SEAL))
            data = np.ascontiguousarray(row, np.float32).tobytes()
            stream.write(data + zlib.crc32(data).to_bytes(SEAL, "little"))

    def read_row(self, name: str, index: int, shape: tuple[int, ...]) -> Floats:
        """The array number `index` of this shape in a piece. Raises BitladderError (`damaged`)."""
        size = 4 * math.prod(shape)
        path = self.folder / name
        with path.open("rb") as stream:
            stream.seek(index * (size + SEAL))
            data, kept = bytearray(stream.read(size)), stream.read(SEAL)
        if len(kept) < SEAL or zlib.crc32(data) != int.from_bytes(kept, "little"):
            raise self.damaged(f"{path} is damaged")
        return np.frombuffer(data, np.float32).reshape(shape)

    def damaged(self, what: str) -> BitladderError:
        """The error of damaged work. The folder is deleted, so that the next call begins anew."""
        self.remove()
        return BitladderError(f"{what}, and was deleted with the rest of the unfinished work; give the command again")

    def drop(self, *names: str) -> None:
        """Deletes pieces that nobody needs any more."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def due(self) -> bool:
        """Whether it is time to save the state."""
        return time.monotonic() >= self._next

    def save_state(self, label: str, done: int, arrays: Arrays) -> None:
        """Keeps the state of the piece `label`: `done` units of work are in the arrays."""
        begun = time.monotonic()
        with replacing(self.path("state"), sync=False) as temporary, temporary.open("wb") as stream:
            np.savez(stream, label=label, done=done, **arrays)  # type: ignore[arg-type]
        ended = time.monotonic()
        self._next = ended + max(self._seconds, 5 * (ended - begun))

    def load_state(self, label: str, arrays: Arrays, progress: Progress) -> int:
        """Fills the arrays with the state of the piece `label`, if there is one. Returns the units of work in it."""
        path = self.folder / "state"
        if not path.is_file():
            return 0
        try:
            with np.load(path, allow_pickle=False) as data:
                if str(data["label"]) != label:
                    return 0
                done = int(data["done"])
                # All are read once before the first is filled. Two of them are never in memory at once.
                for name, array in arrays.items():
                    np.broadcast_to(data[name], array.shape)  # raises for another shape
                for name, array in arrays.items():
                    array[...] = data[name]
        except Exception:  # whatever a damaged zip or array may raise
            progress.warn(f"{path} cannot be read; the pass starts from the first chunk")
            return 0
        progress.info(f"goes on after {number_of(done, 'chunk')} ({self.folder.name})")
        return done

    def remove(self) -> None:
        """Deletes the folder: the output is complete, or the folder has another key."""
        if not self.folder.exists():
            return
        if not (self.folder / "key").is_file():
            raise BitladderError(f"{self.folder} is in the way and was not made by bitladder; move it")
        # After a kill no half of the folder is under its name.
        self._clear_aside()
        self.folder.rename(self._aside)
        self._clear_aside()

    @property
    def _aside(self) -> pathlib.Path:
        """The folder while it is made or deleted. A run that continues sweeps it."""
        return self.folder.with_name(f".{self.folder.name}.tmp")

    def _clear_aside(self) -> None:
        if self._aside.exists():
            shutil.rmtree(self._aside)
