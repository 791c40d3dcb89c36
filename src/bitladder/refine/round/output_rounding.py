"""From second moments of a model to the blocks of its tensors: `rounding`, as a method that a `Renderer` can use."""

import hashlib
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import MomentsFile, model_sha256, triangle, unpack_triangle
from bitladder.engine import Device, TensorType, device_key, torch_device
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile
from bitladder.keys import Algorithm, key_of
from bitladder.progress import SILENT, Progress
from bitladder.rounding import (
    ROUNDING,
    Rounded,
    RoundingOptions,
    SecondMoments,
    can_round,
    fit_device,
    round_matrices,
)
from bitladder.trial import StockRounding
from bitladder.units import number_of

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

OUTPUT_ROUNDING = Algorithm(
    "output rounding",
    (
        "tensors with second moments are rounded for their output, each expert by itself",
        "of several files of moments the mean counts, each scaled to the same trace",
        "an expert that no token reached is rounded for the mean of the inputs of the others",
    ),
    uses=(ROUNDING,),
)


class OutputRounding:
    """Rounds the tensors of a model for the outputs of their layers (a `trial.RoundingMethod`). Threads may call it.

    Of several files of moments the mean counts, each scaled to the same trace: moments that are weighted by gradients
    know what an error costs, and plain ones are collected from more tokens.

    A device rounds experts of a tensor side by side. The CPU rounds what does not fit into its memory. It also rounds
    tensors whose rows make up for each other's errors, unless the device is named: a GPU starts more kernels for them
    than it gains (docs/devices.md).

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
        self._stock = StockRounding()
        self._lock, self._last = threading.Lock(), threading.local()
        self.losses: dict[tuple[str, str], tuple[float, float]] = {}
        self.key = key_of(
            {"moments": joined_sha256(moments), "options": options, "algorithms": OUTPUT_ROUNDING.versions()}
            | device_key(device)
        )

    def covers(self, name: str, kind: TensorType) -> bool:
        """Whether a tensor of that type gets other blocks than the library's."""
        return self._options.method != "stock" and can_round(kind.name) and any(name in file for file in self._moments)

    @OUTPUT_ROUNDING.entry
    def __call__(self, name: str, weights: Floats, kind: TensorType, importance: Floats | None) -> Bytes:
        """See `trial.RoundingMethod`.

        An expert that no token reached is rounded for the mean over all tokens of the others. A tensor without moments
        gets the library's blocks.
        """
        stock = self._stock(name, weights, kind, importance)
        if not self.covers(name, kind):
            return stock
        try:
            rounded = self._round(name, weights, stock, kind)
        except BitladderError as error:
            raise BitladderError(f"{name} as {kind.name}: {error}") from error
        self.losses[name, kind.name] = sum(part.before for part in rounded), sum(part.after for part in rounded)
        return np.stack([part.data for part in rounded])

    def _refuse_other_shape(self, name: str, weights: Floats) -> None:
        """Raises BitladderError before moments of other shapes are expanded: a small file can make them huge."""
        for file in self._moments:
            shape = file.shape(name) if name in file else None
            if shape is not None and (shape.n_in != weights.shape[2] or shape.n_out not in (0, weights.shape[1])):
                raise BitladderError(f"{file.path} has second moments of another shape")

    def _round(self, name: str, weights: Floats, stock: Bytes, kind: TensorType) -> list[Rounded]:
        self._refuse_other_shape(name, weights)
        if len(weights) == 1:
            ready = self._ready(name)
            if ready is None:
                return [Rounded(stock[0], 0.0, 0.0)]
            device, _ = self._place(name, weights, bool(len(ready.leading)))
            return round_matrices(list(weights), list(stock), kind.name, [ready], self._options, device)
        files = [file for file in self._moments if name in file]
        counts = [file.counts(name) for file in files]
        matrices = next((len(each) for each in counts if len(each) != len(weights)), len(weights))
        if matrices != len(weights):
            raise BitladderError(
                f"{number_of(matrices, 'matrix', 'matrices')} of second moments for {len(weights)} of weights: of "
                "another model"
            )
        if not any(each.any() for each in counts):
            return [Rounded(blocks, 0.0, 0.0) for blocks in stock]
        others: Floats | None = None
        rounded: list[Rounded] = []
        device, at_once = self._place(name, weights, False)
        ready_ones: list[SecondMoments] = []
        # Moments are read expert by expert: those of hundreds do not fit into memory together.
        for index in range(len(weights)):
            known = [file for file, each in zip(files, counts, strict=True) if each[index]]
            if known:
                with self._lock:
                    inputs = _mean([unpack_triangle(file.packed(name, index)) for file in known])
            else:
                others = self._others(name, files, counts) if others is None else others
                inputs = others
            ready_ones.append(SecondMoments(inputs, None, self._options, device))
            if len(ready_ones) == at_once or index + 1 == len(weights):
                some = slice(len(rounded), index + 1)
                matrices_of_batch, blocks = list(weights[some]), list(stock[some])
                rounded += round_matrices(matrices_of_batch, blocks, kind.name, ready_ones, self._options, device)
                ready_ones = []
        return rounded

    def _place(self, name: str, weights: Floats, coupled: bool) -> tuple[str | None, int]:
        """What rounds a tensor [matrices, rows, width], and how many of its matrices at once."""
        if self._device is None or (coupled and not self._named):
            return None, 1
        rows, width = weights.shape[1:]
        fitting = fit_device(rows, width, coupled, self._device)
        if not fitting:
            self._progress.info(
                f"{name} does not fit into the memory of the device ({self._device}): the CPU rounds it"
            )
            return None, 1
        return self._device, min(fitting, len(weights))

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

    def _ready(self, name: str) -> SecondMoments | None:
        """Factors of a tensor's moments, which serve all its types; None if no token reached it.

        Each thread keeps those of its last tensor: `trial.render_all` renders one tensor after the other.
        """
        if getattr(self._last, "name", None) != name:
            self._last.name, self._last.moments = None, None  # frees the memory first
            with self._lock:
                files = [file for file in self._moments if name in file]
                matrices = max(file.shape(name).matrices for file in files)
                if matrices != 1:
                    raise BitladderError(
                        f"{number_of(matrices, 'matrix', 'matrices')} of second moments for one of weights"
                    )
                reached = any(file.counts(name)[0] for file in files)
                inputs = _mean([unpack_triangle(file.packed(name)) for file in files])
                outputs = next((kept.matrix() for file in files if (kept := file.outputs(name)) is not None), None)
            if reached:
                self._last.moments = SecondMoments(
                    inputs, outputs, self._options, self._device if outputs is None or self._named else None
                )
            self._last.name = name
        ready: SecondMoments | None = self._last.moments
        return ready


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
