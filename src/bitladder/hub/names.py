"""What a hub id means: the repository, and which of its files `llama-server -hf OWNER/REPO:QUANT` takes.

The rules are llama.cpp's (find_best_model, gguf_filename_is_model and get_gguf_split_info in common/download.cpp). The
first file, in the hub's order, is taken that is a model and has QUANT followed by "." or "-" somewhere in its path. The
first shard of a split model stands for all. Files with certain words in their names belong beside a model and are never
taken.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from bitladder.errors import UsageError

# Words that mark a file as no model. llama.cpp looks for them in this case, anywhere in the file's name.
SIDE_FILES = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
# Without :QUANT the first of these that the repository has is taken; without any of them, the first model.
DEFAULTS = ("Q4_K_M", "Q8_0")
# In a repository with a file of this name llama.cpp reads that file and nothing else.
PRESET = "preset.ini"
FORMS = "OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf"
_REPO = r"[\w-][\w.-]*/[\w-][\w.-]*?"
_ID = re.compile(rf"(?P<repo>{_REPO})(?:@(?P<revision>[\w./-]+?))?(?::(?P<quant>[\w.-]+)|/(?P<file>[^:]+\.gguf))?")
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class HubName:
    """What a hub id says.

    Parameters:
        repo: OWNER/REPO.
        revision: branch, tag or commit; None is the main branch.
        quant: the quant after ":", or None.
        file: the path of a file in the repository, or None. Without quant and file llama.cpp's choice is meant.
    """

    repo: str
    revision: str | None
    quant: str | None
    file: str | None


def parse(spec: str) -> HubName | None:
    """OWNER/REPO, OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf, with @REVISION after REPO; None for anything else."""
    match = _ID.fullmatch(spec)
    if match is None or match["repo"].endswith(".gguf"):  # FOLDER/FILE.gguf, which is not there
        return None
    return HubName(match["repo"], match["revision"], match["quant"], match["file"])


def is_repository(spec: str) -> bool:
    """Whether a text is OWNER/REPO and nothing more."""
    return re.fullmatch(_REPO, spec) is not None


def names_file(spec: str) -> bool:
    """Whether a text names a GGUF of a repository (by its quant or path), and there is no such path here."""
    name = None if pathlib.Path(spec).exists() else parse(spec)
    return name is not None and bool(name.quant or name.file)


def check_repository(spec: str) -> None:
    """Raises UsageError unless a text is OWNER/NAME and nothing more."""
    if not is_repository(spec):
        raise UsageError(f"{spec} is not a repository of the hub; name one as OWNER/NAME")


def side_word(path: str) -> str | None:
    """The word for which llama.cpp takes a file for no model; None if there is none."""
    name = pathlib.PurePosixPath(path).name
    return next((word for word in SIDE_FILES if word in name), None)


def is_model(path: str) -> bool:
    """Whether llama.cpp takes a file of a repository for a model, or a shard of one."""
    return path.endswith(".gguf") and side_word(path) is None


def pick(paths: Sequence[str], quant: str | None = None) -> str | None:
    """The file that `-hf REPO:QUANT`, or `-hf REPO`, runs.

    Parameters:
        paths: all files of the repository, in the hub's order.
        quant: the quant, or None.

    Returns:
        The path of the file, or None if the repository has no such file.
    """
    models = [path for path in paths if is_model(path) and _is_first(path)]
    for tag in (quant,) if quant else DEFAULTS:
        pattern = re.compile(re.escape(tag) + "[.-]", re.IGNORECASE)
        match = next((path for path in models if pattern.search(path)), None)
        if match is not None:
            return match
    return models[0] if models and not quant else None


def shards(paths: Sequence[str], first: str) -> list[str]:
    """All files of the model whose first file is `first`, in order."""
    named = _SPLIT.fullmatch(first)
    if not named or int(named["count"]) <= 1:
        return [first]
    parts = [(match, path) for path in paths if (match := _SPLIT.fullmatch(path))]
    same = [(int(m["number"]), p) for m, p in parts if (m["stem"], m["count"]) == (named["stem"], named["count"])]
    return [path for _, path in sorted(same)]


def _is_first(path: str) -> bool:
    match = _SPLIT.fullmatch(path)
    return not match or int(match["count"]) <= 1 or int(match["number"]) == 1
