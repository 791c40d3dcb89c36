"""Writing moments that come from one or several sources: what was collected, and files to add to it."""

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.moments.moments_file import Floats, Provenance, Shape, writing_moments
from bitladder.errors import BitladderError


class Source(Protocol):
    """Where moments come from. A MomentsFile is one."""

    @property
    def provenance(self) -> Provenance:
        """Of what."""

    def names(self) -> list[str]:
        """Weights that it has."""

    def entry(self, name: str) -> str:
        """The weight under whose name an entry is kept."""

    def shape(self, name: str) -> Shape:
        """How large it is."""

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        """Tokens seen by each matrix."""

    def packed(self, name: str, matrix: int = 0) -> Floats:
        """The mean of one matrix, packed."""

    def packed_outputs(self, name: str) -> Floats | None:
        """E[ggᵀ], packed, or None."""


def write_sources(path: str | os.PathLike[str], sources: Sequence[Source]) -> Provenance:
    """Write the mean of all sources, each token counting alike; of one source, exactly what it holds.

    Returns where the result comes from. Raises BitladderError if sources are of different models, or if their tokens
    were weighted in different ways.
    """
    provenance = _together(sources)
    names = sources[0].names()
    for other in sources[1:]:
        odd = sorted(set(names) ^ set(other.names()))
        if odd:
            raise BitladderError(f"cannot merge: {odd[0]} is in only one of the files; these are of two models")
    # Weights share an entry where they do in all sources; it keeps the name that it has in the first.
    names = sorted(names, key=lambda name: sources[0].entry(name) != name)
    first: dict[tuple[str, ...], str] = {}
    shared: dict[str, str] = {}
    for name in names:
        kept = first.setdefault(tuple(source.entry(name) for source in sources), name)
        if kept != name:
            shared[name] = kept
    shapes = {}
    for name in first.values():
        found = [source.shape(name) for source in sources]
        if len({(shape.matrices, shape.n_in) for shape in found}) > 1:
            raise BitladderError(f"cannot merge {name}: its sizes differ; these are of two models")
        outputs = min(shape.n_out for shape in found)
        shapes[name] = Shape(found[0].matrices, found[0].n_in, outputs)
    with writing_moments(path, provenance, shapes, shared) as writer:
        for name, shape in shapes.items():
            counts = np.stack([source.counts(name) for source in sources])
            gradients = _outputs(sources, name, counts) if shape.n_out else None
            writer.write_packed(name, _matrices(sources, name, counts), counts.sum(axis=0), gradients)
    return provenance


def _matrices(sources: Sequence[Source], name: str, counts: npt.NDArray[np.int64]) -> Iterator[Floats]:
    for matrix in range(counts.shape[1]):
        yield _mean([source.packed(name, matrix) for source in sources], counts[:, matrix])


def _outputs(sources: Sequence[Source], name: str, counts: npt.NDArray[np.int64]) -> Floats:
    found = [values for source in sources if (values := source.packed_outputs(name)) is not None]
    return _mean(found, counts.sum(axis=1))


def _mean(values: Sequence[Floats], counts: npt.NDArray[np.int64]) -> Floats:
    if len(values) == 1:
        return values[0]
    total = max(int(counts.sum()), 1)
    mean = np.zeros(values[0].shape)
    for one, count in zip(values, counts, strict=True):
        mean += one * np.float64(count / total)
    return mean.astype(np.float32)


def _together(sources: Sequence[Source]) -> Provenance:
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
