"""The importance matrix: what it holds, and its two file formats.

For each weight, the squares of its inputs are summed over tokens, column by column. A quantizer uses the means to
decide which columns deserve precision. Files are interchangeable with llama-imatrix and llama-quantize: the GGUF form
(general.type "imatrix", NAME.in_sum2 and NAME.counts) and the older .dat. Source of both: llama.cpp's imatrix tool.
"""

import dataclasses
import os
import pathlib
import struct
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.files import replacing
from bitladder.gguf import (
    GgufFile,
    GgufWriter,
    TensorInfo,
    TensorPlan,
    Value,
    describe_kind,
    one_line,
    string,
    strings,
    u32,
)
from bitladder.units import number_of

Floats = npt.NDArray[np.float32]
_SUMS, _COUNTS = ".in_sum2", ".counts"
# The count of an expert that no token reached, if sums stand in for it. llama-quantize rounds it up to one token
# and takes these sums for the mean. Read here, it is rounded to 0, so that the expert is known to be unreached.
STANDS_IN = np.float32(0.5)
# What the format counts chunks in, and the tokens up to which float64 counts exactly.
_MOST_CHUNKS, _MOST_TOKENS = 2**32 - 1, 2**53
_MOST_CALLS = 2**31 - 1  # of the old format


@dataclasses.dataclass
class ImatrixEntry:
    """The squared inputs of one weight. A matrix is an expert, or the whole weight.

    Parameters:
        sums: sums of squared inputs, float [matrices, n_in].
        counts: tokens that were summed, int64 [matrices], or [1] where all matrices of a dense weight saw the same.
        stands_in: whether the mean over all tokens of the others stands in for an expert that no token reached.

    Example:
        >>> ImatrixEntry(np.array([[8.0, 2.0]]), np.array([4])).means()
        array([[2. , 0.5]], dtype=float32)
    """

    sums: npt.NDArray[np.floating]
    counts: npt.NDArray[np.int64]
    stands_in: bool = False

    def means(self) -> Floats:
        """Mean squared input of each column, float32 [matrices, n_in], as llama-quantize computes it.

        An expert that no token reached has no mean. It gets what stands in for it, or else 1 everywhere, which weights
        its columns alike. `unreached` lists these experts.
        """
        counts = self.counts.astype(np.float32)[:, None]
        sums, reached = self.sums.astype(np.float32), self.counts > 0
        means = np.where(counts > 0, sums / np.where(counts > 0, counts, 1), np.float32(1)).astype(np.float32)
        if self.stands_in and reached.any():
            # From what the file will hold, so that it is the same when it is read again.
            means[~reached] = sums[reached].sum(axis=0, dtype=np.float64) / counts[reached].sum(dtype=np.float64)
        return means

    def unreached(self) -> list[int]:
        """Experts without a single token."""
        return [int(i) for i in np.flatnonzero(self.counts <= 0)]

    def zero(self) -> list[int]:
        """Matrices that tokens reached, but whose inputs were 0 throughout."""
        return [int(i) for i in np.flatnonzero((self.counts > 0) & ~self.sums.reshape(len(self.counts), -1).any(1))]


@dataclasses.dataclass
class Imatrix:
    """An importance matrix.

    Parameters:
        entries: the squared inputs, by weight.
        datasets: names of the texts.
        chunk_count: chunks that were read.
        chunk_size: tokens of a chunk.
        legacy: whether it comes from a .dat file. There sums and counts are scaled to chunks, not tokens.
    """

    entries: dict[str, ImatrixEntry]
    datasets: list[str]
    chunk_count: int
    chunk_size: int
    legacy: bool = False

    def gaps(self) -> dict[str, list[int]]:
        """Experts that no token reached, by weight; weights without such experts are left out."""
        return {name: experts for name, entry in self.entries.items() if (experts := entry.unreached())}

    def zeros(self) -> dict[str, list[int]]:
        """Matrices whose importance is 0 throughout although tokens reached them, by weight."""
        return {name: matrices for name, entry in self.entries.items() if (matrices := entry.zero())}

    def columns(self, name: str, tensor: TensorInfo) -> Floats | None:
        """The mean squared input of each column of a tensor.

        A matrix whose importance is 0 throughout gets 1 everywhere, as one that no token reached: with 0 the kernels
        of most types make it 0.

        Parameters:
            name: the tensor's name in the matrix.
            tensor: has the sizes.

        Returns:
            float32 [matrices, n_in]; None if the matrix has no entry of that name, or one of another size.
        """
        entry, matrices = self.entries.get(name), tensor.rows // tensor.rows_per_matrix
        if entry is None or entry.sums.size != tensor.width * matrices:
            return None
        columns = entry.means().reshape(matrices, tensor.width)
        columns[~columns.any(axis=1)] = 1
        return columns

    def add(self, other: "Imatrix") -> None:
        """Adds another matrix's sums and counts to this one.

        Chunks are counted as llama-imatrix does, from the largest token count. Raises BitladderError if a weight has
        another shape there, or is in one of the two only: then they are of two models. The head may be in one only, and
        experts, which some programs leave out if no token reached them.
        """
        for name in self.entries.keys() ^ other.entries.keys() if self.entries else ():
            if name != "output.weight" and "_exps" not in name:
                raise BitladderError(f"cannot merge: only one of the matrices has {name}; these are of two models")
        scale = self.chunk_size if other.legacy else 1
        for name, theirs in other.entries.items():
            sums, counts = theirs.sums.astype(np.float64) * scale, theirs.counts * scale
            ours = self.entries.get(name)
            if ours is None:
                self.entries[name] = ImatrixEntry(sums, counts, theirs.stands_in)
                continue
            if ours.sums.size != sums.size or (
                len(ours.counts) != len(counts) and 1 not in (len(ours.counts), len(counts))
            ):
                raise BitladderError(
                    f"cannot merge {name}: {ours.sums.shape} here, {sums.shape} there; these are of two models"
                )
            if len(ours.counts) < len(counts):
                ours.counts, ours.sums = np.repeat(ours.counts, len(counts)), ours.sums.reshape(sums.shape)
            ours.sums = ours.sums + sums.reshape(ours.sums.shape)
            ours.counts = ours.counts + counts
            ours.stands_in |= theirs.stands_in
        self.datasets += other.datasets
        self.chunk_count = max((int(e.counts.max()) for e in self.entries.values()), default=0) // self.chunk_size


