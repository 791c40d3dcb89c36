"""What a model is (its content's hash, size, vocabulary, head), and results kept by content.

A result is a JSON value and arrays in one .npz file. The name of the file is the key of all that decides the result.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.files import read_arrays, replacing, sha256_bytes, sha256_file, shown_name
from bitladder.gguf import GgufFile, TensorInfo, joined_sha256, open_model, shards_of
from bitladder.keys import key_of


@dataclasses.dataclass(frozen=True)
class Identity:
    """A GGUF model.

    Parameters:
        path: the file, or the first of its shards.
        sha256: of the file's content; of a split model, of the shards' hashes in order.
        bytes: size of all files.
        bpw: bits per weight over all tensors.
        architecture: as the metadata name it.
        vocabulary: SHA-256 of the token list.
        head: the tensor that makes logits of hidden states.
    """

    path: pathlib.Path
    sha256: str
    bytes: int
    bpw: float
    architecture: str
    vocabulary: str
    head: TensorInfo

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return shown_name(self.path)


def parts(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a model: the file itself, or all shards if it is the first of several."""
    return list(shards_of(path))


def identify(path: pathlib.Path) -> Identity:
    """Reads a model's headers and hashes its content.

    Raises:
        BitladderError: the file is missing, cannot be read, or is not a GGUF language model.
    """
    if not path.exists():
        raise BitladderError(f"no such model file: {path}")
    with open_model(path) as file:
        head, vocabulary = _head_and_vocabulary(file)
        digest = joined_sha256([sha256_file(part) for part in file.parts])
        return Identity(path, digest, file.size, file.bpw, file.architecture, vocabulary, head)


def check_vocabularies(model: pathlib.Path, base: pathlib.Path) -> None:
    """Raises BitladderError if two models have different vocabularies. Reads only the headers of the files."""
    for path in (model, base):
        if not path.exists():
            raise BitladderError(f"no such model file: {path}")
    with open_model(model) as file, open_model(base) as base_file:
        head, vocabulary = _head_and_vocabulary(file)
        base_head, base_vocabulary = _head_and_vocabulary(base_file)
    if vocabulary != base_vocabulary or head.rows != base_head.rows:
        raise unlike(model.name, head.rows, base.name, base_head.rows)


def unlike(model: str, tokens: int, base: str, base_tokens: int) -> BitladderError:
    """The error for two models with different vocabularies."""
    return BitladderError(
        f"{model} and the base {base} have different vocabularies ({tokens} and {base_tokens} tokens): "
        "they cannot be compared"
    )


def _head_and_vocabulary(file: GgufFile) -> tuple[TensorInfo, str]:
    # A model without an output matrix uses the token embeddings ("tied").
    head = file.tensors.get("output.weight") or file.tensors.get("token_embd.weight")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if head is None or tokens is None:
        raise BitladderError(f"{file.path} is not a language model: it has no token embeddings or no vocabulary")
    return head, sha256_bytes(tokens.raw)


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
            arrays = read_arrays(self._path(inputs))
            return json.loads(arrays.pop("json").tobytes()), arrays
        except (BitladderError, KeyError, ValueError, RecursionError):
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
