"""A GGUF by its name: a file that is here, or one of the hub's, which is downloaded into huggingface_hub's cache."""

import dataclasses
import pathlib
import re
from typing import Any

from bitladder.errors import BitladderError, UsageError
from bitladder.hub.quant_files import is_model, pick, shards

_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*?)(?:@(?P<revision>[\w./-]+?))?(?::(?P<quant>[\w.-]+)|/(?P<file>[^:]+\.gguf))?"
)
FORMS = "OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf"


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A GGUF that is here, the first of its shards if it is split.

    `source` is where it is from on the hub ("OWNER/REPO", or "OWNER/REPO/FOLDER") and `revision` the commit; both are
    None for a file that was here already.
    """

    path: pathlib.Path
    source: str | None = None
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class HubName:
    """What a hub id says: repository, revision (None: main), and a quant or a file (neither: llama.cpp's choice)."""

    repo: str
    revision: str | None
    quant: str | None
    file: str | None


def parse(spec: str) -> HubName | None:
    """OWNER/REPO, OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf, with @REVISION after REPO; None if it is none of these."""
    match = _ID.fullmatch(spec)
    if match is None or match["repo"].endswith(".gguf"):  # FOLDER/FILE.gguf, which is not there
        return None
    return HubName(match["repo"], match["revision"], match["quant"], match["file"])


def fetch(spec: str, option: str = "") -> Fetched:
    """The file that `spec` names: a path, or a hub id as `parse` takes it.

    Where the hub cannot be reached, what its cache holds of the repository is used. `option` begins error messages.
    Raises UsageError if `spec` is neither, BitladderError if the hub does not give it or has no such file.
    """
    said = f"{option} {spec}".lstrip()
    path = pathlib.Path(spec)
    if path.is_file():
        return Fetched(path)
    name = parse(spec)
    if name is None or path.is_dir():
        kind = "a directory" if path.is_dir() else "no file here, and no hub id"
        raise UsageError(f"{said}: {kind}; name a GGUF file, or {FORMS}")
    try:
        return _download(name, said)
    except BitladderError:
        raise
    except Exception as error:  # whatever the network and the hub come up with; there is no common base class
        raise BitladderError(f"{said}: no such file here, and the hub does not give it: {reason(error)}") from error


def reason(error: Exception) -> str:
    """An error of huggingface_hub, or from below it, in one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner gives it only to those who asked (accept its terms on the hub, then `hf auth login`)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private (`hf auth login`)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, errors.HfHubHTTPError):
        # The first line has the number of the error, the last one what the server said.
        lines = list(dict.fromkeys([lines[0], lines[-1]])) if lines else []
    return " ".join(lines)[:400] or type(error).__name__


def _download(name: HubName, said: str) -> Fetched:
    # Imported here: it takes a while, and files at hand do not need it.
    from huggingface_hub import HfApi

    commit, paths = _listing(name)
    first = name.file if name.file in paths else None if name.file else pick(paths, name.quant)
    if first is None:
        models = [path for path in paths if is_model(path)]
        there = ", ".join(models[:20]) + (f" and {len(models) - 20} more" if len(models) > 20 else "") or "no GGUF"
        raise BitladderError(f"{said}: no such GGUF in {name.repo}; it has {there}")
    api = HfApi()
    local = [pathlib.Path(api.hf_hub_download(name.repo, path, revision=commit)) for path in shards(paths, first)]
    return Fetched(local[0], "/".join([name.repo, *first.split("/")[:-1]]), commit)


def _listing(name: HubName) -> tuple[str, list[str]]:
    """The commit and the files of a repository: the hub's or, where it cannot be reached, those in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info: Any = HfApi().model_info(name.repo, revision=name.revision)
        return str(info.sha), [file.rfilename for file in info.siblings or ()]
    except HfHubHTTPError:  # the hub has answered: there is no such repository, or it is not for everybody
        raise
    except Exception:
        kept = _kept(name)
        if kept is None:  # what the network said is the better message
            raise
        return kept


def _kept(name: HubName) -> tuple[str, list[str]] | None:
    """The commit and the files of a repository in huggingface_hub's cache: those that came last."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    same = [one for one in repositories if (one.repo_type, one.repo_id) == ("model", name.repo)]
    revisions = [revision for one in same for revision in one.revisions]
    if name.revision:
        revisions = [one for one in revisions if name.revision in one.refs or one.commit_hash == name.revision]
    if not revisions:
        return None
    last = max(revisions, key=lambda one: one.last_modified)
    paths = sorted(file.file_path.relative_to(last.snapshot_path).as_posix() for file in last.files)
    return last.commit_hash, paths
