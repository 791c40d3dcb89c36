"""What work that is cut short leaves beside its output, and how it is known again."""

import contextlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.engine.native import versions
from bitladder.errors import BitladderError
from bitladder.files import replacing, sha256_bytes, write_text
from bitladder.gguf.reader import GgufFile
from bitladder.progress import Progress
from bitladder.text.texts import Text

Floats = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]


def job_key(model: str | os.PathLike[str], texts: Sequence[Text], options: Any) -> str:
    """A hash of all that decides a result: the model (its header, sizes and times of its files), texts, options (as
    JSON), and the library's versions."""
    with GgufFile(model) as file:
        stats = [part.stat() for part in file.parts]
        header = [list(file.tensors), *((stat.st_size, stat.st_mtime_ns) for stat in stats)]
    what = [header, [text.sha256 for text in texts], options, versions()]
    return sha256_bytes(json.dumps(what).encode())


class Keep:
    """A folder OUT.parts beside an output: finished pieces, and the state of the one that is being made.

    It is emptied if it is of another job (`key`). Saving takes no more than a twentieth of the time between two saves.
    """

    def __init__(self, out: pathlib.Path, key: str, seconds: float = 60.0) -> None:
        self.folder = out.with_name(out.name + ".parts")
        self._key = key
        self._seconds = seconds
        self._next = time.monotonic() + seconds
        if not (self._is_ours() or not self.folder.exists()):
            self.remove()

    def _is_ours(self) -> bool:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.folder / "key").read_text(encoding="utf-8") == self._key
        return False

    def path(self, name: str) -> pathlib.Path:
        """Where a piece of this name is or will be; the folder is made."""
        if not self._is_ours():
            write_text(self.folder / "key", self._key)
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether a piece is there."""
        return (self.folder / name).is_file()

    def put(self, name: str, array: npt.NDArray[Any]) -> None:
        """Keep an array."""
        with replacing(self.path(name)) as temporary, temporary.open("wb") as stream:
            np.save(stream, array)

    def put_rows(self, name: str, shape: tuple[int, int], rows: Iterable[Floats]) -> None:
        """Keep a float32 array of this shape whose rows are taken one after the other."""
        with replacing(self.path(name)) as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            for index, row in enumerate(rows):
                array[index] = row
            array.flush()

    def get(self, name: str) -> npt.NDArray[Any]:
        """An array that was kept; it is read when it is used. Raises BitladderError if it is damaged."""
        path = self.folder / name
        try:
            return np.load(path, "r", allow_pickle=False)  # type: ignore[no-any-return]
        except (OSError, ValueError, EOFError) as error:
            raise BitladderError(f"{path} is damaged; delete the folder {self.folder} and start again") from error

    def due(self) -> bool:
        """Whether the state should be saved now."""
        return time.monotonic() >= self._next

    def save_state(self, label: str, done: int, arrays: Arrays) -> None:
        """Keep the state of the piece `label`, of which `done` units of work are in the arrays."""
        begun = time.monotonic()
        with replacing(self.path("state")) as temporary, temporary.open("wb") as stream:
            np.savez(stream, label=label, done=done, **arrays)  # type: ignore[arg-type]
        ended = time.monotonic()
        self._next = ended + max(self._seconds, 20 * (ended - begun))

    def load_state(self, label: str, arrays: Arrays, progress: Progress) -> int:
        """Fill the arrays with the state of the piece `label` if there is one; return the units of work in it."""
        path = self.folder / "state"
        if not path.is_file():
            return 0
        try:
            with np.load(path, allow_pickle=False) as data:
                if str(data["label"]) != label:
                    return 0
                found = {name: data[name] for name in arrays}
                done = int(data["done"])
            for name, array in arrays.items():
                array[...] = found[name]
        except Exception:  # whatever a damaged zip or array may raise
            progress.warn(f"{path} cannot be read; the pass starts from the first chunk")
            return 0
        progress.info(f"going on after {done} chunks ({self.folder.name})")
        return done

    def remove(self) -> None:
        """Delete all of it: the output is complete, or this is not ours."""
        if not self.folder.exists():
            return
        if not (self.folder / "key").is_file():
            raise BitladderError(f"{self.folder} is in the way and was not made by bitladder; move it")
        shutil.rmtree(self.folder)
