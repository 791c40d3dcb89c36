"""From second moments of a model to the blocks of its tensors: `rounding`, as a method that a `Renderer` can use."""

import collections
import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import MomentsFile, model_sha256, triangle, unpack_triangle
from bitladder.engine import Device, TensorType, device_key, single_threaded, torch_device
from bitladder.errors import BitladderError
from bitladder.gguf import EMBEDDING, HEAD, GgufFile, TensorInfo
from bitladder.keys import Algorithm, key_of
from bitladder.progress import SILENT, Progress
from bitladder.rounding import (
    ROUNDING,
    Rounded,
    RoundingOptions,
    SecondMoments,
    can_round,
    fit_device,
    moments_in_memory,
    round_matrices,
)
from bitladder.trial import StockRounding
from bitladder.units import listed, number_of

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Tensors with coupled rows that a GPU must have side by side to gain by them (docs/devices.md).
WORTHWHILE = 8

OUTPUT_ROUNDING = Algorithm(
    "output rounding",
    (
        "tensors with second moments are rounded for their output, each expert by itself",
        "of several files of moments the mean counts, each scaled to the same trace",
        "an expert that no token reached is rounded for the mean of the inputs of the others",
        "a device rounds tensors of one shape side by side, and ends the passes of each by itself",
        "embeddings that are not the head and have no moments are rounded as if columns counted alike",
    ),
    uses=(ROUNDING,),
)


