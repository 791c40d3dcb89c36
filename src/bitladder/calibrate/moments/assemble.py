"""Writing moments that come from one or several sources: what was collected, and files that are added to it."""

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.moments.moments_file import writing_moments
from bitladder.calibrate.moments.schema import MomentShape, Provenance
from bitladder.calibrate.moments.triangles import Correlations, Floats, LowRank
from bitladder.errors import BitladderError


class MomentsSource(Protocol):
    """What has moments to write. A MomentsFile is a source."""

    @property
    def provenance(self) -> Provenance:
        """The texts and the model."""

    def names(self) -> list[str]:
        """Weights that it has moments of."""

    def entry(self, name: str) -> str:
        """The weight under whose name a weight's entry is kept."""

    def shape(self, name: str) -> MomentShape:
        """How large a weight's entry is."""

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        """Tokens that each matrix of a weight saw, int64 [matrices]."""

    def packed(self, name: str, matrix: int = 0) -> Floats:
        """The moments of one matrix of a weight: the upper triangle by rows, float32."""

    def outputs(self, name: str) -> Correlations | LowRank | None:
        """E[ggᵀ] of a weight; None if it is not known."""


def write_sources(path: str | os.PathLike[str], sources: Sequence[MomentsSource]) -> Provenance:
    """Writes the mean of all sources. Each token counts alike; a single source is written as it is.

    Parameters:
        path: the file to write.
        sources: at least one.

    Returns:
        Where the moments of the file come from.

    Raises:
        BitladderError: the sources are of different models, or weight tokens in different ways.
    """
    provenance = _joined_provenance(sources)
    names = sources[0].names()
    for other in sources[1:]:
        unshared = sorted(set(names) ^ set(other.names()))
        if unshared:
            raise BitladderError(f"cannot merge: {unshared[0]} is in only one of the files; these are of two models")
    # Weights share an entry where they share one in all sources. It keeps the name that it has in the first.
    names = sorted(names, key=lambda name: sources[0].entry(name) != name)
    owners: dict[tuple[str, ...], str] = {}
    shared: dict[str, str] = {}
    for name in names:
        owner = owners.setdefault(tuple(source.entry(name) for source in sources), name)
        if owner != name:
            shared[name] = owner
    shapes = {name: _joined_shape(name, [source.shape(name) for source in sources]) for name in owners.values()}
    shapes |= {name: _joined_shape(name, [source.shape(name) for source in sources]) for name in shared}
    with writing_moments(path, provenance, shapes, shared) as writer:
        for name, shape in shapes.items():
            counts = np.stack([source.counts(name) for source in sources])
            if name not in shared:
                writer.write_inputs(name, _matrices(sources, name, counts), counts.sum(axis=0))
            if shape.n_out:
                writer.write_outputs(name, _outputs(sources, name, counts))
    return provenance


def _joined_shape(name: str, shapes: Sequence[MomentShape]) -> MomentShape:
    """The shape of a mean: without outputs if they are not kept alike in all sources."""
    if len({(shape.matrices, shape.n_in) for shape in shapes}) > 1:
        raise BitladderError(f"cannot merge {name}: its sizes differ; these are of two models")
    return shapes[0] if len(set(shapes)) == 1 else MomentShape(shapes[0].matrices, shapes[0].n_in)


def _matrices(sources: Sequence[MomentsSource], name: str, counts: npt.NDArray[np.int64]) -> Iterator[Floats]:
    for matrix in range(counts.shape[1]):
        yield _mean([source.packed(name, matrix) for source in sources], counts[:, matrix])


def _outputs(sources: Sequence[MomentsSource], name: str, counts: npt.NDArray[np.int64]) -> Correlations | LowRank:
    outputs = [values for source in sources if (values := source.outputs(name)) is not None]
    tokens = counts.sum(axis=1)
    if len(outputs) == 1:
        return outputs[0]
    low = [values for values in outputs if isinstance(values, LowRank)]
    if not low:
        return Correlations.of(
            _mean([values.packed() for values in outputs if isinstance(values, Correlations)], tokens)
        )
    # The mean of F Fᵀ is that of all columns side by side, of which the largest directions stay.
    shares = np.sqrt(tokens / max(int(tokens.sum()), 1)).astype(np.float32)
    columns = np.concatenate([share * values.factors() for share, values in zip(shares, low, strict=True)], axis=1)
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    rank = low[0].values.shape[1]
    return LowRank.of(left[:, :rank] * sizes[:rank], _mean([values.diagonals[0] for values in low], tokens))


def _mean(values: Sequence[Floats], counts: npt.NDArray[np.int64]) -> Floats:
    """The mean of arrays, each weighted by its count of tokens.

    Example:
        >>> _mean([np.array([1.0], np.float32), np.array([5.0], np.float32)], np.array([3, 1])).tolist()
        [2.0]
    """
    if len(values) == 1:
        return values[0]
    total = max(int(counts.sum()), 1)
    mean = np.zeros(values[0].shape)
    for array, count in zip(values, counts, strict=True):
        mean += array * np.float64(count / total)
    return mean.astype(np.float32)


def _joined_provenance(sources: Sequence[MomentsSource]) -> Provenance:
    parts = [source.provenance for source in sources]
    weightings = sorted({part.weighting for part in parts})
    if len(weightings) > 1:
        raise BitladderError(f"cannot merge moments that weight tokens by {' and by '.join(weightings)}")
    models = {part.model_sha256 for part in parts} - {""}
    if len(models) > 1:
        raise BitladderError("cannot merge: these moments were collected from different models (moments.model_sha256)")
    datasets = [name for part in parts for name in part.datasets]
    chunks = sum(part.chunk_count for part in parts)
    return Provenance(datasets, chunks, parts[0].chunk_size, parts[0].weighting, next(iter(models), ""))
