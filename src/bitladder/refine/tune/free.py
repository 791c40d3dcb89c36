"""What of a quantized tensor can move without its integers: the F16 numbers that blocks of it are multiplied by."""

import numpy as np
import torch

from bitladder.rounding.blocks import Blocks, Bytes, Floats
from bitladder.rounding.formats import FORMATS, pack, unpack
from bitladder.rounding.vectorformats import BLOCK, VectorBlocks, pack_vector, unpack_vector

_LARGEST = float(np.finfo(np.float16).max)


class FreeScales:
    """One matrix: W = Σ_i parts[i] · (1 + moves[i]), a move for each block.

    Parameters: `kind` a type that `rounding.can_round` knows; `data` its blocks, uint8 [rows, row bytes]. There is one
    part, levels × steps, for types without minimums, and a second one, the offsets, for those that have them. `moves`
    float32 [rows, width / block], all 0 at first.
    """

    def __init__(self, kind: str, data: Bytes, width: int) -> None:
        self._blocks: Blocks | VectorBlocks
        if kind in FORMATS:
            self._blocks = unpack(kind, data, width)
            self.block = self._blocks.format.block
            parts = [self._blocks.scaled()]
            if self._blocks.dmin is not None:
                parts.append(np.repeat(self._blocks.offsets(), self._blocks.format.sub, axis=1))
        else:
            self._blocks = unpack_vector(kind, data, width)
            self.block = BLOCK
            parts = [self._blocks.values()]
        self.parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
        self.moves = [torch.zeros(len(part), width // self.block) for part in parts]

    def weights(self) -> torch.Tensor:
        """The matrix as it is now, float32 [rows, width]."""
        whole = torch.zeros_like(self.parts[0])
        for part, move in zip(self.parts, self.moves, strict=True):
            whole.addcmul_(part, (1 + move).repeat_interleave(self.block, 1))
        return whole

    def slopes(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        """Derivatives of an objective by the moves, from those by the weights, float32 [rows, width]."""
        rows = len(gradient)
        return [(gradient * part).view(rows, -1, self.block).sum(-1) for part in self.parts]

    def blocks(self) -> Bytes:
        """The blocks with moved numbers, uint8 [rows, row bytes]; integers are as they were."""
        blocks = self._blocks
        d = _moved(blocks.d, self.moves[0])
        if isinstance(blocks, VectorBlocks):
            return pack_vector(VectorBlocks(blocks.format, blocks.codes, blocks.minus, d, blocks.scale))
        dmin = None if blocks.dmin is None else _moved(blocks.dmin, self.moves[1])
        return pack(Blocks(blocks.format, blocks.indices, d, dmin, blocks.scale, blocks.minimum))


def _moved(numbers: Floats, moves: torch.Tensor) -> Floats:
    """F16 numbers times 1 + moves, rounded to F16 again."""
    wanted: Floats = np.clip(numbers * (1 + moves.numpy()), -_LARGEST, _LARGEST)
    return wanted.astype(np.float16).astype(np.float32)
