"""What `bitladder stats` shows of one importance matrix, or of two: rows, columns, gaps, and how they are printed."""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from bitladder.calibrate import (
    Gaps,
    GroupStatistics,
    Imatrix,
    ImatrixComparison,
    TensorDifference,
    TensorStatistics,
    by_kind,
    by_layer,
    compare_imatrices,
    find_gaps,
    grouped_differences,
    listed,
    read_imatrix,
    tensor_statistics,
)
from bitladder.errors import UsageError, did_you_mean
from bitladder.gguf import imatrix_place, ranges
from bitladder.show import imatrix_tables as tables
from bitladder.show.heatmap import FigureMap, TerminalMap, make_map
from bitladder.show.imatrix_tables import FigureColumn, FigureRow, find_column, plain, sort_rows
from bitladder.show.output import Output
from bitladder.units import number_of

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class ImatrixView:
    """What is shown.

    Parameters:
        heading: what it is of.
        by: "tensor", "layer" or "kind".
        columns: columns of the table.
        rows: dataclasses of `row_type`.
        row_type: their class.
        notes: the gaps, a line each.
        about: the rest of the JSON.
        tensors: rows by tensor, which a map is made of.
        tensor_columns: their columns.
    """

    heading: str
    by: str
    columns: Sequence[FigureColumn]
    rows: Sequence[FigureRow]
    row_type: type
    notes: list[str]
    about: dict[str, Any]
    tensors: Sequence[TensorStatistics | TensorDifference]
    tensor_columns: Sequence[FigureColumn]

    def map(self, column: str) -> FigureMap:
        """A column of figures as layers × kinds. Raises UsageError if there is no such column."""
        return make_map(self.tensors, find_column(self.tensor_columns, column, numeric=True))

    def to_json(self) -> dict[str, Any]:
        """As JSON: fractions are of 1; what is not defined is null."""
        return {**self.about, "by": self.by, "rows": [plain(row) for row in self.rows]}


def view_statistics(
    path: PathLike, model: PathLike | None, kinds: Collection[str] = (), by: str = "tensor", sort: str | None = None
) -> ImatrixView:
    """The figures of one imatrix.

    Parameters:
        path: the imatrix.
        model: the model's GGUF, for gaps; or None.
        kinds: kinds of tensors to show; all if none is named.
        by: "tensor", "layer" or "kind".
        sort: a column to sort by, with "-" before it for the other order.

    Raises:
        BitladderError: a file cannot be read.
        UsageError: there is no such kind or column.
    """
    imatrix = read_imatrix(path, finite=False)
    _check_kinds(kinds, imatrix.entries)
    gaps = find_gaps(imatrix, model).of_kinds(kinds)
    tensors = [tensor for tensor in tensor_statistics(imatrix) if not kinds or tensor.kind in kinds]
    rows: Sequence[FigureRow] = tensors
    if by != "tensor":
        rows = by_layer(tensors) if by == "layer" else by_kind(tensors)
    columns = tables.STATISTICS[by]
    return ImatrixView(
        heading=_heading(path, imatrix),
        by=by,
        columns=columns,
        rows=sort_rows(rows, columns, sort) if sort else rows,
        row_type=TensorStatistics if by == "tensor" else GroupStatistics,
        notes=gaps.lines(),
        about={**_about(path, imatrix), "gaps": gaps.to_json()},
        tensors=tensors,
        tensor_columns=tables.TENSOR,
    )


