"""Which file of a repository `llama-server -hf OWNER/REPO:QUANT` takes.

The rules are llama.cpp's (find_best_model, gguf_filename_is_model and get_gguf_split_info in common/download.cpp): the
first file, in the hub's order, that is a model and has QUANT followed by "." or "-" somewhere in its path; of a split
model the first shard stands for all. Files with certain words in their name are there beside a model and never taken.
"""

import pathlib
import re
from collections.abc import Sequence

# Words that mark a file as no model. As llama.cpp looks for them: in this case, anywhere in the file's name.
SIDE_FILES = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
# Without :QUANT the first of these that there is; without either, the first model.
DEFAULTS = ("Q4_K_M", "Q8_0")
# In a repository with a file of this name llama.cpp reads that and nothing else.
PRESET = "preset.ini"
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.IGNORECASE)


def side_word(path: str) -> str | None:
    """The word for which llama.cpp takes a file for something beside a model; None if there is none."""
    name = pathlib.PurePosixPath(path).name
    return next((word for word in SIDE_FILES if word in name), None)


def is_model(path: str) -> bool:
    """Whether llama.cpp takes a file of a repository for a model, or a shard of one."""
    return path.endswith(".gguf") and side_word(path) is None


def pick(paths: Sequence[str], quant: str | None = None) -> str | None:
    """The file that `-hf REPO:QUANT` (or `-hf REPO`) runs; None if there is none.

    Parameters: `paths` of all files in the repository, in the hub's order.
    """
    models = [path for path in paths if is_model(path) and _is_first(path)]
    for tag in (quant,) if quant else DEFAULTS:
        pattern = re.compile(re.escape(tag) + "[.-]", re.IGNORECASE)
        found = next((path for path in models if pattern.search(path)), None)
        if found is not None:
            return found
    return models[0] if models and not quant else None


def shards(paths: Sequence[str], first: str) -> list[str]:
    """All files of the model that begins with `first`, in order."""
    found = _SPLIT.fullmatch(first)
    if not found or int(found["count"]) <= 1:
        return [first]
    parts = [(match, path) for path in paths if (match := _SPLIT.fullmatch(path))]
    same = [(int(m["number"]), p) for m, p in parts if (m["stem"], m["count"]) == (found["stem"], found["count"])]
    return [path for _, path in sorted(same)]


def _is_first(path: str) -> bool:
    found = _SPLIT.fullmatch(path)
    return not found or int(found["count"]) <= 1 or int(found["number"]) == 1
