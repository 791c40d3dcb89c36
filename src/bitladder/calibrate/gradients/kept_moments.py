"""Moments by gradients, kept in the folder of unfinished work, as a source for the file that rounding reads."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.gradients.options import GradientOptions
from bitladder.calibrate.gradients.weighted_moments import gradient_pass, opened_model
from bitladder.calibrate.moments.schema import MomentShape, Provenance
from bitladder.calibrate.moments.triangles import Correlations, Floats, LowRank
from bitladder.calibrate.unfinished import UnfinishedWork
from bitladder.engine import Tokens
from bitladder.progress import Progress

if TYPE_CHECKING:
    from bitladder.calibrate.gradients.entry_sums import EntryPlan

# Parts of the names of what is kept of a matrix, as in the file.
_VALUES, _DIAGONALS = "values", "diagonals"


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
        memory: bytes for everything.
        threads: threads of the CPU.
        progress: hears of the work.
    """
    from bitladder.calibrate.gradients.segments import choose_matrices, plan_entries

    with opened_model(model, options, memory, threads) as ours:
        plans = plan_entries(ours, choose_matrices(ours, None), options)
        for entries in gradient_pass(ours, chunks, None, options, memory, work, threads).run(progress):
            for entry in entries:
                _keep(work, f"{entry.plan.names[0]}.inputs", Correlations.of(entry.packed_inputs()))
                for name in entry.plan.names:
                    outputs = entry.kept_outputs(name)
                    if outputs is not None:
                        _keep(work, f"{name}.outputs", outputs)
    return KeptMoments(plans[::-1], work, chunks.size, provenance)


def _keep(work: UnfinishedWork, name: str, kept: Correlations | LowRank) -> None:
    work.put(f"{name}.{_VALUES}", kept.values)
    work.put(f"{name}.{_DIAGONALS}", kept.diagonals)


class KeptMoments:
    """Moments in the folder of unfinished work, over `tokens` tokens, as a MomentsSource."""

    def __init__(self, plans: Sequence["EntryPlan"], work: UnfinishedWork, tokens: int, provenance: Provenance) -> None:
        self.provenance = provenance
        self._work, self._tokens = work, tokens
        self._plans = {name: plan for plan in plans for name in plan.names}

    def names(self) -> list[str]:
        """See MomentsSource. Weights are in the order of the computation."""
        return list(self._plans)

    def entry(self, name: str) -> str:
        """See MomentsSource."""
        return self._plans[name].names[0]

    def shape(self, name: str) -> MomentShape:
        """See MomentsSource."""
        plan = self._plans[name]
        outputs = plan.outputs[plan.names.index(name)]
        return MomentShape(1, plan.n_in, **({} if outputs is None else outputs.moment_shape))

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        """See MomentsSource."""
        return np.array([self._tokens], np.int64)

    def packed(self, name: str, matrix: int = 0) -> Floats:
        """See MomentsSource."""
        packed: Floats = Correlations(*self._kept(f"{self.entry(name)}.inputs")).packed()[matrix]
        return packed

    def outputs(self, name: str) -> Correlations | LowRank | None:
        """See MomentsSource."""
        shape = self.shape(name)
        if not shape.n_out:
            return None
        return (LowRank if shape.rank else Correlations)(*self._kept(f"{name}.outputs"))

    def _kept(self, name: str) -> tuple[npt.NDArray[np.float16], Floats]:
        return np.asarray(self._work.get(f"{name}.{_VALUES}")), np.asarray(self._work.get(f"{name}.{_DIAGONALS}"))