def view_differences(
    path_a: PathLike,
    path_b: PathLike,
    model: PathLike | None,
    kinds: Collection[str] = (),
    by: str = "tensor",
    sort: str | None = None,
) -> ImatrixView:
    """How two imatrices of one model differ. Parameters and errors are as of `view_statistics`."""
    a, b = read_imatrix(path_a, finite=False), read_imatrix(path_b, finite=False)
    _check_kinds(kinds, {*a.entries, *b.entries})
    comparison = compare_imatrices(a, b).of_kinds(kinds)
    gaps = [find_gaps(imatrix, model).of_kinds(kinds) for imatrix in (a, b)]
    rows: Sequence[FigureRow] = (
        comparison.differences if by == "tensor" else grouped_differences(comparison.differences, by)
    )
    columns = tables.DIFFERENCE[by]
    return ImatrixView(
        heading=f"A: {_heading(path_a, a)}\nB: {_heading(path_b, b)}",
        by=by,
        columns=columns,
        rows=sort_rows(rows, columns, sort) if sort else rows,
        row_type=TensorDifference,
        notes=_side_notes(comparison) + _gap_notes(gaps),
        about={
            "a": {**_about(path_a, a), "gaps": gaps[0].to_json()},
            "b": {**_about(path_b, b), "gaps": gaps[1].to_json()},
            **comparison.sides(),
        },
        tensors=comparison.differences,
        tensor_columns=tables.DIFFERENCE["tensor"],
    )


def _about(path: PathLike, imatrix: Imatrix) -> dict[str, Any]:
    # A .dat does not say how long its chunks are.
    return {
        "imatrix": pathlib.Path(path).name,
        "datasets": imatrix.datasets,
        "chunk_count": imatrix.chunk_count,
        "chunk_size": None if imatrix.legacy else imatrix.chunk_size,
    }


def _heading(path: PathLike, imatrix: Imatrix) -> str:
    size = "" if imatrix.legacy else f" of {imatrix.chunk_size} tokens"
    texts = f" of {', '.join(imatrix.datasets)}" if imatrix.datasets else ""
    entries = number_of(len(imatrix.entries), "entry", "entries")
    chunks = number_of(imatrix.chunk_count, "chunk")
    return f"{pathlib.Path(path).name}: {entries} from {chunks}{size}{texts}"


def _check_kinds(kinds: Collection[str], names: Iterable[str]) -> None:
    known = sorted({imatrix_place(name)[1] for name in names})
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"no tensor of kind {kind!r}{did_you_mean(kind, known, 'there are')}")


def _side_notes(comparison: ImatrixComparison) -> list[str]:
    notes = []
    for side, names, experts in (
        ("A", comparison.only_a, comparison.experts_only_a),
        ("B", comparison.only_b, comparison.experts_only_b),
    ):
        if names:
            notes.append(f"only in {side}: {listed(names)}")
        for name, who in experts.items():
            notes.append(f"{name}: experts reached only in {side}: {ranges(who)}")
    return notes


def _gap_notes(gaps: Sequence[Gaps]) -> list[str]:
    """The gaps of both. A gap that both have is one line."""
    a, b = (gap.lines() for gap in gaps)
    shared = [line for line in a if line in b]
    return shared + [f"{side}: {line}" for side, lines in (("A", a), ("B", b)) for line in lines if line not in shared]


def print_view(output: Output, view: ImatrixView, form: str, heatmap: str | None, *, with_rows: bool) -> None:
    """Prints a view.

    Parameters:
        output: where to.
        view: what is shown.
        form: "table", "csv", "json" or "md".
        heatmap: a column to show as a map of layers × kinds, if any.
        with_rows: whether the table is printed too.
    """
    if heatmap:
        output.print(TerminalMap(view.map(heatmap)))
    if form == "json":
        output.print_json(view.to_json())
        return
    if form == "csv":
        output.line(tables.comma_separated(view.rows, view.row_type).removesuffix("\n"))
        for note in view.notes:
            output.progress.warn(note)
        return
    if with_rows:
        output.line(f"{view.heading}\n")
        if form == "md":
            for line in tables.markdown(view.rows, view.columns):
                output.line(line)
        else:
            output.print(tables.figure_table(view.rows, view.columns))
    if view.notes:
        output.line("")
    for note in view.notes:
        output.line(f"- {note}" if form == "md" else f"gap: {note}")
