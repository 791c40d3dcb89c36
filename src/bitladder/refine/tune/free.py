"""What of a quantized tensor can move without its integers: the F16 numbers of its blocks."""

import numpy as np
import torch

from bitladder.rounding import TYPES
from bitladder.rounding.block_types import Bytes


class FreeScales:
    """One matrix: W = Σ_i terms[i] · (1 + moves[i]), a move for each F16 number of a block.

    Parameters:
        kind: a type that `rounding.can_round` knows.
        data: its blocks, uint8 [rows, row bytes].
        width: weights of a row.

    Attributes:
        terms: levels × steps; and the offsets, for types that have them. float32 [rows, width] each.
        moves: float32 [rows, width / block] for each term, all 0 at first.
    """

    def __init__(self, kind: str, data: Bytes, width: int) -> None:
        self._blocks = TYPES[kind].unpack(data, width)
        self.block = TYPES[kind].block
        self.terms = [torch.from_numpy(np.ascontiguousarray(term)) for term in self._blocks.terms()]
        self.moves = [torch.zeros(len(term), width // self.block) for term in self.terms]

    def weights(self) -> torch.Tensor:
        """The matrix as it is now, float32 [rows, width]."""
        whole = torch.zeros_like(self.terms[0])
        for term, move in zip(self.terms, self.moves, strict=True):
            whole.addcmul_(term, (1 + move).repeat_interleave(self.block, 1))
        return whole

    def slopes(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        """Derivatives of an objective by the moves, from those by the weights, float32 [rows, width]."""
        rows = len(gradient)
        return [(gradient * term).view(rows, -1, self.block).sum(-1) for term in self.terms]

    def blocks(self) -> Bytes:
        """The blocks with moved F16 numbers, uint8 [rows, row bytes]; integers are as they were."""
        return self._blocks.rescaled([1 + move.numpy() for move in self.moves]).pack()
