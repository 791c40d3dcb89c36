"""Second moments of inputs: what they are, and the file that keeps them.

For each weight H = E[w xxᵀ] over its inputs x. With w = 1 its diagonal is the imatrix. With w what an error at that
token costs (see gradients), it says what an error of the weight costs. A file is a GGUF with general.type "moments":
NAME.moments holds the upper triangle of each matrix by rows, F32; NAME.counts the tokens that each saw; NAME.outputs
the upper triangle of E[ggᵀ]. Weights that multiply the same input share one entry; `moments.shared` lists them in pairs
(the weight, the weight under whose name its entry is kept).
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine import type_by_name
from bitladder.errors import BitladderError, overflow
from bitladder.files import replacing, sha256_file
from bitladder.gguf import GgufFile, GgufWriter, TensorPlan, Value, describe_kind, string, strings, u32

Floats = npt.NDArray[np.float32]
T = TypeVar("T")
_INPUTS, _COUNTS, _OUTPUTS = ".moments", ".counts", ".outputs"


@dataclasses.dataclass(frozen=True)
class Moment:
    """Second moments of one weight. A matrix is an expert, or the whole weight.

    Parameters:
        inputs: the mean of w xxᵀ over tokens, float32 [matrices, n_in, n_in].
        counts: tokens that each matrix saw, int64 [matrices].
        outputs: E[ggᵀ] of the gradients at the weight's output, float32 [n_out, n_out]; None if it is not known.
    """

    inputs: Floats
    counts: npt.NDArray[np.int64]
    outputs: Floats | None = None


@dataclasses.dataclass(frozen=True)
class MomentShape:
    """How large an entry is.

    Parameters:
        matrices: experts, or 1.
        n_in: numbers of an input.
        n_out: numbers of an output; 0 if moments of outputs are not kept.
    """

    matrices: int
    n_in: int
    n_out: int = 0


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where moments come from.

    Parameters:
        datasets: names of the texts.
        chunk_count: chunks that were read.
        chunk_size: tokens of a chunk.
        weighting: what a token counts by: "tokens" (all alike), "positions" or "gradients".
        model_sha256: hash of the file whose inputs these are.
    """

    datasets: list[str]
    chunk_count: int
    chunk_size: int
    weighting: str = "tokens"
    model_sha256: str = ""


class MomentsFile(Closing):
    """An open file of moments. Entries are read when they are asked for.

    Raises:
        BitladderError: the file holds no moments, or is not whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise BitladderError(f"no such moments file: {path}")
        self._file = GgufFile(self.path)
        try:
            self.provenance, self._shared = self._read_head()
        except BaseException:
            self._file.close()
            raise

    def _read_head(self) -> tuple[Provenance, dict[str, str]]:
        file = self._file
        if file.get("general.type") != "moments":
            raise BitladderError(
                f"{self.path} holds no second moments, but is {describe_kind(file)}; make them with bitladder calibrate"
            )
        pairs: list[str] = self._value("shared", [], str)
        if len(pairs) % 2:
            raise BitladderError(f"{self.path}: moments.shared is not in pairs; collect the moments again")
        shared = dict(zip(pairs[::2], pairs[1::2], strict=True))
        head = Provenance(
            self._value("datasets", [], str),
            self._value("chunk_count", 0),
            self._value("chunk_size", 0),
            self._value("weighting", "tokens"),
            self._value("model_sha256", ""),
        )
        own = {name.removesuffix(_INPUTS) for name in file.tensors if name.endswith(_INPUTS)}
        for name in own:
            self._check_entry(name)
        if missing := sorted(set(shared.values()) - own):
            raise BitladderError(
                f"{self.path} has no entry {missing[0]}, which others share; collect the moments again"
            )
        if not own:
            raise BitladderError(f"{self.path} has no entry at all; collect the moments again")
        return head, shared

    def _value(self, key: str, default: T, item: type | None = None) -> T:
        """A value of the metadata, of the type of the default; of a list, whose items have the type `item`."""
        value = self._file.get(f"moments.{key}", default)
        items = value if isinstance(value, list) else []
        if type(value) is not type(default) or (item and not all(type(one) is item for one in items)):
            raise BitladderError(f"{self.path}: moments.{key} has a wrong type; collect the moments again")
        return value

    def _check_entry(self, name: str) -> None:
        """Raises BitladderError unless an entry has as many matrices as counts, each a whole triangle."""
        inputs, counts = self._file.tensors[name + _INPUTS], self._file.tensors.get(name + _COUNTS)
        outputs = self._file.tensors.get(name + _OUTPUTS)
        sizes = [inputs.width] if outputs is None else [inputs.width, outputs.width]
        fits = counts is not None and counts.elements == inputs.rows
        if not fits or any(triangle(width_of(size)) != size for size in sizes):
            raise BitladderError(f"{self.path}: the entry {name} is not whole; collect the moments again")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the file's content."""
        return sha256_file(self.path)

    def names(self) -> list[str]:
        """Weights with moments, sorted. Those that share an entry are included."""
        own = [name.removesuffix(_INPUTS) for name in self._file.tensors if name.endswith(_INPUTS)]
        return sorted({*own, *self._shared})

    def entry(self, name: str) -> str:
        """The weight under whose name a weight's entry is kept. Weights that share an entry have the same input."""
        return self._shared.get(name, name)

    def __contains__(self, name: str) -> bool:
        return self.entry(name) + _INPUTS in self._file.tensors

    def read(self, name: str) -> Moment:
        """The moments of a weight. Raises BitladderError if it has none, or they are damaged."""
        counts = self.counts(name)
        inputs = np.stack([unpack_triangle(self.packed(name, index)) for index in range(len(counts))])
        outputs = self.packed_outputs(name)
        return Moment(inputs, counts, None if outputs is None else unpack_triangle(outputs))

    def shape(self, name: str) -> MomentShape:
        """How large a weight's entry is."""
        counts, outputs = len(self.counts(name)), self._file.tensors.get(name + _OUTPUTS)
        packed = self._file.tensors[self.entry(name) + _INPUTS]
        return MomentShape(counts, width_of(packed.width), 0 if outputs is None else width_of(outputs.width))

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        """Tokens seen by each matrix of a weight, int64 [matrices]."""
        return np.rint(self._values(name, _COUNTS).reshape(-1)).astype(np.int64)

    def packed(self, name: str, matrix: int = 0) -> Floats:
        """The moments of one matrix (expert) of a weight as they are kept: see `unpack_triangle`."""
        packed: Floats = self._values(name, _INPUTS, matrix)[0]
        return packed

    def packed_outputs(self, name: str) -> Floats | None:
        """E[ggᵀ] as it is kept, or None."""
        return self._values(name, _OUTPUTS)[0] if name + _OUTPUTS in self._file.tensors else None

    def _values(self, name: str, part: str, row: int | None = None) -> Floats:
        kept = name if part == _OUTPUTS else self.entry(name)
        tensor = self._file.tensors.get(kept + part)
        if tensor is None:
            raise BitladderError(f"{self.path} has no second moments for {name}; collect them for this model")
        if tensor.type.name != "f32":
            raise BitladderError(f"{self.path}: {kept}{part} is not F32; the file is damaged, collect it again")
        start, stop = (0, tensor.rows) if row is None else (row, row + 1)
        values = self._file.read(tensor, start, stop).view(np.float32)
        if not np.isfinite(values).all():
            raise BitladderError(f"{self.path}: {name} has moments that are not finite; collect them again")
        return values


