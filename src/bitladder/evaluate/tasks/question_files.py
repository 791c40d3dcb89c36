"""Files with questions, local or of the hub: finds them, unpacks them, and reads them record by record."""

import bz2
import csv
import dataclasses
import gzip
import io
import lzma
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from bitladder.errors import BitladderError, UsageError
from bitladder.files import close_paths
from bitladder.hub import not_given
from bitladder.text import json_lines, json_list, need_pyarrow, parquet_rows, plain_text
from bitladder.units import listed, number_of

_OPEN: dict[str, Callable[[io.BytesIO], Any]] = {
    ".bz2": bz2.BZ2File,
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".xz": lzma.LZMAFile,
}
# No benchmark comes near this, and so a small file cannot fill the memory.
_MOST = 1 << 26


@dataclasses.dataclass(frozen=True)
class QuestionFile:
    """The content of a file, unpacked if it was .bz2, .gz or .xz."""

    path: pathlib.Path
    data: bytes

    @property
    def name(self) -> str:
        """The file's name, without folder."""
        return self.path.name

    @property
    def suffix(self) -> str:
        """The suffix of the unpacked file in lower case, such as ".jsonl"."""
        return _inner(self.path).suffix.lower()

    @property
    def text(self) -> str:
        """The content as text, without a byte-order mark. Raises BitladderError if it is not UTF-8 text."""
        return plain_text(self.data, self.name).removeprefix("\ufeff")


@dataclasses.dataclass(frozen=True)
class QuestionRecord:
    """A record with named fields. Errors about it begin with `where`, such as "dev.jsonl, line 3"."""

    where: str
    fields: dict[str, Any]

    def get(self, name: str) -> Any:
        """The value of a field. Raises BitladderError if the record has no such field."""
        if self.fields.get(name) is None:
            raise BitladderError(f"{self.where}: no field {name}")
        return self.fields[name]

    def text(self, name: str) -> str:
        """A field that is text or a number, as text without surrounding blanks."""
        value = self.get(name)
        if not isinstance(value, str | int):
            raise BitladderError(f"{self.where}: the field {name} is not text")
        return str(value).strip()

    def texts(self, name: str) -> list[str]:
        """A field that is a list of texts."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise BitladderError(f"{self.where}: the field {name} is not a list of texts")
        return [text.strip() for text in value]

    def inner(self, name: str) -> "QuestionRecord":
        """A field that is a record itself."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise BitladderError(f"{self.where}: the field {name} is not an object")
        return QuestionRecord(self.where, value)

    def index(self, name: str, first: int = 0) -> int:
        """A field that is a whole number counted from `first`, as an index counted from 0."""
        value = self.text(name)
        if not re.fullmatch(r"-?[0-9]{1,18}", value):
            raise BitladderError(f"{self.where}: {name} is {value!r}, not a whole number")
        return int(value) - first


def open_file(path: pathlib.Path) -> QuestionFile:
    """Reads a file. Raises UsageError if it cannot be read, and BitladderError if it cannot be unpacked, or holds more
    than _MOST bytes."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}{close_paths(path)}") from error
    unpack = _OPEN.get(path.suffix.lower())
    if unpack and len(data) <= _MOST:
        try:
            with unpack(io.BytesIO(data)) as packed:
                data = packed.read(_MOST + 1)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise BitladderError(f"{path} is damaged: {error}") from error
    if len(data) > _MOST:
        raise BitladderError(f"{path} holds more than {_MOST >> 20} MiB, and so is no file of questions")
    return QuestionFile(path, data)


def find_files(folder: pathlib.Path, layouts: tuple[tuple[str, ...], ...]) -> list[pathlib.Path]:
    """The files of a folder by the first layout in which every pattern matches a file; sorted for each pattern.

    Raises:
        BitladderError: no layout matches; the error lists the layouts.
    """
    for layout in layouts:
        matches = [sorted(path for path in folder.glob(pattern) if path.is_file()) for pattern in layout]
        if all(matches):
            return [path for paths in matches for path in paths]
    expected = "; or ".join(listed(layout) for layout in layouts)
    raise BitladderError(f"{folder} has none of the expected files: {expected}")


RecordReader = Callable[[QuestionFile], Iterator[QuestionRecord]]


def json_records(file: QuestionFile) -> Iterator[QuestionRecord]:
    """The records of a .jsonl file (an object in each line) or a .json file (a list of objects)."""
    read = json_list if file.suffix == ".json" else json_lines
    numbered = read(file.text, file.name)
    for where, value in numbered:
        if not isinstance(value, dict):
            raise BitladderError(f"{where}: not an object")
        yield QuestionRecord(where, value)


def csv_rows(file: QuestionFile) -> Iterator[tuple[str, list[str]]]:
    """The rows of a csv file that are not blank: the place of each ("x.csv, line 3"), and its cells."""
    reader = csv.reader(io.StringIO(file.text, newline=""), strict=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise BitladderError(f"{file.name}, line {reader.line_num}: {error}") from error
        if row is None:
            return
        if any(cell.strip() for cell in row):
            yield f"{file.name}, line {reader.line_num}", row


def csv_records(file: QuestionFile) -> Iterator[QuestionRecord]:
    """The records of a csv file whose first row names the fields."""
    header: list[str] | None = None
    for where, row in csv_rows(file):
        if header is None:
            header = [cell.strip() for cell in row]
        elif len(row) != len(header):
            raise BitladderError(f"{where}: {number_of(len(row), 'cell')} where the first line has {len(header)}")
        else:
            yield QuestionRecord(where, dict(zip(header, row, strict=True)))


def _inner(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix("") if path.suffix.lower() in _OPEN else path


@dataclasses.dataclass(frozen=True)
class HubData:
    """Files of a data set on the hub."""

    repository: str
    revision: str
    files: tuple[str, ...]

    @property
    def label(self) -> str:
        """The data set and the start of its revision."""
        return f"{self.repository}@{self.revision[:8]}"


def download(data: HubData, task: str) -> list[pathlib.Path]:
    """The files of a data set in huggingface_hub's cache. Missing files are fetched.

    Raises:
        BitladderError: pyarrow is missing, or the files cannot be fetched.
    """
    need_pyarrow(data.label)
    from huggingface_hub import hf_hub_download  # slow to import, and local files do not need it

    try:
        return [
            pathlib.Path(hf_hub_download(data.repository, name, repo_type="dataset", revision=data.revision))
            for name in data.files
        ]
    except Exception as error:  # errors of the network and the hub have no common base class
        raise BitladderError(f"{data.repository}: {not_given(error)}; name a file instead: {task}:FILE") from error


def parquet_records(file: QuestionFile) -> Iterator[QuestionRecord]:
    """The rows of a parquet file. Raises BitladderError if pyarrow is missing or the file is not parquet."""
    for where, row in parquet_rows(file.data, file.name):
        yield QuestionRecord(where, row)
