"""The sums of an entry of moments by gradients: of one input, and of the outputs of the weights that multiply it."""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from bitladder.calibrate.gradients.grams import PANEL, Gram, Leverage, LowRankGram
from bitladder.calibrate.gradients.options import GradientOptions
from bitladder.calibrate.moments.triangles import Correlations, Floats, LowRank


@dataclasses.dataclass(frozen=True)
class OutputShape:
    """How O of a weight is kept: as `blocks` diagonal blocks of `width` numbers, or by a factor of `rank` columns.

    With a factor, leverages are made of the diagonal alone: then the width is 1.
    """

    width: int
    blocks: int
    rank: int = 0

    @property
    def moment_shape(self) -> dict[str, int]:
        """The fields of a MomentShape."""
        n_out = self.width * self.blocks
        return {"n_out": n_out, "rank": min(self.rank, n_out)} if self.rank else {"n_out": n_out, "blocks": self.blocks}

    def sums(self) -> Gram | LowRankGram:
        """Sums of this shape, all 0."""
        return LowRankGram(self.blocks, self.rank) if self.rank else Gram(self.width, self.blocks)


@dataclasses.dataclass(frozen=True)
class EntryPlan:
    """Weights that share an input and how its tokens are weighted.

    Parameters:
        names: the weights. The entry is kept under the first name.
        n_in: numbers of an input.
        outputs: how O of each weight is kept; None for the head, and where O is not made.
    """

    names: tuple[str, ...]
    n_in: int
    outputs: tuple[OutputShape | None, ...]


class EntrySums:
    """The sums of one entry while they grow.

    Sums are float32: at some hundred chunks their rounding, 10⁻⁶ of a diagonal entry, is far below the sampling error.

    Parameters:
        plan: the entry.
        options: how tokens are weighted.
        length: tokens of a chunk.
    """

    def __init__(self, plan: EntryPlan, options: GradientOptions, length: int) -> None:
        self.plan, self._options = plan, options
        self.inputs = Gram(plan.n_in)
        self.outputs = [None if shape is None else shape.sums() for shape in plan.outputs]
        # Without O all tokens keep counting ‖g‖².
        self.leverages_known = all(gram is not None for gram in self.outputs)
        self._of_inputs = Leverage(plan.n_in, 1, options.sketch) if self.leverages_known else None
        self._of_outputs = [
            None if shape is None else Leverage(shape.width, shape.blocks, options.sketch) for shape in plan.outputs
        ]
        self.learned = False
        self._totals = np.zeros(1 + len(plan.names))  # of w, and of v for each weight
        self._powers = np.zeros((len(plan.names), length))
        self._waiting: dict[str, torch.Tensor] = {}

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """What grows, by name, in memory that is shared."""
        arrays: dict[str, npt.NDArray[np.generic]] = {"totals": self._totals, "powers": self._powers}
        for place, gram in enumerate([self.inputs, *self.outputs]):
            if gram is not None:
                arrays |= {f"gram {place} {number}": panel for number, panel in enumerate(gram.arrays())}
        for place, leverage in enumerate([self._of_inputs, *self._of_outputs]):
            if leverage is not None:
                arrays[f"roots {place}"] = leverage.roots.numpy()
        return {f"{self.plan.names[0]} {name}": array for name, array in arrays.items()}

    def use_leverages(self) -> None:
        """Weights tokens from now on by the leverages that the sums so far give, and starts again from 0."""
        if self._of_inputs is None:
            return
        self._of_inputs.learn(self.inputs, self._options.damping)
        self.inputs.clear()
        for gram, leverage in zip(self.outputs, self._of_outputs, strict=True):
            assert gram is not None and leverage is not None
            leverage.learn(gram, self._options.damping)
            gram.clear()
        self._totals[:] = 0
        self.learned = True

    def add(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Adds a sequence of one weight: inputs [length, n_in], gradients [length, n_out].

        The input is added up when all of its weights were seen: their weightings are added.
        """
        place = self.plan.names.index(name)
        squares = gradients.square().sum(1)
        self.add_powers(name, inputs, squares, self._weights(place, gradients, squares))
        gram = self.outputs[place]
        if gram is None:
            return
        weights = (
            self._of_inputs.of(inputs) if self.learned and self._of_inputs is not None else torch.ones(len(inputs))
        )
        gram.add(gradients, weights)
        self._totals[1 + place] += float(weights.double().numpy().sum())

    def _weights(self, place: int, gradients: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        leverage = self._of_outputs[place]
        return leverage.of(gradients) if self.learned and leverage is not None else squares

    def add_powers(self, name: str, inputs: torch.Tensor, squares: torch.Tensor, weights: torch.Tensor) -> None:
        """Adds what is known of a sequence without the gradients themselves: their squared lengths [length]."""
        self._powers[self.plan.names.index(name)] += squares.double().numpy()
        self._waiting[name] = weights
        if len(self._waiting) < len(self.plan.names):
            return
        # In the order of the names, whatever the order of the backward pass.
        total = torch.stack([self._waiting[each] for each in self.plan.names]).sum(0)
        self._waiting.clear()
        self.inputs.add(inputs, total)
        self._totals[0] += float(total.double().numpy().sum())

    def packed_inputs(self) -> Floats:
        """E[w xxᵀ]: the upper triangle by rows, float32 [1, n_in (n_in + 1) / 2]."""
        return self.inputs.packed(self._total(0))

    def kept_outputs(self, name: str) -> Correlations | LowRank | None:
        """E[v ggᵀ] of a weight; None if it is not made."""
        place = self.plan.names.index(name)
        gram, total = self.outputs[place], self._total(1 + place)
        if isinstance(gram, LowRankGram):
            return gram.low_rank(total)
        return None if gram is None else Correlations.of(gram.packed(total))

    def by_position(self, name: str) -> Floats:
        """Mean of ‖g‖² at each position, divided by its mean over all, float32 [length]."""
        powers = self._powers[self.plan.names.index(name)]
        return np.asarray(powers / max(float(powers.mean()), np.finfo(np.float64).tiny), np.float32)

    def _total(self, which: int) -> float:
        return max(float(self._totals[which]), float(np.finfo(np.float32).tiny))


def sums_bytes(plan: EntryPlan, sketch: int) -> int:
    """Bytes that EntrySums of a plan take, nearly."""
    numbers = 0
    for shape in (OutputShape(plan.n_in, 1), *(shape for shape in plan.outputs if shape is not None)):
        size = shape.width * shape.blocks
        whole = (size + PANEL) * size / 2 if shape.blocks == 1 else size * shape.width
        numbers += size * min(sketch, shape.width) + (2 * size * shape.rank if shape.rank else int(whole))
    return 4 * numbers
