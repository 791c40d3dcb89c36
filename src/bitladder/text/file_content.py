"""The content of files: bytes as text, and records in JSON, JSON lines and parquet."""

import contextlib
import importlib.util
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bitladder.errors import BitladderError
from bitladder.units import number_of

ROWS = 256  # of a parquet file, in memory at once
# How a file begins → what it is.
_BEGINNINGS = {
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "compressed (gzip); unpack it",
    b"BZh": "compressed (bzip2); unpack it",
    b"\xfd7zXZ": "compressed (xz); unpack it",
    b"\x28\xb5\x2f\xfd": "compressed (zstd); unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "a Parquet file; export its text",
    b"%PDF": "a PDF; export its text",
    b"BLBASE": "a base file",
    b"_logits_": "a file of log-probabilities",
    b"\xff\xfe\x00\x00": "UTF-32; convert it: iconv -f UTF-32 -t UTF-8",
    b"\x00\x00\xfe\xff": "UTF-32; convert it: iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
}
# Stray bytes of this share are kept as they are, as llama.cpp's tools keep them. More are another encoding.
_STRAY = 1e-4
_CUT = 3  # bytes of a character that is cut off at the start or the end
Numbered = list[tuple[str, Any]]  # the place of each record, such as "dev.jsonl, line 3", and the record


def plain_text(data: bytes, name: str) -> str:
    """The text of a file. Bytes that are not UTF-8 become surrogate escapes, if they are few.

    Parameters:
        data: the content of the file.
        name: the file, for the error.

    Raises:
        BitladderError: the content is no text, or not UTF-8; the error says what it is, as far as it can be told.

    Example:
        >>> plain_text(b"ab\\xc3", "cut.txt") == "ab" + chr(0xdcc3)
        True
    """
    for beginning, what in _BEGINNINGS.items():
        if data.startswith(beginning):
            raise BitladderError(f"{name} is not UTF-8 text: it is {what}")
    zero = data.find(b"\0")
    if zero >= 0:
        text16 = len(data) > 3 and (data[1:200:2].count(0) > len(data[:200]) // 3 or data[:200:2].count(0) > 30)
        what = "UTF-16; convert it: iconv -f UTF-16LE -t UTF-8" if text16 else "binary"
        raise BitladderError(f"{name} is not UTF-8 text: it has a zero byte at {zero}, so it seems to be {what}")
    with contextlib.suppress(UnicodeDecodeError):
        return data.decode("utf-8")
    text = data.decode("utf-8", "surrogateescape")
    stray = [index for index, letter in enumerate(text) if "\udc80" <= letter <= "\udcff"]
    inside = [index for index in stray if _CUT <= index < len(text) - _CUT]
    if len(inside) > _STRAY * len(data):
        raise BitladderError(
            f"{name} is not UTF-8 text: {len(stray)} of its {number_of(len(data), 'byte')} fit into no character, the "
            f"first is {ord(text[stray[0]]) - 0xDC00:#x}; if it is Latin-1 or Windows-1252, convert it: iconv -f "
            "WINDOWS-1252 -t UTF-8"
        )
    return text


def json_list(text: str, name: str) -> Numbered:
    """The items of a JSON list. Raises BitladderError if the text is not one."""
    values = _parse(text, name)
    if not isinstance(values, list):
        raise BitladderError(f"{name}: not a list of records")
    return [(f"{name}, record {number}", value) for number, value in enumerate(values, 1)]


def json_lines(text: str, name: str) -> Numbered:
    """The JSON value of each line that is not blank. Raises BitladderError that names a line that is not JSON."""
    lines = [(f"{name}, line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
    return [(where, _parse(line, where)) for where, line in lines if line.strip()]


def parquet_rows(data: bytes, name: str) -> Numbered:
    """The rows of a parquet file. Raises BitladderError if pyarrow is missing or the file is not parquet."""
    need_pyarrow(name)
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise BitladderError(f"{name}: not a parquet file: {str(error).splitlines()[0]}") from error
    return [(f"{name}, row {number}", row) for number, row in enumerate(rows, 1)]


def parquet_column(
    paths: Iterable[pathlib.Path], name: str, column: str | None, known: Sequence[str], most: int
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Rows of parquet files, one after the other, until `most` characters were read.

    Parameters:
        paths: the files. One is fetched when it is needed.
        name: of what they are, for errors.
        column: the column that is wanted; None for the first of `known` that is there.
        known: names of columns.
        most: characters of the column at most, nearly.

    Yields:
        The place of a row, the name of the column, and the row with all columns.

    Raises:
        BitladderError: pyarrow is missing, a file is not parquet, or there is no such column.
    """
    need_pyarrow(name)
    import pyarrow
    from pyarrow import parquet

    read = rows = 0
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                columns = file.schema_arrow.names
                chosen = next((name for name in ([column] if column else known) if name in columns), None)
                if chosen is None:
                    raise BitladderError(
                        f"{name} has no column {column or ' or '.join(known)}; it has {', '.join(columns)}; name one "
                        "behind #"
                    )
                read_columns = [name for name in columns if name in (chosen, "tools", "system")]
                for batch in file.iter_batches(batch_size=ROWS, columns=read_columns):
                    for row in batch.to_pylist():
                        rows += 1
                        read += len(str(row[chosen]))
                        yield f"{name}, row {rows}", chosen, row
                        if read >= most:
                            return
        except (pyarrow.ArrowException, OSError) as error:
            raise BitladderError(f"{name}: not a parquet file: {str(error).splitlines()[0]}") from error


def need_pyarrow(what: str) -> None:
    """Raises BitladderError if pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise BitladderError(f"{what} is parquet, which needs pyarrow: pip install 'bitladder[hub-data]'")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: an integer of thousands of digits
        raise BitladderError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from error
