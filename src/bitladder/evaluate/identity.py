"""What a model file is: its content's hash, size, vocabulary, and where its head lies."""

import dataclasses
import hashlib
import pathlib
import re

from bitladder.errors import BitladderError
from bitladder.files import sha256_bytes, sha256_file
from bitladder.model.reader import GgufFile, TensorInfo

_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclasses.dataclass(frozen=True)
class Identity:
    """A GGUF model as a file.

    `sha256` is of the file's content (of a split model: of the parts' hashes in order), `bytes` its size, `bpw` bits
    per weight over all tensors, `vocabulary` the SHA-256 of the token list, `head` the tensor that makes logits of
    hidden states and `head_path` the file it lies in.
    """

    path: pathlib.Path
    sha256: str
    bytes: int
    bpw: float
    architecture: str
    vocabulary: str
    head: TensorInfo
    head_path: pathlib.Path

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name


def parts(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a model: itself, or all splits if it is the first of several."""
    found = _SPLIT.match(path.name)
    if not found:
        return [path]
    count = int(found[3])
    return [path.with_name(f"{found[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def identify(path: pathlib.Path) -> Identity:
    """Read a model's headers and hash its content. Raises BitladderError if it is no GGUF model or cannot be read."""
    if not path.is_file():
        raise BitladderError(f"no such model file: {path}")
    files = parts(path)
    architecture = vocabulary = ""
    size = weights = stored = 0
    heads: dict[str, tuple[TensorInfo, pathlib.Path]] = {}
    for part in files:
        with GgufFile(part) as file:
            size += file.size
            stored += file.tensor_bytes
            weights += sum(tensor.elements for tensor in file.tensors.values())
            architecture = architecture or file.architecture
            if "tokenizer.ggml.tokens" in file.metadata:
                vocabulary = vocabulary or sha256_bytes(file.metadata["tokenizer.ggml.tokens"].raw)
            for name in ("output.weight", "token_embd.weight"):
                if name in file.tensors:
                    heads[name] = file.tensors[name], part
    # Without a matrix of its own for the output the token embeddings serve ("tied").
    head = heads.get("output.weight") or heads.get("token_embd.weight")
    if head is None or not vocabulary:
        raise BitladderError(f"{path} is no language model: it has no token embeddings or no vocabulary")
    digests = [sha256_file(part) for part in files]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return Identity(path, joined, size, 8 * stored / weights, architecture, vocabulary, *head)
