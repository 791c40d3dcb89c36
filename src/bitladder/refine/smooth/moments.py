"""Second moments of a smoothed model, from those of the model as it was."""

import dataclasses
import os
from collections.abc import Mapping

from bitladder.calibrate import MomentsFile, writing_moments
from bitladder.refine.smooth.changes import Change, changed_moment


def smoothed_moments(
    moments: str | os.PathLike[str],
    changes: Mapping[str, Change],
    out: str | os.PathLike[str],
    model_sha256: str,
) -> None:
    """Write the moments that collecting on the smoothed model would give, up to what F16 rounds and, for v and up, to
    the weights of tokens: those stay what the gradients of the outputs as they were said.

    Parameters: `changes` what was done to each tensor; `model_sha256` the smoothed model's. Raises BitladderError for a
    file that holds no moments.
    """
    with MomentsFile(moments) as old:
        names = old.names()
        own = [name for name in names if old.entry(name) == name]
        shared = {name: old.entry(name) for name in names if old.entry(name) != name}
        provenance = dataclasses.replace(old.provenance, model_sha256=model_sha256)
        with writing_moments(out, provenance, {name: old.shape(name) for name in own}, shared) as writer:
            for name in own:
                writer.write(name, changed_moment(old.read(name), changes.get(name, Change())))
