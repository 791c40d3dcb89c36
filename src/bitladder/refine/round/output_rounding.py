"""From a file of second moments to the blocks of each tensor: `rounding` applied to the tensors of a model."""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import Moment, MomentsFile, model_sha256
from bitladder.engine.types import TensorType, quantize_rows
from bitladder.errors import BitladderError
from bitladder.gguf.reader import GgufFile
from bitladder.progress import SILENT, Progress
from bitladder.rounding import Rounded, RoundingOptions, can_round, round_tensor

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Raise it when the same moments and options would give other blocks.
VERSION = 2


class OutputRounding:
    """Rounds a model's tensors for their layers' outputs (a `sensitivity.rendered.Rounding`).

    Parameters: `moments` of the same model. Of several files the mean counts, each scaled to the same trace: moments
    weighted by gradients know what an error costs, and plain ones come from more tokens. `options` as for `rounding`.
    `losses` keeps, by tensor and type, what the library's blocks cost and what these do (`rounding.method.Rounded`).
    Threads may call at once.
    """

    def __init__(self, moments: Sequence[MomentsFile], options: RoundingOptions) -> None:
        self._moments, self._options = tuple(moments), options
        self._lock = threading.Lock()
        self.losses: dict[tuple[str, str], tuple[float, float]] = {}
        text = json.dumps([VERSION, joined_sha256(moments), dataclasses.asdict(options)])
        self.key = "output " + hashlib.sha256(text.encode()).hexdigest()

    def covers(self, name: str, kind: TensorType) -> bool:
        """Whether a tensor of that type gets blocks other than the library's."""
        return self._options.method != "stock" and can_round(kind.name) and any(name in file for file in self._moments)

    def __call__(self, name: str, weights: Floats, kind: TensorType, importance: Floats | None) -> Bytes:
        """The blocks of a tensor, uint8 [matrices, rows, row bytes].

        `weights` float32 [matrices, rows, width]; `importance` float32 [matrices, width] or None. An expert that no
        token reached, and a tensor without moments, gets the library's blocks. Raises BitladderError that names the
        tensor.
        """
        try:
            stock = np.stack(
                [
                    quantize_rows(matrix, kind, None if importance is None else importance[index])
                    for index, matrix in enumerate(weights)
                ]
            )
            if not self.covers(name, kind):
                return stock
            with self._lock:
                moment = _mean([file.read(name) for file in self._moments if name in file])
            rounded = self._round(name, weights, stock, kind, moment)
        except BitladderError as error:
            raise BitladderError(f"{name} as {kind.name}: {error}") from error
        self.losses[name, kind.name] = (
            sum(one.before for one in rounded),
            sum(one.after for one in rounded),
        )
        return np.stack([one.data for one in rounded])

    def _round(self, name: str, weights: Floats, stock: Bytes, kind: TensorType, moment: Moment) -> list[Rounded]:
        if len(moment.inputs) != len(weights):
            raise BitladderError(
                f"{len(moment.inputs)} matrices of second moments for {len(weights)} of weights: of another model"
            )
        options = self._options
        outputs = moment.outputs if len(weights) == 1 else None
        return [
            Rounded(stock[index], 0.0, 0.0)
            if not moment.counts[index]
            else round_tensor(matrix, stock[index], kind.name, moment.inputs[index], options, outputs)
            for index, matrix in enumerate(weights)
        ]


def refuse_other_moments(moments: Sequence[MomentsFile], model: GgufFile, progress: Progress = SILENT) -> None:
    """Raise BitladderError if second moments do not fit the model's tensors.

    Of a model of the same shapes but other content they say nothing true; that is warned of, not refused, because it
    may be the same model in another precision.
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


def _mean(moments: Sequence[Moment]) -> Moment:
    """The mean of inputs that were each scaled to a mean diagonal of 1; outputs from the first that has them."""
    if len(moments) == 1:
        return moments[0]
    if len({one.inputs.shape for one in moments}) > 1:
        raise BitladderError("the files of second moments are of different models")
    inputs = np.zeros_like(moments[0].inputs)
    for one in moments:
        scale = np.trace(one.inputs, axis1=1, axis2=2)[:, None, None] / one.inputs.shape[1]
        inputs += one.inputs / np.where(scale > 0, scale, 1)
    outputs = next((one.outputs for one in moments if one.outputs is not None), None)
    inputs /= np.float32(len(moments))
    return Moment(inputs, np.sum([one.counts for one in moments], axis=0), outputs)
