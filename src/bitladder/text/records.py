"""Records of files: JSON, JSON lines and parquet."""

import importlib.util
import io
import json
from typing import Any

from bitladder.errors import BitladderError

Numbered = list[tuple[str, Any]]  # the place of each record, such as "dev.jsonl, line 3", and the record


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


def need_pyarrow(what: str) -> None:
    """Raises BitladderError if pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise BitladderError(f"{what} is parquet, which needs pyarrow: pip install 'bitladder[hub-data]'")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: an integer of thousands of digits
        raise BitladderError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from error
