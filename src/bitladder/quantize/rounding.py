"""From a file of second moments to the blocks of each tensor: `rounding` applied to the tensors of a model."""

import dataclasses
import hashlib
import json
import threading

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.moments import Moment, MomentsFile
from bitladder.engine.types import TensorType, quantize_rows
from bitladder.errors import BitladderError
from bitladder.rounding import Rounded, RoundingOptions, can_round, round_tensor

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Raise it when the same moments and options would give other blocks.
VERSION = 1
# A table that is both embedding and head is read row by row too, and there every column counts alike. The unit matrix
# with this share of the head's mean second moment stands for that use.
TIED_DAMPING = 1.0
TIED = "token_embd.weight"


class OutputRounding:
    """Rounds a model's tensors for their layers' outputs (a `sensitivity.rendered.Rounding`).

    Parameters: `moments` of the same model; `options` as for `rounding`. `losses` keeps, by tensor and type, what the
    library's blocks cost and what these do (see `rounding.method.Rounded`). Threads may call at once.
    """

    def __init__(self, moments: MomentsFile, options: RoundingOptions) -> None:
        self._moments, self._options = moments, options
        self._lock = threading.Lock()
        self.losses: dict[tuple[str, str], tuple[float, float]] = {}
        text = json.dumps([VERSION, moments.sha256, dataclasses.asdict(options)])
        self.key = "output " + hashlib.sha256(text.encode()).hexdigest()

    def covers(self, name: str, kind: TensorType) -> bool:
        """Whether a tensor of that type gets blocks other than the library's."""
        return self._options.method != "stock" and can_round(kind.name) and name in self._moments

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
                moment = self._moments.read(name)
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
        if name == TIED:
            options = dataclasses.replace(options, damping=TIED_DAMPING)
        outputs = moment.outputs if len(weights) == 1 else None
        return [
            Rounded(stock[index], 0.0, 0.0)
            if not moment.counts[index]
            else round_tensor(matrix, stock[index], kind.name, moment.inputs[index], options, outputs)
            for index, matrix in enumerate(weights)
        ]
