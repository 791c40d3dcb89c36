"""Files that machines exchange through a folder of an object store (any URL that fsspec knows), if they share no disk.

What a machine puts there gets a name of its own and is never changed. So no machine reads half a file, and machines
that make the same file do not disturb each other. Nobody lists the folder: messages between machines say what there is
(`Listing`). A journal grows on several machines at once; its lines are put together.
"""

import atexit
import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from bitladder.errors import BitladderError, UsageError, in_one_line
from bitladder.files import is_alive, sha256_bytes, sha256_file

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FLAG = "--share"
JOURNAL = ".jsonl"  # ending of files to which lines are added
TEMPORARY = ".tmp"  # ending of files that are being written
# File below the shared folder, with forward slashes → the name of the object that holds its content.
Listing = Mapping[str, str]
# File systems where a folder must be made before a file in it. An object store would make a bucket.
WITH_FOLDERS = {"file", "local", "memory", "sftp", "ssh", "smb", "hdfs", "webhdfs"}
_Stamp = tuple[int, int, int]  # bytes, time of change, inode


class SharedFolder:
    """A folder of this machine whose files go to others, and those of others to it.

    Parameters:
        url: where objects are put. It belongs to this exchange alone.
        folder: the folder on this machine.

    Raises:
        UsageError: fsspec does not know such a URL, or the package that it needs is not installed.
    """

    def __init__(self, url: str, folder: pathlib.Path) -> None:
        self.url, self.folder = url.rstrip("/"), folder
        self._files, self._root = _file_system(self.url)
        self._known: dict[str, tuple[_Stamp, str]] = {}

    def put(self, paths: Iterable[pathlib.Path], others: Mapping[str, pathlib.Path] | None = None) -> dict[str, str]:
        """Puts files there whose content is not there yet.

        Parameters:
            paths: files in the folder. What is not there, or is being written, is left out.
            others: files outside of it, by the names that they have in the folders of other machines.

        Returns:
            The object of each.

        Raises:
            BitladderError: an object cannot be written.
        """
        listing: dict[str, str] = {}
        for name, path in {self._name(path): path for path in paths}.items() | (others or {}).items():
            stamp = _stamp(path)
            if stamp is None or path.name.endswith(TEMPORARY):
                continue
            known = self._known.get(name)
            if known is None or known[0] != stamp:
                known = stamp, f"{sha256_file(path)}.{uuid.uuid4().hex}"
                with self._told(f"write {known[1]} for {name}"):
                    _make_folder(self._files, self._root)
                    self._files.put_file(str(path), f"{self._root}/{known[1]}")
                self._known[name] = known
            listing[name] = known[1]
        return listing

    def get(self, listing: Listing) -> None:
        """Brings files here that are not here yet. Lines of a journal are added to those that are here.

        Raises:
            BitladderError: an object cannot be read, or is damaged.
        """
        for name, thing in listing.items():
            path = self.folder / name
            known = self._known.get(name)
            if known is not None and known[1] == thing and known[0] == _stamp(path):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
            try:
                with self._told(f"read {thing} for {name}"):
                    self._files.get_file(f"{self._root}/{thing}", str(temporary))
                if sha256_file(temporary) != thing.partition(".")[0]:
                    raise BitladderError(f"{FLAG} {self.url}: {thing} is damaged; give the command again")
                if path.suffix == JOURNAL and path.exists():
                    _add_lines(path, temporary.read_bytes())
                    continue
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            self._known[name] = _stamp(path) or (0, 0, 0), thing

    def hold(self, listing: Listing) -> None:
        """Has the folder hold the files of a listing and no others."""
        for path in self._here():
            if self._name(path) not in listing:
                path.unlink(missing_ok=True)
        self.get(listing)

    def changed(self) -> list[pathlib.Path]:
        """The files in the folder that were neither brought nor put there as they are."""
        known = {self.folder / name: stamp for name, (stamp, _) in self._known.items()}
        return [path for path in self._here() if known.get(path) != _stamp(path)]

    def _name(self, path: pathlib.Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _here(self) -> list[pathlib.Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Says in one line what went wrong; file systems of fsspec raise errors of many kinds."""
        try:
            yield
        except Exception as error:
            raise BitladderError(f"{FLAG} {self.url}: cannot {what} ({in_one_line(error)})") from error


def reaches(url: str) -> bool:
    """Whether this machine sees an object."""
    try:
        files, path = _file_system(url)
        return bool(files.exists(path))
    except Exception:  # each file system has its own errors
        return False


def write_object(url: str, text: str) -> None:
    """Writes an object. Raises UsageError that says what is wrong with its URL."""
    files, path = _file_system(url)
    try:
        _make_folder(files, path.rpartition("/")[0])
        files.pipe_file(path, text.encode())
    except Exception as error:
        raise UsageError(f"{FLAG} {url.rpartition('/')[0]} cannot be written to ({in_one_line(error)})") from error


def remove_objects(url: str) -> None:
    """Removes the objects of an exchange, as far as that is possible."""
    with contextlib.suppress(Exception):
        files, path = _file_system(url)
        files.rm(path, recursive=True)


def own_folder() -> pathlib.Path:
    """A new folder of this process, below that of temporary files. It is removed when the process ends.

    Folders of processes that were killed are removed first.
    """
    place = pathlib.Path(tempfile.gettempdir())
    for left in place.glob("bitladder-share-*-*"):
        number = left.name.split("-")[2]
        if number.isdecimal() and not is_alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"bitladder-share-{os.getpid()}-", dir=place))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _file_system(url: str) -> tuple["AbstractFileSystem", str]:
    import fsspec

    if "://" not in url:
        raise UsageError(f"{FLAG} {url} is no URL, such as s3://BUCKET/FOLDER; a path that all machines see is --out")
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{FLAG} {url}: {in_one_line(error)}") from error
    return files, str(path).rstrip("/")


def _make_folder(files: "AbstractFileSystem", path: str) -> None:
    kinds = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    if not WITH_FOLDERS.isdisjoint(kinds):
        files.makedirs(path, exist_ok=True)


def _stamp(path: pathlib.Path) -> _Stamp | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _add_lines(path: pathlib.Path, data: bytes) -> None:
    """Adds the whole lines that a journal does not have, in one write."""
    old = path.read_bytes()
    have = {sha256_bytes(line) for line in old.split(b"\n")}
    new = [line for line in data.split(b"\n")[:-1] if sha256_bytes(line) not in have]
    if new:
        with path.open("ab", buffering=0) as stream:
            stream.write(b"\n" * bool(old and not old.endswith(b"\n")) + b"\n".join(new) + b"\n")
