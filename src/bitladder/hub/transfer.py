"""Files from the hub and to it, by huggingface_hub: GGUF files, checkpoints, and uploads.

huggingface_hub is imported in the functions that use it: the import takes a while, and local files do not need it.
"""

import dataclasses
import errno
import glob
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Sequence
from typing import Any, Literal

from bitladder.errors import BitladderError, UsageError
from bitladder.files import close_paths
from bitladder.hub.names import FORMS, HubName, is_model, is_repository, parse, pick, shards

# Of a checkpoint are fetched: weights, configuration, tokenizer and model card.
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md"]
# Of an outline are fetched whole: JSON files up to this many bytes, other than tokenizer.json and vocab.json.
SMALL_FILE = 4 << 20
EXAMPLE = "allenai/OLMo-2-0425-1B"
UNREACHABLE = "the hub cannot be reached"
OTHER_FILES = ["original/*", "onnx/*", "consolidated*", "*/*.safetensors"]


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A GGUF file on this machine.

    Parameters:
        path: the file, the first of its shards if it is split.
        source: where it is from on the hub, "OWNER/REPO" or "OWNER/REPO/FOLDER"; None for a local file.
        revision: the commit on the hub; None for a local file.
    """

    path: pathlib.Path
    source: str | None = None
    revision: str | None = None


def fetch(spec: str, option: str = "") -> Fetched:
    """Fetches the GGUF file that `spec` names: a path, or a hub id as `parse` takes it.

    A file of the hub goes into huggingface_hub's cache. Where the hub cannot be reached, the files of the repository in
    the cache are used.

    Parameters:
        spec: the path or hub id.
        option: the option that names the file, for error messages.

    Raises:
        UsageError: `spec` is neither a file nor a hub id.
        BitladderError: the hub does not give the file, or has no such file.
    """
    named = f"{option} {spec}".lstrip()
    path = pathlib.Path(spec)
    if path.is_file():
        return Fetched(path)
    name = parse(spec)
    if name is None or path.is_dir():
        if path.is_dir():
            raise UsageError(f"{named}: a directory; name a GGUF file, or {FORMS}")
        raise _no_model(spec, option)
    try:
        return _download(name, named)
    except BitladderError:
        raise
    except Exception as error:  # of the network or the hub: there is no common base class
        raise _no_model(spec, option, error) from error


def fetch_checkpoint(model: str | pathlib.Path) -> pathlib.Path:
    """The directory of a checkpoint: `model` itself, or the snapshot of a hub repository in huggingface_hub's cache.

    Raises UsageError if `model` is a file, or neither a directory nor a hub id, and BitladderError if it cannot be
    fetched.
    """
    path = pathlib.Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{path} is a file; name the checkpoint's directory")
    if not is_repository(str(model)):
        raise _no_model(str(model))
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(str(model), allow_patterns=CHECKPOINT_FILES, ignore_patterns=OTHER_FILES)
    except Exception as error:  # of the network or the hub: there is no common base class
        raise _no_model(str(model), error=error) from error
    return pathlib.Path(snapshot)


def fetch_outline(repo: str, folder: pathlib.Path) -> None:
    """Fills a folder with the outline of a checkpoint on the hub: the same files, most of whose bytes are holes.

    Small JSON files are whole. A safetensors file has its header, which is read by ranges of bytes. All other files
    have their names and sizes only. A hole takes no room on the disk.

    Parameters:
        repo: OWNER/REPO.
        folder: an empty directory.

    Raises:
        UsageError: `repo` is no hub id.
        BitladderError: the hub does not give a file.
    """
    if not is_repository(repo):
        raise _no_model(repo)
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    try:
        revision = str(api.model_info(repo).sha)
        files = [entry for entry in api.list_repo_tree(repo, revision=revision) if isinstance(entry, RepoFile)]
        for file in files:
            target = folder / pathlib.PurePosixPath(file.path).name
            if file.path.endswith(".safetensors"):
                header = api.parse_safetensors_file_metadata(repo, file.path, revision=revision)
                entries = {
                    name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
                    for name, tensor in header.tensors.items()
                }
                data = json.dumps(entries).encode()
                end = max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0)
                target.write_bytes(len(data).to_bytes(8, "little") + data)
                os.truncate(target, 8 + len(data) + end)
            elif target.suffix == ".json" and file.size <= SMALL_FILE and target.stem not in ("tokenizer", "vocab"):
                shutil.copyfile(api.hf_hub_download(repo, file.path, revision=revision), target)
            else:
                target.touch()
                os.truncate(target, file.size)
    except Exception as error:  # of the network or the hub: there is no common base class
        raise _no_model(repo, error=error) from error


def fetch_beginning(spec: str, folder: pathlib.Path, size: int) -> pathlib.Path:
    """Fetches the first bytes of a GGUF of the hub, and of each of its shards. The rest of a file is a hole.

    Parameters:
        spec: OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf, as `parse` takes it.
        folder: an existing directory, where the files go.
        size: bytes of each file.

    Returns:
        The file, the first of its shards if it is split.

    Raises:
        UsageError: `spec` names no file of the hub.
        BitladderError: the hub does not give it, or has no such file.
    """
    name = parse(spec)
    if name is None:
        raise _no_model(spec)
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    targets = []
    try:
        commit, sizes = listing(name.repo, name.revision)
        for path in _files_of(name, list(sizes), spec):
            url = hf_hub_url(name.repo, path, revision=commit)
            whole = get_hf_file_metadata(url).size or 0
            left = min(size, whole)
            targets.append(folder / pathlib.PurePosixPath(path).name)
            headers = {**build_hf_headers(), "Range": f"bytes=0-{left - 1}"}
            with get_session().stream("GET", url, headers=headers) as given, targets[-1].open("wb") as file:
                hf_raise_for_status(given)
                for part in given.iter_bytes():
                    file.write(part[:left])
                    left -= len(part)
                    if left <= 0:  # a mirror may send the whole file, whatever was asked for
                        break
            os.truncate(targets[-1], whole)
    except BitladderError:
        raise
    except Exception as error:  # of the network or the hub: there is no common base class
        raise _no_model(spec, error=error) from error
    return targets[0]


def hub_id(folder: pathlib.Path) -> str | None:
    """The repository of a snapshot in huggingface_hub's cache (models--OWNER--NAME/snapshots/COMMIT), or None."""
    repository = folder.resolve().parent.parent.name
    if folder.resolve().parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/", 1)


