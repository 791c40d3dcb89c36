"""The tables of an importance matrix: their columns, with llama-imatrix's headings, and the forms of their rows."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from bitladder.errors import UsageError, did_you_mean
from bitladder.show.table import Column, Table

DASH = "–"


@dataclasses.dataclass(frozen=True)
class FigureColumn:
    """A column.

    Parameters:
        name: its name in JSON and CSV.
        heading: what people read.
        digits: after the point; None for text and whole numbers.
        percent: whether a fraction is shown times 100.
        scale: how colours follow values: "log" for what spans powers of ten, "linear", or "signed" around 0.
        also: other names by which a user may call it.
        rank: when it gives way in a narrow terminal (`show.table.Column`).
    """

    name: str
    heading: str
    digits: int | None = None
    percent: bool = False
    scale: str = "linear"
    also: tuple[str, ...] = ()
    rank: int = 0

    @property
    def numeric(self) -> bool:
        """Whether it has figures, which can be drawn, and not names."""
        return self.digits is not None or self.name == "n"

    def cell(self, value: Any) -> str:
        """The value as text; a dash for None.

        Example:
            >>> FigureColumn("zd", "ZD", 2, percent=True, rank=2).cell(0.25)
            '25.00%'
        """
        if value is None:
            return DASH
        if self.digits is None:
            return str(value)
        if math.isinf(value):
            return "∞"
        shown = value * 100 if self.percent else value
        sign = "+" if self.scale == "signed" else ""
        # A value that would be rounded to 0 keeps two digits.
        small = 0 < abs(shown) < 0.5 * 10**-self.digits
        text = f"{shown:{sign}.1e}" if small else f"{shown:{sign}z.{self.digits}f}"
        return text + ("%" if self.percent else "")


_LAYER, _KIND, _N = FigureColumn("layer", "Layer"), FigureColumn("kind", "Tensor"), FigureColumn("n", "N", rank=4)
_COSSIM = FigureColumn("cossim", "CosSim", 4, rank=3)

TENSOR = (
    _LAYER,
    _KIND,
    FigureColumn("sum", "Σ(Act²)", 2, scale="log", also=("Σ",)),
    FigureColumn("min", "Min", 4, scale="log", rank=5),
    FigureColumn("max", "Max", 4, scale="log", rank=6),
    FigureColumn("mean", "μ", 4, scale="log", rank=7),
    FigureColumn("std", "σ", 4, scale="log", rank=8),
    FigureColumn("active", "% Active", 2, percent=True, rank=1),
    _N,
    FigureColumn("entropy", "Entropy", 4, rank=9),
    FigureColumn("entropy_norm", "E (norm)", 2, percent=True, also=("E(norm)",), rank=3),
    FigureColumn("zd", "ZD", 2, percent=True, rank=2),
    _COSSIM,
)
_GROUP = (
    FigureColumn("tensors", "Tensors"),
    FigureColumn("sum", "μΣ(Act²)", 2, scale="log"),
    FigureColumn("active", "μ% Active", 2, percent=True, rank=1),
    _N,
    FigureColumn("entropy_norm", "μE (norm)", 2, percent=True, also=("μE(norm)",), rank=3),
    FigureColumn("zd", "μZD", 4, percent=True, rank=2),
    FigureColumn("cossim", "μCosSim", 4, rank=4),
)
LAYER, KIND = (_LAYER, *_GROUP), (_KIND, *_GROUP)
_DIFFERENCE = (
    _N,
    FigureColumn("sum_a", "Σ(Act²) A", 2, scale="log", rank=2),
    FigureColumn("sum_b", "Σ(Act²) B", 2, scale="log", rank=1),
    FigureColumn("change", "Change", 2, percent=True, scale="signed"),
    FigureColumn("cosine", "Cosine", 6),
)
DIFFERENCE = {
    "tensor": (_LAYER, _KIND, *_DIFFERENCE),
    "layer": (_LAYER, _GROUP[0], *_DIFFERENCE),
    "kind": (_KIND, _GROUP[0], *_DIFFERENCE),
}
STATISTICS = {"tensor": TENSOR, "layer": LAYER, "kind": KIND}


def find_column(columns: Sequence[FigureColumn], called: str, *, numeric: bool = False) -> FigureColumn:
    """The column of that name or heading, in any case. Raises UsageError that lists the columns."""
    offered = [column for column in columns if column.numeric or not numeric]
    for fold in (str, str.casefold):
        for column in offered:
            if fold(called) in [fold(name) for name in (column.name, column.heading, *column.also)]:
                return column
    names = [column.name for column in offered]
    raise UsageError(f"no such column: {called!r}{did_you_mean(called, names, 'there are')}")


class FigureRow(Protocol):
    """A row: a dataclass with a field for each column."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def plain(row: FigureRow) -> dict[str, Any]:
    """All fields of a row for JSON or CSV, with None for a number that is not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in ((field.name, getattr(row, field.name)) for field in dataclasses.fields(row))
    }


R = TypeVar("R", bound=FigureRow)


def sort_rows(rows: Iterable[R], columns: Sequence[FigureColumn], by: str) -> list[R]:
    """Rows sorted by a column: figures from the largest, names and layers from the first. "-" reverses the order.

    A row without a value comes last in both orders. Raises UsageError if there is no such column.
    """
    column = find_column(columns, by.removeprefix("-"))
    descending = column.numeric != by.startswith("-")
    pairs = [(row, getattr(row, column.name)) for row in rows]
    present = sorted((pair for pair in pairs if pair[1] is not None), key=lambda pair: pair[1], reverse=descending)
    return [row for row, _ in present] + [row for row, value in pairs if value is None]


def figure_table(rows: Iterable[FigureRow], columns: Sequence[FigureColumn]) -> Table:
    """The table of the terminal: names to the left and figures to the right."""
    table = Table([Column(column.heading, column.name != "kind", column.rank) for column in columns])
    _, *body = _cells(rows, columns)
    for cells in body:
        table.add(*cells)
    return table


def markdown(rows: Iterable[FigureRow], columns: Sequence[FigureColumn]) -> list[str]:
    """Lines of a Markdown table."""
    head, *body = _cells(rows, columns)
    rule = [":--" if column.name == "kind" else "--:" for column in columns]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [head, rule, *body]]


def comma_separated(rows: Iterable[FigureRow], kind: type) -> str:
    """CSV of all fields of the dataclass `kind`, at full precision. A field without a value is empty."""
    stream = io.StringIO()
    names = [field.name for field in dataclasses.fields(kind)]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain(row) for row in rows)
    return stream.getvalue()


def _cells(rows: Iterable[FigureRow], columns: Sequence[FigureColumn]) -> list[list[str]]:
    head = [column.heading for column in columns]
    return [head] + [[column.cell(getattr(row, column.name)) for column in columns] for row in rows]
