"""Rows in the forms they are printed in."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from bitladder.show.imatrix.tables import Column, find_column


class Row(Protocol):
    """A dataclass with a field for each column."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def plain(row: Row) -> dict[str, Any]:
    """A row for JSON or CSV: all its fields, None for what is no finite number."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in ((field.name, getattr(row, field.name)) for field in dataclasses.fields(row))
    }


R = TypeVar("R", bound=Row)


def sort_rows(rows: Iterable[R], columns: Sequence[Column], by: str) -> list[R]:
    """Rows by a column: figures from the largest, names and layers from the first; "-" before it turns that round.

    What has no value comes last either way. Raises UsageError if there is no such column.
    """
    column = find_column(columns, by.removeprefix("-"))
    descending = column.numeric != by.startswith("-")
    value = [(row, getattr(row, column.name)) for row in rows]
    present = sorted((pair for pair in value if pair[1] is not None), key=lambda pair: pair[1], reverse=descending)
    return [row for row, _ in present] + [row for row, found in value if found is None]


def aligned(rows: Iterable[Row], columns: Sequence[Column]) -> list[str]:
    """Lines with aligned columns, never cut to a terminal's width: names to the left, figures to the right."""
    cells = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column.name == "kind" else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]
    return [lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]]


def markdown(rows: Iterable[Row], columns: Sequence[Column]) -> list[str]:
    """Lines of a Markdown table."""
    head, *body = _cells(rows, columns)
    rule = [":--" if column.name == "kind" else "--:" for column in columns]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [head, rule, *body]]


def comma_separated(rows: Iterable[Row], kind: type) -> str:
    """CSV of all fields of the dataclass `kind`, at full precision; what has no value is left empty."""
    stream = io.StringIO()
    names = [field.name for field in dataclasses.fields(kind)]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain(row) for row in rows)
    return stream.getvalue()


def _cells(rows: Iterable[Row], columns: Sequence[Column]) -> list[list[str]]:
    head = [column.heading for column in columns]
    return [head] + [[column.cell(getattr(row, column.name)) for column in columns] for row in rows]
