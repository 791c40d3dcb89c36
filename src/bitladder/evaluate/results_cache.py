"""Results kept by content, so that what was measured once is not measured again.

A result is a JSON value and arrays, in one .npz file whose name is the hash of everything that decides it.
"""

import hashlib
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.files import replacing

Arrays = dict[str, npt.NDArray[Any]]


class Results(Protocol):
    """Where results are kept. Keys are JSON values: everything that decides the result, content by its hash."""

    def get(self, key: Mapping[str, Any]) -> tuple[Any, Arrays] | None:
        """The result of that key, or None."""

    def put(self, key: Mapping[str, Any], value: Any, arrays: Arrays) -> None:
        """Keep a result."""


class NoResults:
    """Keeps nothing."""

    def get(self, key: Mapping[str, Any]) -> tuple[Any, Arrays] | None:
        """None."""

    def put(self, key: Mapping[str, Any], value: Any, arrays: Arrays) -> None:
        """Nothing."""


class ResultFolder:
    """Results in a folder of their own, which may be deleted at any time."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def get(self, key: Mapping[str, Any]) -> tuple[Any, Arrays] | None:
        """The result of that key, or None if there is none or its file is damaged."""
        try:
            with np.load(self._path(key), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return json.loads(arrays.pop("json").tobytes()), arrays
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def put(self, key: Mapping[str, Any], value: Any, arrays: Arrays) -> None:
        """Keep a result. A folder that cannot be written to keeps nothing: the result itself is not lost."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        try:
            with replacing(self._path(key)) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **{"json": data, **arrays})  # type: ignore[arg-type]  # names, not its own options
        except BitladderError:
            return

    def _path(self, key: Mapping[str, Any]) -> pathlib.Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.npz"