def upload(
    folder: pathlib.Path, groups: Sequence[tuple[str, Sequence[str]]], repo: str, *, private: bool = False
) -> str:
    """Uploads files to a model repository, which is made if there is none.

    huggingface_hub skips files that the repository has and parts that were sent, so the same call continues after an
    interruption. Other files of the repository stay.

    Parameters:
        folder: the directory of the files.
        groups: commits in their order: a message, and file names relative to `folder` with forward slashes.
        repo: OWNER/REPO.
        private: whether the repository must be private.

    Returns:
        The address of the repository.

    Raises:
        BitladderError: the hub refuses or cannot be reached, or `private` is asked of a public repository.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repo, private=private or None, exist_ok=True))
        info: Any = api.model_info(repo)
        if private and not info.private:
            raise BitladderError(
                f"{repo} is public already; make it private in its settings on the hub, or leave --private out"
            )
        for message, names in groups:
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in names],
                commit_message=message,
            )
    except BitladderError:
        raise
    except Exception as error:  # of the network or the hub: there is no common base class
        raise BitladderError(
            f"upload to {repo}: {reason(error)}; run the same command again to continue where it stopped"
        ) from error
    return address


def _no_model(spec: str, option: str = "", error: Exception | None = None) -> BitladderError:
    """The error of a name that stands for no file here, and for none of the hub.

    Parameters:
        spec: what was typed.
        option: the option that has it.
        error: what the hub says; None for a name that no repository can have.
    """
    what, close = f"{option} {spec}: no such file or folder here, and".lstrip(), close_paths(spec)
    if error is not None:
        return BitladderError(f"{what} {not_given(error)}{close}")
    return UsageError(f"{what} no hub id{close or f' such as {EXAMPLE}, {FORMS}'}")


def not_given(error: Exception) -> str:
    """Why the hub gives no file, as the end of an error: it cannot be reached, or what it says."""
    words = reason(error)
    return words if words == UNREACHABLE else f"the hub does not give it: {words}"


def reason(error: Exception) -> str:
    """An error of huggingface_hub, or from below it, in one line, without the token that a server may repeat."""
    from huggingface_hub import errors, get_token

    if _no_connection(error):
        return UNREACHABLE
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated (accept its terms on the hub, then `hf auth login`)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private (`hf auth login`)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, errors.HfHubHTTPError):
        # The first line has the number of the error, the last one the words of the server.
        lines = list(dict.fromkeys([lines[0], lines[-1]])) if lines else []
    text = " ".join(lines)
    if token := get_token():
        text = text.replace(token, "(the token)")
    return text[:400] or type(error).__name__


def _no_connection(error: BaseException | None) -> bool:
    """Whether an error comes from a connection that fails. The classes of HTTP libraries differ; sockets' do not."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN):
            return True
        error = error.__cause__ or error.__context__
    return False


