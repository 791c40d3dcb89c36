"""What a measurement depends on: what a model is (its content's hash, size, vocabulary, head), and how it is measured.

Chunks are decoded as in llama-perplexity. Results are kept by content: a JSON value and arrays in one .npz file, whose
name is the key of all that decides the result.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine import Context, Decoding, Model, main_memory
from bitladder.errors import BitladderError
from bitladder.files import read_arrays, replacing, sha256_bytes, sha256_file, shown_name
from bitladder.gguf import GgufFile, TensorInfo, joined_sha256, open_model, shards_of
from bitladder.keys import key_of
from bitladder.options import option
from bitladder.text import Chunks

Arrays = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]


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


@dataclasses.dataclass(frozen=True)
class MeasureOptions(Decoding):
    """How a model is measured: how it is decoded, and on how much of a text.

    Raises:
        UsageError: a number is outside its limits.
    """

    n_batch: int = option(
        512, "-b", "--batch-size", least=1, decides=False, metavar="TOKENS", help="Tokens decoded by one call."
    )
    chunks: int | None = option(
        None, "--chunks", least=1, metavar="N", help="Chunks of the text that are measured.", unset="all"
    )
    unscored: int | None = option(
        None, least=0, help="Predictions at the start of a chunk that are not scored; None for those of its first half."
    )

    def deciding(self) -> dict[str, object]:
        """As of `Decoding`, the number of chunks, and what is scored of them where that is not the second half."""
        scored = {} if self.unscored is None else {"unscored": self.unscored}
        return {**super().deciding(), "chunks": self.chunks, **scored}

    def limit(self, available: int) -> int:
        """The number of chunks to measure of those that are available."""
        return available if self.chunks is None else min(self.chunks, available)

    def load(self, path: pathlib.Path) -> Model:
        """Loads a model in the way that needs least memory."""
        # The CPU back end repacks blocks. If the file is mapped, such blocks are in memory twice. A model that hardly
        # fits into memory is mapped nevertheless, so that the system can drop its pages.
        size = sum(part.stat().st_size for part in parts(path) if part.is_file())
        return Model(path, mmap=2 * size > main_memory(), gpu_layers=self.gpu_layers)


UNSCORED = 16  # one in so many tokens of such a chunk is not scored, at its start


def decision_chunk(n_ctx: int) -> int:
    """Tokens of a chunk on which two models are decided between: half of those of a whole one."""
    return max(4, n_ctx // 2)


def nearly_all_scored(decoding: Decoding, chunks: int) -> MeasureOptions:
    """How chunks are measured of which all tokens are scored but the first sixteenth.

    A token's KLD hardly depends on its place in a chunk, but for the first few (benchmarks/scored_tokens.py).

    Parameters:
        decoding: how a chunk is decoded.
        chunks: of the text.
    """
    unscored = decoding.n_ctx // UNSCORED
    return MeasureOptions(**dataclasses.asdict(decoding) | {"chunks": chunks, "unscored": unscored})


def decision_settings(decoding: Decoding, chunks: int) -> MeasureOptions:
    """How two models are measured to decide between them: half chunks, nearly all of whose tokens are scored.

    As many tokens are scored as llama-perplexity scores of whole chunks, for half of the decoding.

    Parameters:
        decoding: how a whole chunk is decoded.
        chunks: of the text.

    Example:
        >>> settings = decision_settings(Decoding(n_ctx=512), 4)
        >>> settings.n_ctx, settings.unscored
        (256, 16)
    """
    return nearly_all_scored(decoding.replace(n_ctx=decision_chunk(decoding.n_ctx)), chunks)


def decode(context: Context, chunks: Chunks, chunk: int) -> Iterator[tuple[int, Floats]]:
    """Decodes a chunk from an empty context, in batches of the context's n_batch.

    Yields:
        For each batch with scored positions, the number of scored rows before it and its logits, float32
        [rows, n_vocab]. The logits are a view of native memory, valid until the next step.
    """
    context.clear()
    inputs = chunks.inputs(chunk)
    positions = np.arange(chunks.n_ctx, dtype=np.int32)
    outputs = (positions >= chunks.first) & (positions < chunks.n_ctx - 1)
    for start in range(0, chunks.n_ctx, context.n_batch):
        stop = min(start + context.n_batch, chunks.n_ctx)
        part = slice(start, stop)
        count = int(outputs[part].sum())
        context.decode(inputs[part], positions[part], np.zeros(stop - start, np.int32), outputs[part])
        if count:
            yield max(start - chunks.first, 0), context.logits()
