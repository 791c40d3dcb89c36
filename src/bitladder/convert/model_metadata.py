"""general.*: the model's name, size, licence and origins, from the model card, config.json and the directory's name."""

import dataclasses
import pathlib
import re
from typing import Any

import gguf

from bitladder.convert.card import LOCAL_PATH, clean, read_card
from bitladder.convert.config import Config
from bitladder.convert.sampling import read_sampling
from bitladder.files import file_name
from bitladder.hub import hub_id
from bitladder.progress import Progress

_SIZE = re.compile(r"[\w.-]{1,40}")


def read_metadata(folder: pathlib.Path, config: Config, parameters: int, progress: Progress) -> gguf.Metadata:
    """The metadata that the gguf package's heuristics find, without local paths, and the sampling defaults.

    Parameters:
        folder: directory of the checkpoint.
        config: its config.json.
        parameters: number of weights.
        progress: gets a warning of what is left out.
    """
    identity = hub_id(folder)
    written = config.get("_name_or_path")
    written = clean(written) if isinstance(written, str) and not LOCAL_PATH.match(written) else None
    card: dict[str, Any] = dict(read_card(folder, progress))
    place = None if identity else folder.resolve()
    metadata = gguf.Metadata.apply_metadata_heuristic(
        read_sampling(folder, progress), card, {"_name_or_path": identity or written or None}, place, parameters
    )
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        if isinstance(value, str):
            setattr(metadata, field.name, clean(value) or None)
    if metadata.name is None:
        metadata.name = clean(folder.resolve().name) or "model"
    if metadata.size_label is None or not _SIZE.fullmatch(metadata.size_label):
        metadata.size_label = gguf.size_label(parameters, parameters, 0, 0)
    return metadata


def default_file_name(metadata: gguf.Metadata, outtype: str) -> str:
    """A file name by GGUF's naming convention, such as Tiny-15M-F16.gguf. It is no path, whatever the metadata are."""
    encoding = f"-{outtype.upper()}.gguf"
    stem = gguf.naming_convention(
        metadata.name, metadata.basename, metadata.finetune, metadata.version, metadata.size_label, None
    )
    return file_name(stem, encoding)
