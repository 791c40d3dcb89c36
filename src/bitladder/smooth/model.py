"""Writing a smoothed model: the same tensors and types, with scales moved between them, and proof that it computes
what the first one did.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.imatrix import Imatrix, read_imatrix, write_imatrix
from bitladder.engine.context import Context
from bitladder.engine.model import Model
from bitladder.engine.types import dequantize_into, quantize_rows
from bitladder.errors import BitladderError, UsageError
from bitladder.files import replacing, sha256_file
from bitladder.model.header import TensorInfo
from bitladder.model.reader import GgufFile
from bitladder.model.values import string
from bitladder.model.writer import GgufWriter, TensorPlan
from bitladder.progress import SILENT, Progress, Task
from bitladder.quantize.metadata import DROPPED
from bitladder.smooth.links import Link, SmoothingError, links_of
from bitladder.smooth.scales import balance

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
KEY = "bitladder.smooth.imatrix.sha256"
FLOATS = ("f32", "f16", "bf16")
PIECE = 1 << 20  # weights read at once
# Of the logits' range. Products are the same but for what F16 rounds, which leaves 0.002 in 30 blocks; a scale that
# went astray in one of them left 0.1.
TOLERANCE = 0.01
CHECKED_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class SmoothResult:
    """The file, the importance matrix of its inputs, links used by kind, how far logits moved at most, as a fraction of
    their range, and the scales, float32 [matrices, channels] by link."""

    path: pathlib.Path
    imatrix: pathlib.Path
    links: dict[str, int]
    moved: float
    scales: list[tuple[Link, Floats]] = dataclasses.field(repr=False)


@dataclasses.dataclass
class Factors:
    """What a tensor is multiplied by: `columns` float32 [matrices or 1, width], `rows` float32 [rows]; None: by 1."""

    columns: npt.NDArray[np.floating] | None = None
    rows: npt.NDArray[np.floating] | None = None


def smooth_model(
    model: str | os.PathLike[str],
    imatrix: str | os.PathLike[str],
    out: str | os.PathLike[str],
    imatrix_out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> SmoothResult:
    """Write a model whose channels are balanced (`balance`), and the importance matrix of its inputs.

    Parameters: `model` an F32, F16 or BF16 GGUF; `imatrix` of its inputs. The logits of some tokens are compared; a
    kind of link that changes them is left out, with a warning. Raises SmoothingError for quantized weights, and if no
    link is known or keeps the logits; BitladderError for an imatrix of another model and for scales that overflow.
    """
    out, imatrix_out = pathlib.Path(out), pathlib.Path(imatrix_out)
    digest, matrix = sha256_file(imatrix), read_imatrix(imatrix)
    with GgufFile(model) as file:
        for path in (out, imatrix_out):
            if path.exists() and any(path.samefile(one) for one in (*file.parts, pathlib.Path(imatrix))):
                raise UsageError(f"{path} is an input; name another output")
        if file.get(KEY):
            raise BitladderError(f"{file.path} is smoothed already")
        links = [link for link in links_of(file) if _importance(matrix, link) is not None]
        if not links:
            raise BitladderError(f"{imatrix} belongs to another model: it has no entry for {file.path.name}'s weights")
        kinds = list(dict.fromkeys(link.kind for link in links))
        for link in links:
            _refuse_quantized(file, link)
        scales = _scales(file, matrix, links, progress)
        before = _Logits(file.path, threads)
        with replacing(out) as temporary:
            moved = before.moved(_write(file, digest, scales, kinds, temporary, progress))
            if moved > TOLERANCE:
                kinds = [one for one in kinds if before.neutral(_write(file, digest, scales, [one], temporary))]
                progress.warn(
                    f"{file.path.name} reads channels elsewhere too: only {', '.join(kinds) or 'nothing'} can be scaled"
                )
                moved = before.moved(_write(file, digest, scales, kinds, temporary, progress))
            if not kinds or moved > TOLERANCE:
                raise SmoothingError(f"{file.path}: no scale can move without changing the logits; do not smooth it")
        used = [(link, scale) for link, scale in scales if link.kind in kinds]
    write_imatrix(smoothed_imatrix(matrix, used), imatrix_out)
    counts = {kind: sum(link.kind == kind for link, _ in used) for kind in kinds}
    return SmoothResult(out, imatrix_out, counts, moved, used)


def smoothed_imatrix(imatrix: Imatrix, scales: Sequence[tuple[Link, Floats]]) -> Imatrix:
    """The importance matrix of the smoothed model's inputs, which are the first one's divided by the scales.

    Parameters: `scales` float32 [matrices, channels of the readers] by link.
    """
    entries = dict(imatrix.entries)
    for link, scale in scales:
        for name in link.readers:
            if name in entries:
                sums = entries[name].sums
                entries[name] = dataclasses.replace(entries[name], sums=sums / np.square(scale, dtype=np.float64))
    return dataclasses.replace(imatrix, entries=entries)


def factors_of(scales: Sequence[tuple[Link, Floats]], kinds: Sequence[str]) -> dict[str, Factors]:
    """What every tensor of some kinds of links is multiplied by. `scales` as for `smoothed_imatrix`."""
    found: dict[str, Factors] = {}
    for link, scale in scales:
        if link.kind not in kinds:
            continue
        for name in link.readers:
            found.setdefault(name, Factors()).columns = scale
        made = scale.reshape(link.matrices, link.groups, link.repeats, link.size)[:, :, 0].reshape(-1)
        for name in link.makers:
            found.setdefault(name, Factors()).rows = 1 / made
    return found


def _scales(file: GgufFile, imatrix: Imatrix, links: Sequence[Link], progress: Progress) -> list[tuple[Link, Floats]]:
    found = []
    total = sum(file.tensors[name].elements for link in links for name in link.readers)
    with progress.task("balance channels", total) as task:
        for link in links:
            importance = _importance(imatrix, link)
            assert importance is not None
            squares = sum(_squares(file, file.tensors[name], link.matrices, task) for name in link.readers)
            shape = (link.matrices, link.groups, link.repeats, link.size)
            shared = [np.asarray(one, np.float64).reshape(shape).sum(2) for one in (importance, squares)]
            rows = []
            for matrix in range(link.matrices):
                inputs, weights = (one[matrix].reshape(-1) for one in shared)
                rows.append(balance(inputs, weights))
            made = np.stack(rows).reshape(link.matrices, link.groups, 1, link.size)
            found.append((link, np.broadcast_to(made, shape).reshape(link.matrices, -1)))
    return found


def _importance(imatrix: Imatrix, link: Link) -> Doubles | None:
    """Mean squares of a link's channels, [matrices, channels], up to a factor; None if no reader has an entry.

    Experts that no token reached are taken to be like the others.
    """
    for name in link.readers:
        entry = imatrix.entries.get(name)
        if entry is None:
            continue
        sums = np.asarray(entry.sums, np.float64)
        if sums.shape[1] != link.groups * link.repeats * link.size or (link.matrices > 1 and len(sums) < link.matrices):
            raise BitladderError(f"the imatrix belongs to another model: {name} has {sums.shape[1]} columns there")
        whole: Doubles = sums.sum(axis=0)
        if link.matrices == 1:
            return whole[None]
        reached = sums.sum(axis=1, keepdims=True) > 0
        return np.asarray(np.where(reached, sums, whole))
    return None


def _squares(file: GgufFile, tensor: TensorInfo, matrices: int, task: Task) -> Doubles:
    """Sums of squares of a tensor's columns, [matrices, width] (of all its matrices together if `matrices` is 1)."""
    found = np.zeros((matrices, tensor.width))
    for start, weights in _pieces(file, tensor):
        matrix = start // tensor.rows_per_matrix if matrices > 1 else 0
        found[matrix] += np.einsum("ij,ij->j", weights, weights, dtype=np.float64)
        task.advance(weights.size)
    if not np.isfinite(found).all():
        raise BitladderError(f"{file.path}: {tensor.name} has weights that are not finite")
    return found


