"""Where the model is: a local directory, or a repository of the Hugging Face hub."""

import pathlib
import re

from bitladder.errors import BitladderError

# Weights, configuration, tokenizer and model card; nothing else is fetched.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md"]
UNWANTED = ["original/*", "onnx/*", "consolidated*", "*/*.safetensors"]


def resolve(model: str | pathlib.Path) -> pathlib.Path:
    """The directory of a model: `model` itself, or where `huggingface_hub` has put (or puts) the hub's repository.

    Raises BitladderError if `model` is a file, neither a directory nor a hub id, or cannot be fetched.
    """
    path = pathlib.Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise BitladderError(f"{path} is a file; name the checkpoint's directory")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)):
        raise BitladderError(f"{model} is neither a directory nor a hub id such as allenai/OLMo-2-0425-1B")
    # Imported here: it takes a while, and a local directory does not need it.
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(snapshot_download(str(model), allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:  # whatever the network and the hub come up with; there is no common base class
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BitladderError(f"{model} is not a directory here, and the hub does not give it: {reason}") from error


def hub_id(folder: pathlib.Path) -> str | None:
    """The repository's id if `folder` is a snapshot in huggingface_hub's cache (models--ORG--NAME/snapshots/HASH)."""
    repository = folder.resolve().parent.parent.name
    if folder.resolve().parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)