class OutputRounding:
    """Rounds the tensors of a model for the outputs of their layers (a `trial.RoundingMethod`). Threads may call it.

    Of several files of moments the mean counts, each scaled to the same trace: moments that are weighted by gradients
    know what an error costs, and plain ones are collected from more tokens.

    A device rounds tensors of one shape side by side, and experts of a tensor, as many as fit into its memory. The CPU
    rounds what does not fit. It also rounds tensors whose rows make up for each other's errors, unless the device is
    named or has enough of them side by side: a GPU starts as many kernels for one as for all (docs/devices.md).

    Parameters:
        moments: second moments of the model.
        options: how to round.
        device: what rounds.
        progress: hears of what does not fit.

    Attributes:
        losses: by tensor and type, tr(O ΔW H ΔWᵀ) of the library's blocks and of these.
    """

    def __init__(
        self,
        moments: Sequence[MomentsFile],
        options: RoundingOptions,
        device: Device = "cpu",
        progress: Progress = SILENT,
    ) -> None:
        self._moments, self._options, self._progress = tuple(moments), options, progress
        self._device, self._named = torch_device(device), device != "auto"
        # Rows of embeddings are no products with an input: without gradients nothing is known of those that are not the
        # head. Their columns count alike. The width by name:
        self._alike: dict[str, int] = {}
        heads = [file for file in moments if HEAD in file]
        if heads and not any(EMBEDDING in file for file in moments):
            self._alike[EMBEDDING] = heads[0].shape(HEAD).n_in
        self._stock = StockRounding()
        self._lock, self._last = threading.Lock(), threading.local()
        self.losses: dict[tuple[str, str], tuple[float, float]] = {}
        self.key = key_of(
            {"moments": joined_sha256(moments), "options": options, "algorithms": OUTPUT_ROUNDING.versions()}
            | device_key(device)
        )

    def covers(self, name: str, kind: TensorType) -> bool:
        """Whether a tensor of that type gets other blocks than the library's."""
        return self._options.method != "stock" and can_round(kind.name) and self._knows(name)

    def _knows(self, name: str) -> bool:
        """Whether there are moments of a tensor, or it is rounded without."""
        return name in self._alike or any(name in file for file in self._moments)

    @OUTPUT_ROUNDING.entry
    def __call__(self, name: str, weights: Floats, kind: TensorType, importance: Floats | None) -> Bytes:
        """See `trial.RoundingMethod`.

        An expert that no token reached is rounded for the mean over all tokens of the others. A tensor without moments
        gets the library's blocks.
        """
        return self.together([name], [weights], kind, [importance], 1)[0]

    def groups(self, tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
        """See `trial.SideBySide`. Tensors of one shape are a group, as many as fit."""
        groups: dict[tuple[int, int, bool], list[TensorInfo]] = collections.defaultdict(list)
        alone: list[list[TensorInfo]] = []
        for tensor in tensors:
            rows, width = tensor.rows_per_matrix, tensor.width
            if self._device is None or tensor.rows != rows or not self._knows(tensor.name):
                alone.append([tensor])
            else:
                groups[rows, width, self._coupled(tensor.name)].append(tensor)
        cut: list[list[TensorInfo]] = []
        for (rows, width, coupled), group in groups.items():
            device, at_once = self._place((rows, width), coupled, len(group))
            size = 1 if device is None else min(at_once, moments_in_memory(rows, width, coupled))
            count = -(-len(group) // max(size, 1))
            cut += [group[number::count] for number in range(count)]
        return [*cut, *alone]

    def together(
        self,
        names: Sequence[str],
        weights: Sequence[Floats],
        kind: TensorType,
        importance: Sequence[Floats | None],
        threads: int,
    ) -> list[Bytes]:
        """See `trial.SideBySide`."""
        with ThreadPoolExecutor(min(threads, len(names))) as pool:
            stock = list(pool.map(self._stock, names, weights, [kind] * len(names), importance))
            if not self.covers(names[0], kind):
                return stock
            try:
                if len(weights[0]) == 1:
                    rounded = [[each] for each in self._round(names, weights, stock, kind, pool)]
                else:
                    rounded = [self._round_experts(names[0], weights[0], stock[0], kind)]
            except BitladderError as error:
                raise BitladderError(f"{listed(list(names))} as {kind.name}: {error}") from error
        for name, parts in zip(names, rounded, strict=True):
            self.losses[name, kind.name] = sum(part.before for part in parts), sum(part.after for part in parts)
        return [np.stack([part.data for part in parts]) for parts in rounded]

    def loss(self, name: str, weights: Floats, blocks: Floats) -> float:
        """tr(O ΔW H ΔWᵀ), as in `losses`, of a tensor and what its blocks stand for [matrices, rows, width]."""
        pairs = zip(self._moments_of(name, weights), weights - blocks, strict=True)
        return sum(ready.loss(delta) for ready, delta in pairs if ready is not None)

    def _refuse_other_shape(self, name: str, weights: Floats) -> None:
        """Raises BitladderError before moments of other shapes are expanded: a small file can make them huge."""
        for file in self._moments:
            shape = file.shape(name) if name in file else None
            if shape is not None and (shape.n_in != weights.shape[2] or shape.n_out not in (0, weights.shape[1])):
                raise BitladderError(f"{file.path} has second moments of another shape")

    def _round(
        self,
        names: Sequence[str],
        weights: Sequence[Floats],
        stock: Sequence[Bytes],
        kind: TensorType,
        pool: ThreadPoolExecutor,
    ) -> list[Rounded]:
        """Rounds tensors of one matrix each, of one shape."""
        for name, each in zip(names, weights, strict=True):
            self._refuse_other_shape(name, each)
        coupled = self._coupled(names[0])
        device, _ = self._place(weights[0].shape[1:], coupled, len(names), say=names[0])
        kept = self._ready_for(names)
        ready = list(pool.map(lambda name: self._ready(name, kept, device), names))
        rounded = [Rounded(blocks[0], 0.0, 0.0) for blocks in stock]
        reached = [(index, moments) for index, moments in enumerate(ready) if moments is not None]
        if reached:
            numbers, moments = zip(*reached, strict=True)
            matrices, blocks = ([each[number][0] for number in numbers] for each in (weights, stock))
            results = round_matrices(matrices, blocks, kind.name, moments, self._options, device)
            for number, result in zip(numbers, results, strict=True):
                rounded[number] = result
        return rounded

    def _round_experts(self, name: str, weights: Floats, stock: Bytes, kind: TensorType) -> list[Rounded]:
        """Rounds each expert of a tensor by itself, on a device as many at once as fit."""
        device, at_once = self._place(weights.shape[1:], False, len(weights), say=name)
        rounded: list[Rounded] = []
        ready: list[SecondMoments] = []
        # Moments are read expert by expert: those of hundreds do not fit into memory together.
        for index, moments in enumerate(self._moments_of(name, weights, device)):
            if moments is None:
                return [Rounded(blocks, 0.0, 0.0) for blocks in stock]
            ready.append(moments)
            if len(ready) == at_once or index + 1 == len(weights):
                some = slice(len(rounded), index + 1)
                matrices, blocks = list(weights[some]), list(stock[some])
                rounded += round_matrices(matrices, blocks, kind.name, ready, self._options, device)
                ready = []
        return rounded

    def _moments_of(self, name: str, weights: Floats, device: str | None = None) -> Iterator[SecondMoments | None]:
        """The moments of each matrix of a tensor; None for all if no token reached any."""
        self._refuse_other_shape(name, weights)
        if len(weights) == 1:
            yield self._ready(name, self._ready_for([name]), device)
            return
        files = [file for file in self._moments if name in file]
        counts = [file.counts(name) for file in files]
        matrices = next((len(each) for each in counts if len(each) != len(weights)), len(weights))
        if matrices != len(weights):
            raise BitladderError(
                f"{number_of(matrices, 'matrix', 'matrices')} of second moments for {len(weights)} of weights: of "
                "another model"
            )
        if not any(each.any() for each in counts):
            yield from [None] * len(weights)
            return
        others: Floats | None = None
        for index in range(len(weights)):
            known = [file for file, each in zip(files, counts, strict=True) if each[index]]
            if known:
                with self._lock:
                    inputs = _mean([unpack_triangle(file.packed(name, index)) for file in known])
            else:
                others = self._others(name, files, counts) if others is None else others
                inputs = others
            yield SecondMoments(inputs, None, self._options, device)

    def _coupled(self, name: str) -> bool:
        """Whether rows of a tensor make up for each other's errors."""
        return self._options.two_sided and any(file.shape(name).n_out for file in self._moments if name in file)

    def _place(self, shape: tuple[int, ...], coupled: bool, count: int, say: str = "") -> tuple[str | None, int]:
        """What rounds `count` matrices of a shape (rows, width), and how many of them at once.

        `say` is the tensor of which is said that it does not fit, if there is one.
        """
        if self._device is None:
            return None, 1
        rows, width = shape
        fitting = min(fit_device(rows, width, coupled, self._device), count)
        if not fitting and say:
            self._progress.info(f"{say} does not fit into the memory of the device ({self._device}): the CPU rounds it")
        if not fitting or (coupled and not self._named and fitting < WORTHWHILE):
            return None, 1
        return self._device, fitting

    def _others(self, name: str, files: Sequence[MomentsFile], counts: Sequence[npt.NDArray[np.int64]]) -> Floats:
        """The mean over all tokens of all experts, float32 [n_in, n_in]."""
        means = []
        for file, each in zip(files, counts, strict=True):
            if not each.any():
                continue
            total = np.zeros(triangle(file.shape(name).n_in), np.float32)
            for index in np.flatnonzero(each):
                with self._lock:
                    total += file.packed(name, int(index)) * np.float32(each[index] / each.sum())
            means.append(unpack_triangle(total))
        return _mean(means)

    def _ready_for(self, names: Sequence[str]) -> dict[str, SecondMoments | None]:
        """What `_ready` keeps of the moments of a group, in which it looks first.

        Each thread keeps those of its last group: `trial.render_all` renders one group after the other.
        """
        kept: dict[str, SecondMoments | None] = getattr(self._last, "moments", {})
        if kept.keys().isdisjoint(names):
            self._last.moments = kept = {}  # frees the memory first
        return kept

    def _ready(self, name: str, kept: dict[str, SecondMoments | None], device: str | None) -> SecondMoments | None:
        """Factors of a tensor's moments, which serve all its types; None if no token reached it."""
        if name not in kept and name in self._alike:
            kept[name] = SecondMoments(np.eye(self._alike[name], dtype=np.float32), None, self._options, device)
        if name not in kept:
            with self._lock, single_threaded():  # moments of low rank are multiplied out
                files = [file for file in self._moments if name in file]
                matrices = max(file.shape(name).matrices for file in files)
                if matrices != 1:
                    raise BitladderError(
                        f"{number_of(matrices, 'matrix', 'matrices')} of second moments for one of weights"
                    )
                reached = any(file.counts(name)[0] for file in files)
                inputs = _mean([unpack_triangle(file.packed(name)) for file in files])
                outputs = next((each.matrix() for file in files if (each := file.outputs(name)) is not None), None)
            kept[name] = SecondMoments(inputs, outputs, self._options, device) if reached else None
        return kept[name]


def refuse_other_moments(moments: Sequence[MomentsFile], model: GgufFile, progress: Progress = SILENT) -> None:
    """Checks that second moments belong to a model.

    Moments of a model of the same shapes but other content are wrong. They cause a warning only, because that may be
    the same model in another precision.

    Parameters:
        moments: the files.
        model: the model.
        progress: gets the warning.

    Raises:
        BitladderError: the sizes do not fit the tensors of the model.
    """
    for file in moments:
        for name in file.names():
            tensor, shape = model.tensors.get(name), file.shape(name)
            if tensor is None or tensor.width != shape.n_in or shape.n_out not in (0, tensor.rows):
                here = "not in it" if tensor is None else f"{tensor.rows} × {tensor.width} in it"
                there = f"{shape.n_out} × {shape.n_in}" if shape.n_out else f"inputs of {shape.n_in}"
                raise BitladderError(
                    f"{file.path} holds second moments of another model than {model.path}: {name} has {there} there "
                    f"and is {here}; collect them with bitladder calibrate -m {model.path}"
                )
    collected = {file.path: file.provenance.model_sha256 for file in moments if file.provenance.model_sha256}
    digest = model_sha256(model.path) if collected else ""
    for path, other in collected.items():
        if other != digest:
            progress.warn(
                f"{path} was collected from another file than {model.path}. If that is not the same model in "
                "another precision, blocks are chosen for inputs that it never has"
            )


def joined_sha256(moments: Sequence[MomentsFile]) -> str:
    """The hash of one file, or of the hashes of several in order."""
    if len(moments) == 1:
        return moments[0].sha256
    return hashlib.sha256(" ".join(file.sha256 for file in moments).encode()).hexdigest()


def _mean(inputs: Sequence[Floats]) -> Floats:
    """The mean of matrices [n, n], each scaled to a mean diagonal of 1; a single one is left as it is."""
    if len(inputs) == 1:
        return inputs[0]
    if len({each.shape for each in inputs}) > 1:
        raise BitladderError("the files of second moments are of different models")
    mean = np.zeros_like(inputs[0])
    for each in inputs:
        scale = np.float32(np.trace(each) / len(each))
        mean += each / (scale if scale > 0 else np.float32(1))
    return np.asarray(mean / np.float32(len(inputs)))
