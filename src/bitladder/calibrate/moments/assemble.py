"""Writing moments that come from one or several sources: what was collected, and files that are added to it."""

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.moments.moments_file import Floats, MomentShape, Provenance, writing_moments
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

    def packed_outputs(self, name: str) -> Floats | None:
        """E[ggᵀ] of a weight: the upper triangle by rows, float32; None if it is not known."""


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
    shapes = {}
    for name in owners.values():
        sizes = [source.shape(name) for source in sources]
        if len({(shape.matrices, shape.n_in) for shape in sizes}) > 1:
            raise BitladderError(f"cannot merge {name}: its sizes differ; these are of two models")
        shapes[name] = MomentShape(sizes[0].matrices, sizes[0].n_in, min(shape.n_out for shape in sizes))
    with writing_moments(path, provenance, shapes, shared) as writer:
        for name, shape in shapes.items():
            counts = np.stack([source.counts(name) for source in sources])
            gradients = _outputs(sources, name, counts) if shape.n_out else None
            writer.write_packed(name, _matrices(sources, name, counts), counts.sum(axis=0), gradients)
    return provenance


def _matrices(sources: Sequence[MomentsSource], name: str, counts: npt.NDArray[np.int64]) -> Iterator[Floats]:
    for matrix in range(counts.shape[1]):
        yield _mean([source.packed(name, matrix) for source in sources], counts[:, matrix])


def _outputs(sources: Sequence[MomentsSource], name: str, counts: npt.NDArray[np.int64]) -> Floats:
    outputs = [values for source in sources if (values := source.packed_outputs(name)) is not None]
    return _mean(outputs, counts.sum(axis=1))


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
