"""Second moments of a smoothed model, from those of the model as it was."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from bitladder.calibrate.moments import Floats, Moment, MomentsFile, writing_moments
from bitladder.smooth.links import Link
from bitladder.smooth.model import Factors, factors_of


def smoothed_moments(
    moments: str | os.PathLike[str],
    scales: Sequence[tuple[Link, Floats]],
    out: str | os.PathLike[str],
    model_sha256: str,
) -> None:
    """Write the moments that collecting on the smoothed model would give, up to what F16 rounds and, for v and up, to
    the weights of tokens: those stay what the gradients of the outputs as they were said.

    Inputs are divided by the scales of a weight's columns, so E[w xxᵀ] is by their products; an output that is divided
    by s has a gradient that is s times larger. Parameters: `scales` float32 [matrices, channels] by link, of the links
    that were used; `model_sha256` the smoothed model's. Raises BitladderError for a file that holds no moments.
    """
    factors = factors_of(scales, list({link.kind for link, _ in scales}))
    with MomentsFile(moments) as old:
        names = old.names()
        own = [name for name in names if old.entry(name) == name]
        shared = {name: old.entry(name) for name in names if old.entry(name) != name}
        provenance = dataclasses.replace(old.provenance, model_sha256=model_sha256)
        with writing_moments(out, provenance, {name: old.shape(name) for name in own}, shared) as writer:
            for name in own:
                writer.write(name, _scaled(old.read(name), factors.get(name)))


def _scaled(moment: Moment, factors: Factors | None) -> Moment:
    if factors is None:
        return moment
    columns, rows = factors.columns, factors.rows
    inputs, outputs = moment.inputs, moment.outputs
    if columns is not None:
        inverse = (1 / np.broadcast_to(columns, (len(inputs), columns.shape[1]))).astype(np.float32)
        inputs = inputs * inverse[:, :, None] * inverse[:, None, :]
    if rows is not None and outputs is not None:
        inverse = (1 / rows).astype(np.float32)
        outputs = outputs * inverse[:, None] * inverse[None, :]
    return Moment(inputs, moment.counts, outputs)