def _download(name: HubName, named: str) -> Fetched:
    from huggingface_hub import HfApi

    commit, sizes = listing(name.repo, name.revision)
    api, files = HfApi(), _files_of(name, list(sizes), named)
    local = [pathlib.Path(api.hf_hub_download(name.repo, path, revision=commit)) for path in files]
    return Fetched(local[0], "/".join([name.repo, *files[0].split("/")[:-1]]), commit)


def _files_of(name: HubName, paths: Sequence[str], named: str) -> Sequence[str]:
    """The GGUF that a name means among the files of its repository, with all shards."""
    first = (name.file if name.file in paths else None) if name.file else pick(paths, name.quant)
    if first is None:
        models = [path for path in paths if is_model(path)]
        known = ", ".join(models[:20]) + (f" and {len(models) - 20} more" if len(models) > 20 else "") or "no GGUF"
        raise BitladderError(f"{named}: no such GGUF in {name.repo}; it has {known}")
    return shards(paths, first)


def listing(repo: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> tuple[str, dict[str, int]]:
    """The commit and the files of a repository on the hub. If the hub cannot be reached, those of the cache.

    Returns:
        The commit, and the bytes of each file of a data set, or that is in the cache; 0 for files of a model.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info: Any = HfApi().repo_info(repo, revision=revision, repo_type=kind, files_metadata=kind == "dataset")
        return str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}
    except HfHubHTTPError:  # the hub answers: there is no such repository, or it is not for everybody
        raise
    except Exception:
        cached = _cached(repo, revision, kind)
        if cached is None:  # the error of the network is the better message
            raise
        return cached


def _cached(repo: str, revision: str | None, kind: str) -> tuple[str, dict[str, int]] | None:
    """The commit and the files of the newest snapshot of a repository in huggingface_hub's cache."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    snapshots = [
        snapshot
        for repository in repositories
        if (repository.repo_type, repository.repo_id) == (kind, repo)
        for snapshot in repository.revisions
        if not revision or revision in snapshot.refs or snapshot.commit_hash == revision
    ]
    if not snapshots:
        return None
    newest = max(snapshots, key=lambda snapshot: snapshot.last_modified)
    sizes = {f.file_path.relative_to(newest.snapshot_path).as_posix(): f.size_on_disk for f in newest.files}
    return newest.commit_hash, dict(sorted(sizes.items()))