def _pieces(file: GgufFile, tensor: TensorInfo) -> Iterator[tuple[int, Floats]]:
    """A tensor's first row and float32 [rows, width], each piece within one matrix."""
    step = max(1, PIECE // tensor.width)
    for first in range(0, tensor.rows, tensor.rows_per_matrix):
        end = first + tensor.rows_per_matrix
        for start in range(first, end, step):
            stop = min(start + step, end)
            weights = np.empty((stop - start, tensor.width), np.float32)
            dequantize_into(file.read(tensor, start, stop), tensor.type, weights)
            yield start, weights


def _write(
    file: GgufFile,
    digest: str,
    scales: Sequence[tuple[Link, Floats]],
    kinds: Sequence[str],
    path: pathlib.Path,
    progress: Progress = SILENT,
) -> pathlib.Path:
    factors = factors_of(scales, kinds)
    metadata = {key: value for key, value in file.metadata.items() if key not in DROPPED}
    metadata[KEY] = string(digest)
    plans = [TensorPlan(name, tensor.shape, tensor.type) for name, tensor in file.tensors.items()]
    with path.open("wb") as stream, progress.task("write the smoothed model", file.tensor_bytes) as task:
        writer = GgufWriter(stream, metadata, plans)
        for name, tensor in file.tensors.items():
            task.note(name)
            for data in _scaled(file, tensor, factors.get(name)):
                writer.write(name, data)
                task.advance(data.nbytes)
        writer.finish()
    return path


def _scaled(file: GgufFile, tensor: TensorInfo, factors: Factors | None) -> Iterator[npt.NDArray[np.uint8]]:
    if factors is None:
        step = max(1, PIECE // tensor.width)
        for start in range(0, tensor.rows, step):
            yield file.read(tensor, start, min(start + step, tensor.rows))
        return
    rows = factors.rows
    if rows is not None:  # of a vector (of each expert, if there are several) each element is a channel
        rows = rows.reshape(tensor.rows, -1 if tensor.elements == rows.size else 1)
    columns = factors.columns
    for start, weights in _pieces(file, tensor):
        if columns is not None:
            np.multiply(weights, columns[start // tensor.rows_per_matrix if len(columns) > 1 else 0], out=weights)
        if rows is not None:
            np.multiply(weights, rows[start : start + len(weights)], out=weights)
        if tensor.type.name == "f16" and np.abs(weights).max() > np.finfo(np.float16).max:
            raise BitladderError(f"{tensor.name}: scaled weights overflow F16; convert with --outtype bf16 or f32")
        yield quantize_rows(weights, tensor.type, None)


def _refuse_quantized(file: GgufFile, link: Link) -> None:
    for name in (*link.makers, *link.readers):
        kind = file.tensors[name].type.name
        if kind not in FLOATS:
            raise SmoothingError(
                f"{file.path}: {name} is {kind}; scales move between F32, F16 or BF16 weights only, so smooth the "
                "full-precision model"
            )


class _Logits:
    """The logits of a model, to compare others' with."""

    def __init__(self, path: pathlib.Path, threads: int | None) -> None:
        self._threads = threads
        self._logits = self._compute(path)

    def moved(self, path: pathlib.Path) -> float:
        """The largest difference from another file's logits, as a fraction of the range of ours at the position."""
        other = self._compute(path)
        spread = np.maximum(np.ptp(self._logits, axis=1), np.finfo(np.float32).tiny)
        return float((np.abs(other - self._logits) / spread[:, None]).max())

    def neutral(self, path: pathlib.Path) -> bool:
        """Whether another file computes the same."""
        return self.moved(path) <= TOLERANCE

    def _compute(self, path: pathlib.Path) -> Floats:
        with Model(path, repack=False) as model:
            count = CHECKED_TOKENS
            tokens = np.random.default_rng(0).integers(0, model.n_vocab, count).astype(np.int32)
            with Context(model, n_ctx=count, n_batch=count, n_ubatch=count, threads=self._threads) as context:
                positions = np.arange(count, dtype=np.int32)
                context.decode(tokens, positions, np.zeros(count, np.int32), np.ones(count, np.bool_))
                return context.logits().copy()
