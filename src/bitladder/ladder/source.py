"""The model a run starts from: where it is, what it is called, and the hash of all that conversion reads."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import gguf

from bitladder import hub
from bitladder.errors import BitladderError
from bitladder.gguf.reader import open_model
from bitladder.gguf.shards import plain_path
from bitladder.ladder.store import Store

# What a converter may read of a checkpoint's directory; .bin files count only where there is no safetensors file.
READ = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "README.md", "*/*.jinja")
READ_OLD = "pytorch_model*.bin"
# Where a GGUF may say which repository it was made from.
ORIGINS = ("general.source.repo_url", "general.source.url", "general.repo_url", "general.url")
_HUB_URL = re.compile(r"^https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?$")
_ENCODING = re.compile(r"-(BF16|F16|F32)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Source:
    """`path` is the checkpoint's directory or the GGUF file (of a split model the first shard).

    `name` has no path in it; `model_id` is the hub's.
    """

    path: pathlib.Path
    name: str
    model_id: str | None

    @property
    def is_gguf(self) -> bool:
        """Whether there is nothing to convert."""
        return self.path.is_file()

    def files(self) -> dict[str, pathlib.Path]:
        """The files whose contents decide what the model becomes, by their name in the directory."""
        if self.is_gguf:
            return {self.path.name: self.path}
        found = {path for pattern in READ for path in self.path.glob(pattern) if path.is_file()}
        if not any(path.suffix == ".safetensors" for path in found):
            found |= set(self.path.glob(READ_OLD))
        return {path.relative_to(self.path).as_posix(): path for path in sorted(found)}

    def digest(self, store: Store) -> dict[str, Any]:
        """The model's name (converters put it into the file) and the content hashes of its files."""
        files = {name: store.sha256(path, f"model: {name}") for name, path in self.files().items()}
        return {"name": self.name, "files": files}


def locate(model: str) -> Source:
    """Find MODEL: a GGUF file, a checkpoint's directory, or a repository or a GGUF of the hub, which is downloaded.

    Raises BitladderError if it is none of these.
    """
    path = pathlib.Path(model)
    name = hub.parse(model)
    if name is not None and (name.quant or name.file) and not path.exists():
        path = hub.fetch(model, "MODEL").path
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise BitladderError(f"{path} is not a GGUF file; name a GGUF, a checkpoint's directory or a hub id")
        return Source(path, path.name, None)
    folder = hub.fetch_checkpoint(model)
    if not path.is_dir():
        return Source(folder, model, model)
    identity = hub.hub_id(folder)
    return Source(folder, identity or folder.resolve().name, identity)


def describe(path: pathlib.Path) -> dict[str, Any]:
    """What later steps and the card need to know of the full-precision GGUF, as JSON.

    `path` may be the first shard of a split model; `bytes` counts all of them. Raises BitladderError if the model is
    quantized already, or has no weights.
    """
    with open_model(path) as file:
        weights: dict[str, int] = {}
        for tensor in file.tensors.values():
            if tensor.type.quantized:
                raise BitladderError(
                    f"{path} is quantized already ({tensor.name} is {tensor.type.name}); start from F16, BF16 or F32"
                )
            if len(tensor.shape) > 1:
                weights[tensor.type.name] = weights.get(tensor.type.name, 0) + tensor.elements
        if not weights:
            raise BitladderError(f"{path} has no weight matrices; it is not a model")
        general = {key: value.python() for key, value in file.metadata.items() if key.startswith("general.")}
        return {
            "file": path.name,
            "stem": file_stem(general, plain_path(path).stem),
            "architecture": file.architecture,
            "encoding": max(weights, key=lambda name: weights[name]).upper(),
            "bytes": file.size,
            "bpw": file.bpw,
            "parameters": sum(tensor.elements for tensor in file.tensors.values()),
            "general": {key.removeprefix("general."): value for key, value in general.items()},
            "origin": _origin(general),
        }


def file_stem(general: Mapping[str, Any], fallback: str) -> str:
    """The first part of all file names, by GGUF's naming convention: Base-Size-Finetune-Version.

    `general` holds the general.* metadata; a model without a name is called `fallback`, less its encoding.
    """
    general = {key: value for key, value in general.items() if isinstance(value, str)}
    if not (general.get("general.basename") or general.get("general.name")):
        return _ENCODING.sub("", fallback)
    keys = {"name": "model_name", "basename": "base_name", "finetune": "finetune_string", "version": "version_string"}
    parts = {parameter: general.get(f"general.{key}") for key, parameter in keys.items()}
    stem: str = gguf.naming_convention(**parts, size_label=general.get("general.size_label"), output_type=None)
    # A finetune or version may hold what no file name can.
    return re.sub(r"[^\w.+-]+", "-", stem).lstrip(".-")


def _origin(general: Mapping[str, Any]) -> str | None:
    for key in ORIGINS:
        match = _HUB_URL.match(str(general.get(key, "")))
        if match:
            return match[1]
    return None