class MomentsWriter:
    """Writes entries in the order announced; see `writing_moments`."""

    def __init__(self, writer: GgufWriter) -> None:
        self._writer = writer

    def write(self, name: str, moment: Moment) -> None:
        """Appends an entry, which must be the next one."""
        outputs = None if moment.outputs is None else pack_triangle(moment.outputs)
        self.write_packed(name, map(pack_triangle, moment.inputs), moment.counts, outputs)

    def write_packed(
        self, name: str, matrices: Iterable[Floats], counts: npt.NDArray[np.int64], outputs: Floats | None = None
    ) -> None:
        """Appends an entry of packed matrices (see `pack_triangle`), which are read one after the other.

        Raises BitladderError that names the weight if a value is not finite.
        """
        for packed in matrices:
            self._put(name, _INPUTS, packed)
        self._put(name, _COUNTS, counts.astype(np.float32))
        if outputs is not None:
            self._put(name, _OUTPUTS, outputs)

    def _put(self, name: str, part: str, values: Floats) -> None:
        if not np.isfinite(values).all():
            raise overflow(f"the second moments of {name} are")
        self._writer.write(name + part, np.ascontiguousarray(values, np.float32).view(np.uint8))


@contextlib.contextmanager
def writing_moments(
    path: str | os.PathLike[str], provenance: Provenance, shapes: Mapping[str, MomentShape], shared: Mapping[str, str]
) -> Iterator[MomentsWriter]:
    """Writes a file of moments in one step. It appears when all entries were written.

    Parameters:
        path: the file.
        provenance: where the moments come from.
        shapes: sizes of the entries, in the order in which they will be written.
        shared: the weight whose entry it has, by the name of a weight without its own.
    """
    f32 = type_by_name("f32")
    plans = []
    for name, shape in shapes.items():
        plans.append(TensorPlan(name + _INPUTS, (triangle(shape.n_in), shape.matrices), f32))
        plans.append(TensorPlan(name + _COUNTS, (1, shape.matrices), f32))
        if shape.n_out:
            plans.append(TensorPlan(name + _OUTPUTS, (triangle(shape.n_out), 1), f32))
    metadata: dict[str, Value] = {
        "general.type": string("moments"),
        "moments.datasets": strings(provenance.datasets),
        "moments.chunk_count": u32(provenance.chunk_count),
        "moments.chunk_size": u32(provenance.chunk_size),
        "moments.weighting": string(provenance.weighting),
        "moments.model_sha256": string(provenance.model_sha256),
        "moments.shared": strings([part for pair in shared.items() for part in pair]),
    }
    with replacing(path) as temporary, temporary.open("wb") as stream:
        writer = GgufWriter(stream, metadata, plans)
        yield MomentsWriter(writer)
        writer.finish()


def triangle(n: int) -> int:
    """Numbers in the upper triangle of an n × n matrix, the diagonal included."""
    return n * (n + 1) // 2


def pack_triangle(matrix: npt.NDArray[np.floating]) -> Floats:
    """The upper triangle by rows: [n, n] → float32 [n(n+1)/2].

    Example:
        >>> pack_triangle(np.array([[1.0, 2.0], [2.0, 3.0]])).tolist()
        [1.0, 2.0, 3.0]
    """
    packed, start = np.empty(triangle(len(matrix)), np.float32), 0
    for index, row in enumerate(matrix):
        stop = start + len(row) - index
        packed[start:stop] = row[index:]
        start = stop
    return packed


def unpack_triangle(packed: Floats) -> Floats:
    """The symmetric matrix, float32 [n, n], whose upper triangle is given. It undoes `pack_triangle`."""
    n = width_of(packed.size)
    full, start = np.empty((n, n), np.float32), 0
    for index in range(n):
        stop = start + n - index
        full[index, index:] = full[index:, index] = packed[start:stop]
        start = stop
    return full


def width_of(size: int) -> int:
    """n of an n × n matrix whose triangle has so many numbers."""
    return (math.isqrt(8 * size + 1) - 1) // 2