def zeros_in(imatrix: Imatrix, names: Collection[str]) -> str | None:
    """A warning of those of some weights whose importance is 0 in whole matrices; None if there is none."""
    zeros = [name for name in imatrix.zeros() if name in names]
    if not zeros:
        return None
    some = f"{', '.join(zeros[:4])}{', …' if len(zeros) > 4 else ''}"
    return (
        f"the importance of {number_of(len(zeros), 'weight')} ({some}) is 0 in whole matrices although tokens reached "
        "them: all columns of these count alike; calibrate on other text if that is not how the model is"
    )


def read_imatrix(path: str | os.PathLike[str], *, finite: bool = True) -> Imatrix:
    """Reads a file of either format.

    Parameters:
        path: the file.
        finite: whether values that are negative or not finite are refused. Statistics want to show them.

    Raises:
        BitladderError: the file is damaged, or no importance matrix.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise BitladderError(f"no such imatrix file: {path}")
    with path.open("rb") as stream:
        magic = stream.read(4)
    imatrix = _read_gguf(path) if magic == b"GGUF" else _read_dat(path)
    if finite:
        _refuse_impossible(imatrix, path)
    return imatrix


def _read_gguf(path: pathlib.Path) -> Imatrix:
    with GgufFile(path) as file:
        if file.get("general.type") != "imatrix":
            raise BitladderError(f"{path} is not an imatrix but {describe_kind(file)}")
        missing = [k for k in ("datasets", "chunk_count", "chunk_size") if f"imatrix.{k}" not in file.metadata]
        if missing:
            raise BitladderError(f"{path} lacks imatrix.{missing[0]}: it is not a complete imatrix")
        datasets, chunks, size = (file.get(f"imatrix.{key}") for key in ("datasets", "chunk_count", "chunk_size"))
        named = isinstance(datasets, list) and all(isinstance(name, str) for name in datasets)
        numbers = all(type(number) is int and 0 <= number <= _MOST_CHUNKS for number in (chunks, size))
        if not named or not numbers:
            raise BitladderError(
                f"{path}: imatrix.datasets, chunk_count or chunk_size has a wrong type or size: the imatrix is damaged"
            )
        entries = {}
        for name, tensor in file.tensors.items():
            if not name.endswith(_SUMS):
                continue
            weight = name.removesuffix(_SUMS)
            counted = file.tensors.get(weight + _COUNTS)
            if counted is None or tensor.type.name != "f32" or counted.type.name != "f32":
                raise BitladderError(f"{path}: {weight} has no F32 pair of sums and counts; the imatrix is damaged")
            sums = file.read(tensor).view(np.float32)
            # A count that is not a number counts as 0, and so does STANDS_IN.
            tokens = np.nan_to_num(file.read(counted).view(np.float32).reshape(-1), posinf=0, neginf=0)
            if (np.abs(tokens) > _MOST_TOKENS).any():
                raise BitladderError(f"{path}: {weight} has counts that are no numbers of tokens; compute it again")
            counts = np.rint(tokens).astype(np.int64)
            if len(counts) != len(sums):
                raise BitladderError(
                    f"{path}: {weight} has {number_of(len(sums), 'row')} of sums but {number_of(len(counts), 'count')}"
                )
            _refuse_negative(counts, weight, path)
            stands_in = tokens == STANDS_IN
            if stands_in.any():
                sums = np.where(stands_in[:, None], np.float32(0), sums)
            entries[weight] = ImatrixEntry(sums, counts, bool(stands_in.any()))
        if not entries:
            raise BitladderError(f"{path} holds no importance data")
        return Imatrix(entries, datasets, chunks, size)


def _read_dat(path: pathlib.Path) -> Imatrix:
    data = path.read_bytes()
    entries: dict[str, ImatrixEntry] = {}
    chunks, datasets, position = 0, [], 4
    try:
        (count,) = struct.unpack_from("<i", data)
        if not 0 < count < 1 << 20:
            raise BitladderError(f"{path} is neither a GGUF nor a .dat imatrix")
        for _ in range(count):
            (size,) = struct.unpack_from("<i", data, position)
            if not 0 < size < 1024:
                raise BitladderError(f"{path} is neither a GGUF nor a .dat imatrix")
            name = data[position + 4 : position + 4 + size].decode("utf-8", "replace")
            calls, values = struct.unpack_from("<ii", data, position + 4 + size)
            position += 12 + size
            if values < 1:
                raise BitladderError(
                    f"{path}: {one_line(name)} has {number_of(values, 'sum')}: it is damaged; compute it again"
                )
            sums = np.frombuffer(data, "<f4", values, position)
            position += 4 * values
            entries[name] = ImatrixEntry(sums[None].copy(), np.array([calls], np.int64))
            _refuse_negative(entries[name].counts, one_line(name), path)
        if position < len(data):
            chunks, size = struct.unpack_from("<ii", data, position)
            _refuse_negative(np.array([chunks]), "the file", path)
            datasets = [data[position + 8 : position + 8 + size].decode("utf-8", "replace")] if size > 0 else []
    except (struct.error, ValueError) as error:
        raise BitladderError(f"{path} ends early: it is a truncated .dat imatrix, or another kind of file") from error
    return Imatrix(entries, datasets, chunks, 0, legacy=True)


def _refuse_negative(counts: npt.NDArray[np.int64], what: str, path: pathlib.Path) -> None:
    if (counts < 0).any():
        raise BitladderError(f"{path}: {what} has the negative count {counts.min()}; compute it again")


def _refuse_impossible(imatrix: Imatrix, path: pathlib.Path) -> None:
    for name, entry in imatrix.entries.items():
        sums = entry.sums.reshape(-1)
        bad = np.flatnonzero(~((sums >= 0) & np.isfinite(sums)))
        if len(bad):
            value = sums[bad[0]]
            what = f"the negative value {value:g}" if value < 0 else "a value that is not finite"
            raise BitladderError(f"{path}: {name} has {what} at index {bad[0]}; compute it again")


def write_imatrix(imatrix: Imatrix, path: str | os.PathLike[str], form: str = "gguf") -> None:
    """Writes a file in one step, as "gguf" or "dat". Entries are sorted by name, as llama-imatrix writes them."""
    if form == "dat":
        _write_dat(imatrix, path)
        return
    metadata: dict[str, Value] = {
        "general.type": string("imatrix"),
        "imatrix.datasets": strings(imatrix.datasets),
        "imatrix.chunk_count": u32(min(imatrix.chunk_count, _MOST_CHUNKS)),
        "imatrix.chunk_size": u32(imatrix.chunk_size),
    }
    f32 = type_by_name("f32")
    arrays: dict[str, Floats] = {}
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        sums = entry.sums.astype(np.float32).reshape(len(entry.counts), -1)
        counts = entry.counts.astype(np.float32)[:, None]
        if entry.stands_in and (counts > 0).any():
            sums, counts = np.where(counts > 0, sums, entry.means()), np.where(counts > 0, counts, STANDS_IN)
        arrays |= {name + _SUMS: sums, name + _COUNTS: counts}
    plans = [TensorPlan(name, array.shape[::-1], f32) for name, array in arrays.items()]
    with replacing(path) as temporary, temporary.open("wb") as stream:
        writer = GgufWriter(stream, metadata, plans)
        for name, array in arrays.items():
            writer.write(name, array.view(np.uint8))
        writer.finish()


def _write_dat(imatrix: Imatrix, path: str | os.PathLike[str]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as stream:
        reached = {n: e for n, e in sorted(imatrix.entries.items()) if e.counts.max() > 0}
        stream.write(struct.pack("<i", len(reached)))
        for name, entry in reached.items():
            # The old format counts chunks, not tokens; rounding up avoids zeros.
            calls = min(-(-int(entry.counts.max()) // imatrix.chunk_size), _MOST_CALLS)
            values = entry.means().reshape(-1) * np.float32(calls)
            encoded = name.encode()
            stream.write(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, values.size))
            stream.write(values.astype("<f4").tobytes())
        dataset = (imatrix.datasets[-1] if imatrix.datasets else "").encode()
        stream.write(struct.pack("<ii", min(imatrix.chunk_count, _MOST_CALLS), len(dataset)) + dataset)
