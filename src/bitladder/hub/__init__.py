"""The Hugging Face hub: which file of a repository a name means, fetching files, and uploading them."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.hub.names import PRESET, HubName, check_repository, names_file, parse, pick, shards, side_word
    from bitladder.hub.texts import DATA_FORM, DATA_SETS, TEXTS, DataFiles, data_files, fetch_texts
    from bitladder.hub.transfer import (
        Fetched,
        fetch,
        fetch_beginning,
        fetch_checkpoint,
        fetch_outline,
        hub_id,
        not_given,
        upload,
    )

__all__ = [
    "DATA_FORM",
    "DATA_SETS",
    "PRESET",
    "TEXTS",
    "DataFiles",
    "Fetched",
    "HubName",
    "check_repository",
    "data_files",
    "fetch",
    "fetch_beginning",
    "fetch_checkpoint",
    "fetch_outline",
    "fetch_texts",
    "hub_id",
    "names_file",
    "not_given",
    "parse",
    "pick",
    "shards",
    "side_word",
    "upload",
]
open_door(__name__)
