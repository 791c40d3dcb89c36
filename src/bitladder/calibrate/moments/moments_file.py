"""Second moments of inputs: what they are, and the file that keeps them.

For each weight H = E[w xxᵀ] over its inputs x. With w = 1 its diagonal is the imatrix. With w what an error at that
token costs (see gradients), it says what an error of the weight costs. A file is a GGUF with general.type "moments".
Each symmetric matrix M is a diagonal, F32, and the upper triangle of M_ij / sqrt(M_ii M_jj) by rows, F16: NAME.diagonal
and NAME.moments for each matrix of H, NAME.outputs.diagonal and NAME.outputs for each diagonal block of O = E[ggᵀ].
Where O is near F Fᵀ for an F of few columns, NAME.outputs.factors are F_i / sqrt(O_ii), F16, in place of NAME.outputs.
NAME.counts are the tokens that each matrix saw. Weights that multiply the same input share one entry; `moments.shared`
lists them in pairs (the weight, the weight under whose name its entry is kept).
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.moments.schema import (
    COUNTS,
    INPUT_DIAGONALS,
    INPUTS,
    OUTPUT_DIAGONALS,
    OUTPUT_FACTORS,
    OUTPUTS,
    MomentShape,
    Provenance,
    read_contents,
)
from bitladder.calibrate.moments.triangles import (
    Correlations,
    Floats,
    LowRank,
    pack_triangle,
    triangle,
    unpack_triangle,
    within_one,
)
from bitladder.engine import type_by_name
from bitladder.errors import BitladderError, overflow
from bitladder.files import Closing, replacing, sha256_file
from bitladder.gguf import GgufFile, GgufWriter, TensorPlan, Value, string, strings, u32


@dataclasses.dataclass(frozen=True)
class Moment:
    """Second moments of one weight. A matrix is an expert, or the whole weight.

    Parameters:
        inputs: the mean of w xxᵀ over tokens, float32 [matrices, n_in, n_in].
        counts: tokens that each matrix saw, int64 [matrices].
        outputs: E[ggᵀ] of the gradients at the weight's output, float32 [n_out, n_out]; None if it is not known.
            Between blocks that are kept apart it is 0.
    """

    inputs: Floats
    counts: npt.NDArray[np.int64]
    outputs: Floats | None = None


class MomentsFile(Closing):
    """An open file of moments. Entries are read when they are asked for.

    Raises:
        BitladderError: the file holds no moments, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise BitladderError(f"no such moments file: {path}")
        self._file = GgufFile(self.path)
        try:
            self._contents = read_contents(self._file, self.path)
        except BaseException:
            self._file.close()
            raise

    @property
    def provenance(self) -> Provenance:
        """The texts and the model."""
        return self._contents.provenance

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the file's content."""
        return sha256_file(self.path)

    def names(self) -> list[str]:
        """Weights with moments, sorted. Those that share an entry are included."""
        return sorted({*self._contents.shapes, *self._contents.shared})

    def entry(self, name: str) -> str:
        """The weight under whose name a weight's entry is kept. Weights that share an entry have the same input."""
        return self._contents.shared.get(name, name)

    def __contains__(self, name: str) -> bool:
        return name in self._contents.shapes

    def read(self, name: str) -> Moment:
        """The moments of a weight. Raises BitladderError if it has none, or they are damaged."""
        outputs = self.outputs(name)
        return Moment(self.inputs(name), self.counts(name), None if outputs is None else outputs.matrix())

    def inputs(self, name: str) -> Floats:
        """The mean of w xxᵀ, float32 [matrices, n_in, n_in]."""
        return np.stack([unpack_triangle(self.packed(name, index)) for index in range(self.shape(name).matrices)])

    def shape(self, name: str) -> MomentShape:
        """How large a weight's entry is. Raises BitladderError if it has none."""
        shape = self._contents.shapes.get(name)
        if shape is None:
            raise BitladderError(f"{self.path} has no second moments for {name}; collect them for this model")
        return shape

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        """Tokens seen by each matrix of a weight, int64 [matrices]."""
        self.shape(name)
        counts = self._file.read(self._file.tensors[self.entry(name) + COUNTS]).view(np.float32)
        return np.rint(counts.reshape(-1)).astype(np.int64)

    def packed(self, name: str, matrix: int = 0) -> Floats:
        """The moments of one matrix (expert) of a weight: see `unpack_triangle`."""
        packed: Floats = self.kept_inputs(name, matrix).packed()[0]
        return packed

    def kept_inputs(self, name: str, matrix: int = 0) -> Correlations:
        """The moments of one matrix (expert) of a weight, as they are kept."""
        self.shape(name)
        return Correlations(*self._pair(self.entry(name), INPUTS, INPUT_DIAGONALS, matrix, matrix + 1))

    def outputs(self, name: str) -> Correlations | LowRank | None:
        """O = E[ggᵀ] as it is kept; None if it is not known."""
        shape = self.shape(name)
        if not shape.n_out:
            return None
        if shape.rank:
            return LowRank(*self._pair(name, OUTPUT_FACTORS, OUTPUT_DIAGONALS))
        return Correlations(*self._pair(name, OUTPUTS, OUTPUT_DIAGONALS))

    def _pair(
        self, name: str, part: str, diagonal: str, start: int = 0, stop: int | None = None
    ) -> tuple[npt.NDArray[np.float16], Floats]:
        values = self._file.read(self._file.tensors[name + part], start, stop).view(np.float16)
        diagonals = self._file.read(self._file.tensors[name + diagonal], start, stop).view(np.float32)
        if not (np.isfinite(diagonals).all() and (diagonals >= 0).all() and within_one(values)):
            raise BitladderError(
                f"{self.path}: {name}{part} are no second moments: a value is not finite, a square is negative, or a "
                "correlation is above 1; collect them again"
            )
        return values, diagonals


