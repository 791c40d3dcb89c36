"""What a model is: its content's hash, size, vocabulary, and its head."""

import dataclasses
import pathlib

from bitladder.errors import BitladderError
from bitladder.files import sha256_bytes, sha256_file
from bitladder.gguf import GgufFile, TensorInfo, open_model
from bitladder.gguf.shards import joined_sha256, shards_of


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
        return self.path.name


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
