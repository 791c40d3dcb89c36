"""Results kept by content, so that the same measurement is not made twice.

A result is a JSON value and arrays in one .npz file. The name of the file is the key of all that decides the result.
"""

import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.files import replacing
from bitladder.keys import key_of

Arrays = dict[str, npt.NDArray[Any]]


class Results(Protocol):
    """Where results are kept. `inputs` is all that decides a result, as `keys.key_of` takes it."""

    def get(self, inputs: Mapping[str, Any]) -> tuple[Any, Arrays] | None:
        """The kept result of some inputs, or None."""

    def put(self, inputs: Mapping[str, Any], value: Any, arrays: Arrays) -> None:
        """Keeps a result."""


class NoResults:
    """Keeps nothing."""

    def get(self, inputs: Mapping[str, Any]) -> tuple[Any, Arrays] | None:
        """None."""

    def put(self, inputs: Mapping[str, Any], value: Any, arrays: Arrays) -> None:
        """Does nothing."""


class ResultFolder:
    """Results in a folder of their own. The user may delete the folder at any time."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def get(self, inputs: Mapping[str, Any]) -> tuple[Any, Arrays] | None:
        """The kept result of some inputs, or None if there is none or its file is damaged."""
        try:
            with np.load(self._path(inputs), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return json.loads(arrays.pop("json").tobytes()), arrays
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def put(self, inputs: Mapping[str, Any], value: Any, arrays: Arrays) -> None:
        """Keeps a result. In a folder that cannot be written nothing is kept."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        try:
            with replacing(self._path(inputs)) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **{"json": data, **arrays})  # type: ignore[arg-type]  # names, not its own options
        except BitladderError:
            return

    def _path(self, inputs: Mapping[str, Any]) -> pathlib.Path:
        key = key_of(inputs)
        return self.folder / key[:2] / f"{key}.npz"
