"""Blocks of a tensor in a type: exactly those that a file would hold, with their error, and a cache of both.

All that prices, tries or writes types takes its blocks from here: another rounding method changes the blocks and
nothing else.
"""

import collections
import contextlib
import errno
import hashlib
import pathlib
import shutil
import struct
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bitladder.engine import RowKernels, TensorType, type_by_name, versions
from bitladder.errors import BitladderError
from bitladder.files import Closing
from bitladder.gguf import GgufFile, TensorInfo, shards_of
from bitladder.keys import Algorithm, key_of
from bitladder.progress import SILENT, Progress
from bitladder.trial.rounding_method import RoundingMethod, SideBySide, StockRounding

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

WEIGHTS_AT_ONCE = 1 << 22  # whose error is summed: bounds the memory of float32 copies
# Of the model's file: what the blocks that a ladder's prices and rungs need take, about.
KEPT_SHARE = 4

RENDERING = Algorithm("rendering", ("blocks of a rounding method, and their error weighted by importance",))


class Renderer(Closing):
    """Renders tensors of a full-precision file, each pair of tensor and type once.

    Parameters:
        file: the model.
        importance: mean squared inputs by tensor name, float32 [matrices, width].
        rounding: the method; None takes the library's kernels.
        folder: where blocks are kept, under the hash of all that decides them; None keeps nothing.
        max_bytes: how many bytes of blocks are kept there at most; others are rendered again when needed. None keeps
            `KEPT_SHARE` times the bytes of the model, but leaves half of the disk that is free.
        threads: threads of the library's kernels; None takes all CPUs.
    """

    def __init__(
        self,
        file: GgufFile,
        importance: Mapping[str, Floats],
        *,
        rounding: RoundingMethod | None = None,
        folder: pathlib.Path | None = None,
        max_bytes: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.file = file
        self.kernels = RowKernels(threads)
        self.rounding: RoundingMethod = rounding or StockRounding(self.kernels)
        self._importance, self._folder = importance, folder
        self._hashes: dict[str, str] = {}
        self._errors: dict[tuple[str, str], float] = {}
        # Bytes of blocks that the folder has room for.
        self.room = 0 if folder is None else _room(folder, file.path, max_bytes)

    def close(self) -> None:
        """Stop the threads."""
        self.kernels.close()

    def importance_sha256(self) -> str:
        """The hash of the importance of all tensors."""
        return key_of({name: _sha256(values) for name, values in self._importance.items()})

    def key(self, name: str, kind: TensorType) -> str:
        """The hash of all that decides a tensor's blocks and their error."""
        tensor = self.file.tensors[name]
        if name not in self._hashes:
            self._hashes[name] = _sha256(self.file.read(tensor))
        importance = self._importance.get(name)
        return key_of(
            {
                "weights": self._hashes[name],
                "weights' type": tensor.type.name,
                "shape": tensor.shape,
                "importance": None if importance is None else _sha256(importance),
                "type": kind.name,
                "rounding": self.rounding.key,
                "library": versions()["llama_cpp_commit"],
                "algorithms": RENDERING.versions(),
            }
        )

    def nbytes(self, name: str, kind: TensorType) -> int:
        """Bytes of the tensor's blocks."""
        tensor = self.file.tensors[name]
        return tensor.rows * kind.row_bytes(tensor.width)

    def blocks(self, name: str, kind: TensorType) -> Bytes:
        """The tensor's rows as a file holds them, uint8 [rows, row bytes]. Raises BitladderError that names it."""
        return self._rendered(name, kind)[0]

    def values(self, name: str, kind: TensorType) -> Floats:
        """The weights that the blocks stand for, float32 [rows, width]."""
        return self.kernels.dequantize(self.blocks(name, kind), kind, self.file.tensors[name].width)

    def weights(self, name: str) -> Floats:
        """The full-precision tensor, float32 [rows, width]."""
        tensor = self.file.tensors[name]
        return self.kernels.dequantize(self.file.read(tensor), tensor.type, tensor.width)

    def error(self, name: str, kind: TensorType) -> float:
        """Σ w (ŵ − w)² over the rendered tensor, w the mean squared input of the column (1 without importance)."""
        if (name, kind.name) not in self._errors:
            self._errors[name, kind.name] = self._rendered(name, kind)[1]
        return self._errors[name, kind.name]

    def learn(self, errors: Mapping[tuple[str, str], float]) -> None:
        """Takes errors (`error`) that another process found, by tensor and type."""
        self._errors |= errors

    @RENDERING.entry
    def _rendered(self, name: str, kind: TensorType) -> tuple[Bytes, float]:
        """Blocks and their error, from the folder or computed."""
        if (kept := self._kept(name, kind)) is not None:
            return kept
        weights = self._matrices(name)
        blocks = self.rounding(name, weights, kind, self._importance.get(name))
        return self._finished(name, kind, weights, blocks)

    def render_group(self, names: Sequence[str], kind: TensorType) -> None:
        """Renders tensors that the method rounds side by side, so that their errors are known (`error`).

        Parameters:
            names: of a group (`SideBySide.groups`).
            kind: the type of all.
        """
        assert isinstance(self.rounding, SideBySide)
        left: list[str] = []
        for name in names:
            if (name, kind.name) in self._errors:
                continue
            if (kept := self._kept(name, kind)) is None:
                left.append(name)
            else:
                self._errors[name, kind.name] = kept[1]
        if not left:
            return
        weights = [self._matrices(name) for name in left]
        importance = [self._importance.get(name) for name in left]
        group = self.rounding.together(left, weights, kind, importance, self.kernels.threads)
        for name, matrices, blocks in zip(left, weights, group, strict=True):
            self._errors[name, kind.name] = self._finished(name, kind, matrices, blocks)[1]

    def _matrices(self, name: str) -> Floats:
        """The full-precision tensor, float32 [matrices, rows, width]."""
        tensor = self.file.tensors[name]
        return self.weights(name).reshape(-1, tensor.rows_per_matrix, tensor.width)

    def _path(self, name: str, kind: TensorType) -> pathlib.Path | None:
        return None if self._folder is None else self._folder / f"{self.key(name, kind)}.blocks"

    def _kept(self, name: str, kind: TensorType) -> tuple[Bytes, float] | None:
        """Blocks and their error, if the folder has them."""
        path, tensor = self._path(name, kind), self.file.tensors[name]
        kept = None if path is None else _read(path, self.nbytes(name, kind))
        return None if kept is None else (kept[0].reshape(tensor.rows, -1), kept[1])

    def _finished(self, name: str, kind: TensorType, weights: Floats, blocks: Bytes) -> tuple[Bytes, float]:
        """Blocks [matrices, rows, row bytes] as a file holds them, and their error, which the folder keeps."""
        path, tensor = self._path(name, kind), self.file.tensors[name]
        blocks = blocks.reshape(tensor.rows, -1)
        values = self.kernels.dequantize(blocks, kind, tensor.width)
        error = _error(weights.reshape(values.shape), values, self._importance.get(name), tensor)
        if path is not None and blocks.nbytes <= self.room:
            _write(path, blocks, error)
            self.room -= blocks.nbytes
        return blocks, error


def render_all(
    renderer: Renderer,
    pairs: Iterable[tuple[str, str]],
    *,
    label: str = "rounding",
    progress: Progress = SILENT,
) -> dict[tuple[str, str], float]:
    """Renders many tensors, several at once, into the renderer's folder.

    A thread renders a tensor in all its types, one after the other, so that a rounding method factors its moments once;
    only the library's kernels take all threads for one tensor. Large tensors go first, so that no thread has a large
    one alone at the end. What a method rounds side by side is a group, two of which are in work at once: a device
    rounds one while the CPU makes the other one ready.

    Parameters:
        renderer: what renders them.
        pairs: name of a tensor and name of a type.
        label: what the progress bar says.

    Returns:
        The errors (`Renderer.error`), by pair.

    Raises:
        BitladderError: a type cannot hold a tensor; the message names it.
    """
    tensors = renderer.file.tensors
    jobs = _jobs(renderer, pairs)

    def work(job: _Job) -> int:
        return sum(len(names) * tensors[names[0]].elements for names, _ in job)

    def width(job: _Job) -> int:
        return tensors[job[0][0][0]].width

    jobs.sort(key=lambda job: -work(job) * width(job))
    alone = ThreadPoolExecutor(1 if isinstance(renderer.rounding, StockRounding) else renderer.kernels.threads)
    together = ThreadPoolExecutor(2)
    errors: dict[tuple[str, str], float] = {}

    def render(job: _Job) -> dict[tuple[str, str], float]:
        for names, kind in job:
            if len(names) > 1:
                renderer.render_group(names, type_by_name(kind))
        return {(name, kind): renderer.error(name, type_by_name(kind)) for names, kind in job for name in names}

    try:
        with progress.task(label, sum(map(work, jobs))) as bar:
            pools = (together if len(job[0][0]) > 1 else alone for job in jobs)
            waiting = [(job, pool.submit(render, job)) for job, pool in zip(jobs, pools, strict=True)]
            for job, future in waiting:
                errors |= future.result()
                bar.note(job[0][0][-1])
                bar.advance(work(job))
    finally:
        alone.shutdown(cancel_futures=True)
        together.shutdown(cancel_futures=True)
    return errors


# What one thread renders: tensors that are rounded side by side, or one, in one type after the other.
_Job = list[tuple[list[str], str]]


def _jobs(renderer: Renderer, pairs: Iterable[tuple[str, str]]) -> list[_Job]:
    """Jobs for all pairs of tensor and type: each group of the method's, and each tensor outside of them."""
    tensors, method = renderer.file.tensors, renderer.rounding
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for name, kind in pairs:
        kinds[name].append(kind)
    if not isinstance(method, SideBySide):
        return [[([name], kind) for kind in some] for name, some in kinds.items()]
    jobs: list[_Job] = []
    alone: dict[str, _Job] = collections.defaultdict(list)
    for group in method.groups([tensors[name] for name in kinds]):
        job: _Job = []
        for kind in dict.fromkeys(kind for tensor in group for kind in kinds[tensor.name]):
            same = [tensor for tensor in group if kind in kinds[tensor.name]]
            names = [tensor.name for tensor in same]
            if len(same) > 1 and len(method.groups(same)) == 1:
                job.append((names, kind))
            else:  # too few have this type
                for name in names:
                    alone[name].append(([name], kind))
        jobs += [job] if job else []
    return [*jobs, *alone.values()]


def _room(folder: pathlib.Path, model: pathlib.Path, max_bytes: int | None) -> int:
    """How many more bytes of blocks a folder may take."""
    kept = sum(path.stat().st_size for path in folder.glob("*.blocks")) if folder.is_dir() else 0
    if max_bytes is not None:
        return max_bytes - kept
    disk = next(place for place in (folder, *folder.parents) if place.is_dir())
    model_bytes = sum(pathlib.Path(part).stat().st_size for part in shards_of(model))
    return min(KEPT_SHARE * model_bytes - kept, shutil.disk_usage(disk).free // 2)


def _sha256(values: npt.NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _write(path: pathlib.Path, blocks: Bytes, error: float) -> None:
    """Keep blocks, their error and a checksum of both.

    There are thousands of these files and each can be made again: they are not forced to the disk one by one. The
    checksum shows whether a power cut has left a file incomplete.
    """
    body = blocks.tobytes() + struct.pack("<d", error)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # other machines may have this process's number
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
        temporary.replace(path)
    except OSError as problem:
        raise BitladderError(f"cannot write {path}: {problem.strerror}") from problem
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _read(path: pathlib.Path, size: int) -> tuple[Bytes, float] | None:
    """What `_write` kept, if it is whole."""
    try:
        body = path.read_bytes()
    except OSError as problem:
        if problem.errno in (errno.ENOENT, errno.ESTALE):  # stale: another machine has just written the same again
            return None
        raise BitladderError(f"cannot read {path}: {problem.strerror}") from problem
    if len(body) != size + 12 or zlib.crc32(body[:-4]) != struct.unpack_from("<I", body, size + 8)[0]:
        return None
    return np.frombuffer(body, np.uint8, size), float(struct.unpack_from("<d", body, size)[0])


def _error(weights: Floats, values: Floats, importance: Floats | None, tensor: TensorInfo) -> float:
    step = max(1, WEIGHTS_AT_ONCE // tensor.width)
    total = 0.0
    for start in range(0, tensor.rows, step):
        gap = values[start : start + step] - weights[start : start + step]
        columns = np.square(gap, out=gap)
        if importance is None:
            total += float(columns.sum(dtype=np.float64))
            continue
        matrices = np.arange(start, min(start + step, tensor.rows)) // tensor.rows_per_matrix
        for matrix in np.unique(matrices):
            total += float(columns[matrices == matrix].sum(axis=0, dtype=np.float64) @ importance[matrix])
    return total