class MomentsWriter:
    """Writes entries in the order announced; see `writing_moments`."""

    def __init__(self, writer: GgufWriter, stream: BinaryIO) -> None:
        self._writer, self._stream = writer, stream

    def write(self, name: str, moment: Moment) -> None:
        """Appends an entry, which must be the next one, and its moments of outputs as a whole."""
        self.write_inputs(name, (Correlations.of(pack_triangle(each)[None]) for each in moment.inputs), moment.counts)
        if moment.outputs is not None:
            self.write_outputs(name, Correlations.of(pack_triangle(moment.outputs)[None]))

    def write_inputs(self, name: str, matrices: Iterable[Correlations], counts: npt.NDArray[np.int64]) -> None:
        """Appends matrices, which are read one after the other.

        Raises BitladderError that names the weight if a value is not finite.
        """
        diagonals = []
        for part in matrices:
            self._refuse_not_finite(name, part)
            self._put(name + INPUTS, part.values)
            diagonals.append(part.diagonals)
        self._put(name + INPUT_DIAGONALS, np.concatenate(diagonals))
        self._put(name + COUNTS, counts.astype(np.float32))

    def write_outputs(self, name: str, outputs: Correlations | LowRank) -> None:
        """Appends moments of outputs. Raises BitladderError that names the weight if a value is not finite."""
        self._refuse_not_finite(name, outputs)
        self._put(name + (OUTPUT_FACTORS if isinstance(outputs, LowRank) else OUTPUTS), outputs.values)
        self._put(name + OUTPUT_DIAGONALS, outputs.diagonals)

    def sync(self) -> None:
        """Waits until the disk has taken what was written."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _put(self, name: str, values: npt.NDArray[np.floating]) -> None:
        self._writer.write(name, np.ascontiguousarray(values).view(np.uint8))

    def _refuse_not_finite(self, name: str, kept: Correlations | LowRank) -> None:
        if not (np.isfinite(kept.diagonals).all() and within_one(kept.values)):
            raise overflow(f"the second moments of {name} are")


@contextlib.contextmanager
def writing_moments(
    path: str | os.PathLike[str], provenance: Provenance, shapes: Mapping[str, MomentShape], shared: Mapping[str, str]
) -> Iterator[MomentsWriter]:
    """Writes a file of moments in one step. It appears when all entries were written.

    Parameters:
        path: the file.
        provenance: where the moments come from.
        shapes: sizes of the entries, in the order in which they will be written: first inputs, then outputs. Of a
            weight that shares an entry only outputs are written.
        shared: the weight whose entry it has, by the name of a weight without its own.
    """
    metadata: dict[str, Value] = {
        "general.type": string("moments"),
        "moments.datasets": strings(provenance.datasets),
        "moments.chunk_count": u32(provenance.chunk_count),
        "moments.chunk_size": u32(provenance.chunk_size),
        "moments.weighting": string(provenance.weighting),
        "moments.model_sha256": string(provenance.model_sha256),
        "moments.shared": strings([part for pair in shared.items() for part in pair]),
    }
    plans = [plan for name, shape in shapes.items() for plan in _plans(name, shape, name in shared)]
    with replacing(path) as temporary, temporary.open("wb") as stream:
        writer = GgufWriter(stream, metadata, plans)
        yield MomentsWriter(writer, stream)
        writer.finish()


def _plans(name: str, shape: MomentShape, shared: bool) -> Iterator[TensorPlan]:
    half, single = type_by_name("f16"), type_by_name("f32")
    if not shared:
        yield TensorPlan(name + INPUTS, (triangle(shape.n_in), shape.matrices), half)
        yield TensorPlan(name + INPUT_DIAGONALS, (shape.n_in, shape.matrices), single)
        yield TensorPlan(name + COUNTS, (1, shape.matrices), single)
    if shape.rank:
        yield TensorPlan(name + OUTPUT_FACTORS, (shape.rank, shape.n_out), half)
    elif shape.n_out:
        yield TensorPlan(name + OUTPUTS, (triangle(shape.n_out // shape.blocks), shape.blocks), half)
    if shape.n_out:
        yield TensorPlan(name + OUTPUT_DIAGONALS, (shape.n_out // shape.blocks, shape.blocks), single)


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

    def kept_inputs(self, name: str, matrix: int = 0) -> Correlations:
        """`packed` in half precision, of a single matrix."""

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


def _matrices(sources: Sequence[MomentsSource], name: str, counts: npt.NDArray[np.int64]) -> Iterator[Correlations]:
    for matrix in range(counts.shape[1]):
        if len(sources) == 1:
            yield sources[0].kept_inputs(name, matrix)
        else:
            mean = _mean([source.packed(name, matrix) for source in sources], counts[:, matrix])
            yield Correlations.of(mean[None])


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
