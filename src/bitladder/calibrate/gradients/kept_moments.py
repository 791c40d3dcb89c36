"""Moments by gradients, kept in the folder of unfinished work, as a source for the file that rounding reads."""

import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.gradients.usable import torch_threads
from bitladder.calibrate.gradients.weighted_moments import GradientOptions, weighted_moments
from bitladder.calibrate.moments.moments_file import Floats, MomentShape, Provenance, pack_triangle
from bitladder.calibrate.unfinished import UnfinishedWork
from bitladder.engine import Tokens
from bitladder.progress import Progress


def moments_by_gradients(
    model: str | os.PathLike[str],
    chunks: Tokens,
    work: UnfinishedWork,
    provenance: Provenance,
    options: GradientOptions,
    memory: int,
    threads: int | None,
    progress: Progress,
) -> "KeptMoments":
    """Computes the moments of all weights that are not in the folder of unfinished work yet.

    Parameters:
        model: path of a GGUF.
        chunks: int32 [chunks, n_ctx].
        work: keeps the moments of each weight.
        provenance: where the moments come from.
        options: as of `weighted_moments`.
        memory: bytes for moments; as much again is used for weights.
        threads: threads of the CPU.
        progress: hears of the work.
    """
    shapes = _shapes(model, options, memory, threads)
    missing = [name for name in shapes if not work.has(name)]
    if missing:
        computed = weighted_moments(
            model, chunks, names=missing, options=options, memory=memory, threads=threads, progress=progress
        )
        for moments in computed:
            if moments.outputs is not None:
                work.put(f"{moments.name}.outputs", pack_triangle(moments.outputs))
            # Inputs come last: they say that the entry is complete.
            work.put(moments.name, pack_triangle(moments.inputs))
    return KeptMoments(shapes, work, chunks.size, provenance)


def _shapes(
    model: str | os.PathLike[str], options: GradientOptions, memory: int, threads: int | None
) -> dict[str, MomentShape]:
    """The sizes of all entries, in the order of the computation."""
    from bitladder.calibrate.gradients.forward import TorchModel

    with torch_threads(threads), TorchModel(model, memory=memory, threads=threads) as ours:
        sizes = {name: ours.shape(name) for name in ours.matrices}
        head = ours.head
    return {
        name: MomentShape(1, n_in, n_out if options.outputs and name != head else 0)
        for name, (n_out, n_in) in sizes.items()
    }


class KeptMoments:
    """Moments in the folder of unfinished work, over `tokens` tokens, as a MomentsSource."""

    def __init__(
        self, shapes: Mapping[str, MomentShape], work: UnfinishedWork, tokens: int, provenance: Provenance
    ) -> None:
        self.provenance = provenance
        self._shapes, self._work, self._tokens = shapes, work, tokens

    def names(self) -> list[str]:
        """See MomentsSource. Weights are in the order of the computation."""
        return list(self._shapes)

    def entry(self, name: str) -> str:
        """See MomentsSource. No two weights share an entry: their gradients differ."""
        return name

    def shape(self, name: str) -> MomentShape:
        """See MomentsSource."""
        return self._shapes[name]

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        """See MomentsSource."""
        return np.array([self._tokens], np.int64)

    def packed(self, name: str, matrix: int = 0) -> Floats:
        """See MomentsSource."""
        return np.asarray(self._work.get(name))

    def packed_outputs(self, name: str) -> Floats | None:
        """See MomentsSource."""
        return np.asarray(self._work.get(f"{name}.outputs")) if self._shapes[name].n_out else None
