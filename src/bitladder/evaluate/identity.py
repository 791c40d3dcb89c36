"""What a model is: its content's hash, size, vocabulary, and its head."""

import dataclasses
import pathlib

from bitladder.errors import BitladderError
from bitladder.files import sha256_bytes, sha256_file
from bitladder.gguf.reader import GgufFile, TensorInfo
from bitladder.gguf.shards import joined_sha256, shards_of


@dataclasses.dataclass(frozen=True)
class Identity:
    """A GGUF model as a file, or as the first of its shards.

    `sha256` is of the file's content (of a split model: of the shards' hashes in order), `bytes` the size of all
    files, `bpw` bits per weight over all tensors, `vocabulary` the SHA-256 of the token list, `head` the tensor that
    makes logits of hidden states.
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
    """The files of a model, by its name: itself, or all shards if it is the first of several."""
    return list(shards_of(path))


def identify(path: pathlib.Path) -> Identity:
    """Read a model's headers and hash its content. Raises BitladderError if it is no GGUF model or cannot be read."""
    if not path.exists():
        raise BitladderError(f"no such model file: {path}")
    with GgufFile(path) as file:
        head, vocabulary = _head_and_vocabulary(file)
        digest = joined_sha256([sha256_file(part) for part in file.parts])
        return Identity(path, digest, file.size, file.bpw, file.architecture, vocabulary, head)


def check_vocabularies(model: pathlib.Path, base: pathlib.Path) -> None:
    """Raise BitladderError if two models have different vocabularies; from the files' headers, without hashing them."""
    if not model.exists():
        raise BitladderError(f"no such model file: {model}")
    with GgufFile(model) as one, GgufFile(base) as other:
        (head, vocabulary), (base_head, base_vocabulary) = _head_and_vocabulary(one), _head_and_vocabulary(other)
    if vocabulary != base_vocabulary or head.rows != base_head.rows:
        raise unlike(model.name, head.rows, base.name, base_head.rows)


def unlike(model: str, tokens: int, base: str, base_tokens: int) -> BitladderError:
    """The error that says that two models' vocabularies are not the same."""
    return BitladderError(
        f"{model} and the base {base} have different vocabularies ({tokens} and {base_tokens} tokens): "
        "they cannot be compared"
    )


def _head_and_vocabulary(file: GgufFile) -> tuple[TensorInfo, str]:
    # Without a matrix of its own for the output the token embeddings serve ("tied").
    head = file.tensors.get("output.weight") or file.tensors.get("token_embd.weight")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if head is None or tokens is None:
        raise BitladderError(f"{file.path} is no language model: it has no token embeddings or no vocabulary")
    return head, sha256_bytes(tokens.raw)
