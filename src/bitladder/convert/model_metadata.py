"""general.*: the model's name, size, licence and origins, from the model card, config.json and the directory's name."""

import dataclasses
import pathlib
import re
from typing import Any

import gguf
import yaml

from bitladder.convert.checkpoint import Config
from bitladder.errors import BitladderError
from bitladder.hub import hub_id

# A path on a machine, and no id of a repository.
LOCAL_PATH = re.compile(r"^([/~.\\]|[A-Za-z]:[\\/])")


def read_metadata(folder: pathlib.Path, config: Config, parameters: int) -> gguf.Metadata:
    """The metadata that the gguf package's heuristics find, without local paths.

    Parameters:
        folder: directory of the checkpoint.
        config: its config.json.
        parameters: number of weights.

    Raises:
        BitladderError: the front matter of the model card is not valid YAML.
    """
    identity = hub_id(folder)
    values = {key: value for key, value in config.values.items() if key != "_name_or_path"}
    written = config.get("_name_or_path", "")
    if identity or (isinstance(written, str) and not LOCAL_PATH.match(written)):
        values["_name_or_path"] = identity or written or None
    try:
        card = {key: _without_paths(value) for key, value in gguf.Metadata.load_model_card(folder).items()}
        loaded = gguf.Metadata.load(None, folder, None, parameters)
    except yaml.YAMLError as error:
        raise BitladderError(f"{folder / 'README.md'}: the front matter is not valid YAML ({_line(error)})") from error
    # Of load(), which reads config.json with its paths, only the sampling defaults (generation_config.json) are used.
    sampling = {
        field.name: getattr(loaded, field.name)
        for field in dataclasses.fields(loaded)
        if field.name.startswith("sampling_")
    }
    place = None if identity else folder.resolve()
    metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(**sampling), card, values, place, parameters)
    if metadata.name is None:
        metadata.name = folder.resolve().name
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(parameters, parameters, 0, 0)
    return metadata


def file_name(metadata: gguf.Metadata, outtype: str) -> str:
    """A file name by GGUF's naming convention, such as Tiny-15M-F16.gguf."""
    stem = gguf.naming_convention(
        metadata.name, metadata.basename, metadata.finetune, metadata.version, metadata.size_label, outtype
    )
    return f"{stem}.gguf"


def _without_paths(value: Any) -> Any:
    """A value of the front matter without strings that are local paths."""
    if isinstance(value, list):
        return [_without_paths(item) for item in value if not (isinstance(item, str) and LOCAL_PATH.match(item))]
    return None if isinstance(value, str) and LOCAL_PATH.match(value) else value


def _line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())
