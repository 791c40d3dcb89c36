"""Texts of the hub: archives of published texts, and files of data sets.

huggingface_hub is imported in the functions that use it: the import takes a while, and local files do not need it.
"""

import dataclasses
import fnmatch
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence

from bitladder.errors import BitladderError, UsageError, did_you_mean
from bitladder.files import replacing, sha256_bytes
from bitladder.hub.transfer import listing, not_given
from bitladder.progress import SILENT, Progress

# A file of a data set, as huggingface_hub's file system, pandas and DuckDB name it.
DATA_SETS = "hf://datasets/"
DATA_FORM = f"{DATA_SETS}OWNER/NAME[@REVISION][/FILE][#COLUMN]"
_DATA = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/#]+))?(?:/(?P<path>[^#]+))?(?:#(?P<column>.+))?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{8,})?$")
MOST_FILE = 2 << 30  # bytes of a file that is fetched
NAMED = 8  # files or splits that an error names


@dataclasses.dataclass(frozen=True)
class TextArchive:
    """Texts in a zip archive of a data set of the hub.

    Parameters:
        repository: OWNER/NAME of the data set.
        file: the path of the archive in it.
        about: what the texts are, and their licence.
        sha256: of each text, by its path in the archive.
    """

    repository: str
    file: str
    about: str
    sha256: Mapping[str, str]


TEXTS = {
    "wikitext-2": TextArchive(
        "ggml-org/ci",
        "wikitext-2-raw-v1.zip",
        "articles of Wikipedia (Merity et al., 2016), CC BY-SA; most published perplexities are of its test part",
        {
            "wikitext-2-raw/wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
            "wikitext-2-raw/wiki.train.raw": "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57",
            "wikitext-2-raw/wiki.valid.raw": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
        },
    )
}


def fetch_texts(name: str, folder: pathlib.Path, progress: Progress = SILENT) -> list[pathlib.Path]:
    """Fetches texts to measure with and to calibrate on. Texts that are there already stay.

    Parameters:
        name: a key of TEXTS.
        folder: the directory for the files; it is made if there is none.
        progress: is told that something is fetched.

    Returns:
        The paths of the texts.

    Raises:
        UsageError: no texts have this name.
        BitladderError: the hub does not give the archive, a text is not the published one, or another file of the name
            is there.
    """
    if name not in TEXTS:
        raise UsageError(f"no texts are called {name}{did_you_mean(name, TEXTS, 'there are')}")
    archive = TEXTS[name]
    paths = {part: folder / pathlib.PurePosixPath(part).name for part in archive.sha256}
    missing = [part for part, path in paths.items() if not path.exists()]
    for part, path in paths.items():
        if part not in missing and (not path.is_file() or sha256_bytes(path.read_bytes()) != archive.sha256[part]):
            raise BitladderError(f"{path} is there and is another text; remove it, or name another directory (-o)")
    if missing:
        progress.info(f"{name}, from the hub")
        contents = _members(archive, missing)
        for part, data in contents.items():
            if sha256_bytes(data) != archive.sha256[part]:
                raise BitladderError(f"{part} of {archive.repository} is not the published text: its SHA-256 differs")
        folder.mkdir(parents=True, exist_ok=True)
        for part, data in contents.items():
            with replacing(paths[part]) as temporary:
                temporary.write_bytes(data)
    return list(paths.values())


def _members(archive: TextArchive, parts: Sequence[str]) -> dict[str, bytes]:
    """Parts of an archive, by their paths in it."""
    from huggingface_hub import hf_hub_download

    address = f"https://huggingface.co/datasets/{archive.repository}/resolve/main/{archive.file}"
    try:
        with zipfile.ZipFile(hf_hub_download(archive.repository, archive.file, repo_type="dataset")) as file:
            return {part: file.read(part) for part in parts}
    except (zipfile.BadZipFile, KeyError) as error:
        raise BitladderError(f"{archive.file} of {archive.repository} is damaged: {error}") from error
    except Exception as error:  # of the network or the hub: there is no common base class
        raise BitladderError(f"{archive.file}: {not_given(error)}; it is at {address}") from error


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Files of a data set of the hub.

    Parameters:
        repository: OWNER/NAME.
        revision: the commit.
        files: paths in the repository.
        column: the column that is named; None if none is.
    """

    repository: str
    revision: str
    files: tuple[str, ...]
    column: str | None

    def fetch(self) -> Iterator[pathlib.Path]:
        """The files in huggingface_hub's cache. Each is fetched when its turn comes.

        Raises BitladderError if the hub does not give one.
        """
        from huggingface_hub import hf_hub_download

        for file in self.files:
            try:
                path = hf_hub_download(self.repository, file, repo_type="dataset", revision=self.revision)
            except Exception as error:  # of the network or the hub: there is no common base class
                raise BitladderError(f"{file} of {self.repository}: {not_given(error)}") from error
            yield pathlib.Path(path)


def data_files(spec: str) -> DataFiles:
    """What a name such as hf://datasets/OWNER/NAME means. Only the list of files is fetched.

    FILE is a path, a folder or a pattern ("data/train-*"). Without it the data set must have parquet files of one
    split.

    Parameters:
        spec: as DATA_FORM.

    Raises:
        UsageError: `spec` has another form.
        BitladderError: the hub does not give the data set, or it is not clear which files are meant, or one is large.
    """
    match = _DATA.fullmatch(spec.removeprefix(DATA_SETS))
    if match is None:
        raise UsageError(f"{spec} is no file of a data set; name it as {DATA_FORM}")
    repo, path = match["repo"], (match["path"] or "").rstrip("/")
    try:
        revision, sizes = listing(repo, match["revision"], "dataset")
    except Exception as error:  # of the network or the hub: there is no common base class
        raise BitladderError(f"the data set {repo}: {not_given(error)}; a file of this machine needs no hub") from error
    files = sorted(name for name in sizes if _means(path, name))
    if not files:
        what, known = path or "parquet file", _first_names(sorted(sizes)) or "no files"
        raise BitladderError(f"the data set {repo} has no {what}; it has {known}; the form is {DATA_FORM}")
    splits = list(dict.fromkeys(_SHARD.sub("", name.removesuffix(".parquet")) for name in files))
    if len(splits) > 1:
        example = f"{DATA_SETS}{repo}/{splits[0]}*"
        raise BitladderError(f"{spec} means several splits: {_first_names(splits)}; name one, such as {example}")
    for name in files:
        if sizes[name] > MOST_FILE:
            raise BitladderError(f"{name} of {repo} has {sizes[name] / 2**30:.1f} GiB; name a smaller file")
    return DataFiles(repo, revision, tuple(files), match["column"])


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def _means(path: str, name: str) -> bool:
    """Whether a path, a folder, a pattern, or nothing, means a file of a data set."""
    if not path:
        return name.endswith(".parquet")
    return name == path or name.startswith(f"{path}/") or fnmatch.fnmatchcase(name, path)
