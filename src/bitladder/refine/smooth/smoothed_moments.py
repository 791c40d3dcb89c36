"""The second moments of a smoothed model follow from those of the model before."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bitladder.calibrate import Correlations, LowRank, MomentsFile, MomentShape, pack_triangle, writing_moments
from bitladder.engine import in_order
from bitladder.refine.model_files import Indices
from bitladder.refine.smooth.changes import Change


def smoothed_moments(
    moments: Sequence[pathlib.Path],
    changes: Mapping[str, Change],
    out: Sequence[pathlib.Path],
    model_sha256: str,
    threads: int | None = None,
) -> None:
    """Writes the second moments of the smoothed model.

    They are those that collecting on the smoothed model gives, up to the rounding of F16. The weights of tokens are an
    exception: for v and up they stay those of the gradients before smoothing.

    Parameters:
        moments: paths of second moments of the model before.
        changes: what happened to each tensor.
        out: paths to write, one for each.
        model_sha256: hash of the smoothed model.
        threads: threads of the CPU; None takes all. Each has the moments of a matrix in memory.

    Raises:
        BitladderError: a file holds no second moments.
    """
    with contextlib.ExitStack() as opened:
        files = [_Smoothed(opened.enter_context(MomentsFile(path)), changes) for path in moments]
        works = itertools.chain.from_iterable(file.works() for file in files)
        # While a file is synced, moments of the next one are made.
        moments_in_order = opened.enter_context(contextlib.closing(in_order(works, threads, ahead=2)))
        for file, path in zip(files, out, strict=True):
            file.write(moments_in_order, path, model_sha256)


class _Smoothed:
    """The moments of a file after smoothing."""

    def __init__(self, old: MomentsFile, changes: Mapping[str, Change]) -> None:
        self._old = old
        self._changes = {name: changes.get(name, Change()) for name in old.names()}
        self._shared = {name: old.entry(name) for name in old.names() if old.entry(name) != name}
        self._shapes = {name: _changed_shape(old.shape(name), change) for name, change in self._changes.items()}

    def works(self) -> Iterator[Callable[[], Any]]:
        """What makes the moments of each weight: of its inputs, matrix by matrix, if it has its own; of its outputs."""
        for name, change in self._changes.items():
            if name not in self._shared:
                for matrix in range(self._shapes[name].matrices):
                    yield functools.partial(_changed_inputs, self._old, name, change, matrix)
            if self._shapes[name].n_out:
                yield functools.partial(_changed_outputs, self._old, name, change)

    def write(self, made: Iterator[Any], path: pathlib.Path, model_sha256: str) -> None:
        """Writes what the works made, which are done in their order."""
        provenance = dataclasses.replace(self._old.provenance, model_sha256=model_sha256)
        with writing_moments(path, provenance, self._shapes, self._shared) as writer:
            for name, shape in self._shapes.items():
                if name not in self._shared:
                    writer.write_inputs(name, itertools.islice(made, shape.matrices), self._old.counts(name))
                if shape.n_out:
                    writer.write_outputs(name, next(made))


def _changed_inputs(moments: MomentsFile, name: str, change: Change, matrix: int) -> Correlations:
    """E[w xxᵀ] of the new inputs of a matrix: they are divided by the scales of a weight's columns."""
    inputs = moments.kept_inputs(name, matrix)
    if change.columns is not None:  # correlations stay what they are
        scales = np.square(change.columns[matrix if len(change.columns) > 1 else 0])
        inputs = Correlations(inputs.values, (inputs.diagonals / scales).astype(np.float32))
    return inputs if change.column_order is None else _ordered(inputs, change.column_order)


def _ordered(moments: Correlations, order: Indices) -> Correlations:
    """Moments of numbers that come in another order."""
    if len(moments.values) == 1:
        return moments.ordered(order)
    return Correlations.of(pack_triangle(moments.matrix()[np.ix_(order, order)])[None])


def _changed_outputs(moments: MomentsFile, name: str, change: Change) -> Correlations | LowRank | None:
    """E[ggᵀ] of the new outputs: one that is divided by s has a gradient that is s times larger."""
    outputs = moments.outputs(name)
    if outputs is None:
        return None
    values, diagonals = outputs.values, outputs.diagonals
    if change.rows is not None:
        # Correlations stay what they are.
        diagonals = np.asarray(diagonals / np.square(change.rows.reshape(diagonals.shape)), np.float32)
    if change.row_order is None:
        return type(outputs)(values, diagonals)
    if isinstance(outputs, LowRank):
        return LowRank(values[change.row_order], diagonals[:, change.row_order])
    return _ordered(Correlations(values, diagonals), change.row_order)


def _changed_shape(shape: MomentShape, change: Change) -> MomentShape:
    """Outputs in another order are not in blocks any more."""
    return shape if change.row_order is None else dataclasses.replace(shape, blocks=1)
