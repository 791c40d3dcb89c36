"""Data sets on the Hugging Face hub: parquet files of a pinned revision."""

import dataclasses
import importlib.util
import io
import pathlib
from collections.abc import Iterator

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks.question_files import QuestionFile, QuestionRecord


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
    _need_pyarrow(data.label)
    from huggingface_hub import hf_hub_download  # slow to import, and local files do not need it

    try:
        return [
            pathlib.Path(hf_hub_download(data.repository, name, repo_type="dataset", revision=data.revision))
            for name in data.files
        ]
    except Exception as error:  # errors of the network and the hub have no common base class
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BitladderError(
            f"the hub does not give {data.repository}: {reason}; name a file instead: {task}:FILE"
        ) from error


def parquet_records(file: QuestionFile) -> Iterator[QuestionRecord]:
    """The rows of a parquet file. Raises BitladderError if pyarrow is missing or the file is not parquet."""
    _need_pyarrow(file.name)
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(io.BytesIO(file.data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BitladderError(f"{file.name}: not a parquet file: {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows, 1):
        yield QuestionRecord(f"{file.name}, row {number}", row)


def _need_pyarrow(what: str) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise BitladderError(f"{what} is parquet, which needs pyarrow: pip install 'bitladder[hub-data]'")
