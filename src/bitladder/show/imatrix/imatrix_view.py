"""What `bitladder stats` shows: rows, columns and notes of one imatrix, or of two."""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from bitladder.calibrate.imatrix import Imatrix, read_imatrix
from bitladder.calibrate.statistics.compare_imatrices import Comparison, TensorDifference, compare, grouped
from bitladder.calibrate.statistics.figures import TensorStatistics, tensor_statistics
from bitladder.calibrate.statistics.gaps import Gaps, find_gaps, listed
from bitladder.calibrate.statistics.groups import GroupStatistics, by_kind, by_layer
from bitladder.errors import UsageError
from bitladder.gguf.names import imatrix_place, ranges
from bitladder.show.imatrix import tables as shown
from bitladder.show.imatrix.formats import Row, plain, sort_rows
from bitladder.show.imatrix.grid import Grid, make_grid
from bitladder.show.imatrix.tables import Column, find_column

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class View:
    """`rows` are dataclasses of `row_type`, shown by `columns`; `notes` are the gaps, a line each.

    `tensors` are the rows per tensor that `grid` draws, by `tensor_columns`; `about` is the rest of the JSON.
    """

    heading: str
    by: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    row_type: type
    notes: list[str]
    about: dict[str, Any]
    tensors: Sequence[TensorStatistics | TensorDifference]
    tensor_columns: Sequence[Column]

    def grid(self, column: str) -> Grid:
        """A column of figures as layers × kinds. Raises UsageError if there is no such column."""
        return make_grid(self.tensors, find_column(self.tensor_columns, column, numeric=True))

    def to_json(self) -> dict[str, Any]:
        """As JSON: fractions are of 1, and what is not defined is null."""
        return {**self.about, "by": self.by, "rows": [plain(row) for row in self.rows]}


def statistics(
    path: PathLike, model: PathLike | None, kinds: Collection[str] = (), by: str = "tensor", sort: str | None = None
) -> View:
    """The figures of one imatrix. Raises BitladderError or UsageError as reading, kinds and columns do."""
    imatrix = read_imatrix(path, finite=False)
    _check_kinds(kinds, imatrix.entries)
    gaps = find_gaps(imatrix, model).of_kinds(kinds)
    tensors = [tensor for tensor in tensor_statistics(imatrix) if not kinds or tensor.kind in kinds]
    rows: Sequence[Row] = tensors
    if by != "tensor":
        rows = by_layer(tensors) if by == "layer" else by_kind(tensors)
    columns = shown.STATISTICS[by]
    return View(
        heading=_heading(path, imatrix),
        by=by,
        columns=columns,
        rows=sort_rows(rows, columns, sort) if sort else rows,
        row_type=TensorStatistics if by == "tensor" else GroupStatistics,
        notes=gaps.lines(),
        about={**_about(path, imatrix), "gaps": gaps.to_json()},
        tensors=tensors,
        tensor_columns=shown.TENSOR,
    )


def differences(
    path_a: PathLike,
    path_b: PathLike,
    model: PathLike | None,
    kinds: Collection[str] = (),
    by: str = "tensor",
    sort: str | None = None,
) -> View:
    """How two imatrices of one model differ. Raises as `statistics` does, and if these are of two models."""
    a, b = read_imatrix(path_a, finite=False), read_imatrix(path_b, finite=False)
    _check_kinds(kinds, {*a.entries, *b.entries})
    found = compare(a, b).of_kinds(kinds)
    gaps = [find_gaps(imatrix, model).of_kinds(kinds) for imatrix in (a, b)]
    rows: Sequence[Row] = found.differences if by == "tensor" else grouped(found.differences, by)
    columns = shown.DIFFERENCE[by]
    return View(
        heading=f"A: {_heading(path_a, a)}\nB: {_heading(path_b, b)}",
        by=by,
        columns=columns,
        rows=sort_rows(rows, columns, sort) if sort else rows,
        row_type=TensorDifference,
        notes=_side_notes(found) + _gap_notes(gaps),
        about={
            "a": {**_about(path_a, a), "gaps": gaps[0].to_json()},
            "b": {**_about(path_b, b), "gaps": gaps[1].to_json()},
            **found.sides(),
        },
        tensors=found.differences,
        tensor_columns=shown.DIFFERENCE["tensor"],
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
    count = len(imatrix.entries)
    chunks = f"{imatrix.chunk_count} chunk{'' if imatrix.chunk_count == 1 else 's'}"
    return f"{pathlib.Path(path).name}: {count} entries from {chunks}{size}{texts}"


def _check_kinds(kinds: Collection[str], names: Iterable[str]) -> None:
    known = sorted({imatrix_place(name)[1] for name in names})
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"no tensor of kind {kind!r}; there are {', '.join(known)}")


def _side_notes(found: Comparison) -> list[str]:
    notes = []
    for side, names, experts in (
        ("A", found.only_a, found.experts_only_a),
        ("B", found.only_b, found.experts_only_b),
    ):
        if names:
            notes.append(f"only in {side}: {listed(names)}")
        for name, who in experts.items():
            notes.append(f"{name}: experts reached only in {side}: {ranges(who)}")
    return notes


def _gap_notes(gaps: Sequence[Gaps]) -> list[str]:
    """The gaps of both; what they share is said once."""
    a, b = (found.lines() for found in gaps)
    shared = [line for line in a if line in b]
    return shared + [f"{side}: {line}" for side, lines in (("A", a), ("B", b)) for line in lines if line not in shared]
