"""A quant as a torch model whose blocks keep their integers, and whose F16 numbers can move."""

import os

import numpy as np
import torch

from bitladder.calibrate import TorchModel
from bitladder.closing import Closing
from bitladder.engine import Tokens
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile
from bitladder.refine.model_files import Bytes
from bitladder.rounding import TYPES, can_round

# Positions whose logits are held at once: at 150,000 tokens of vocabulary some 80 MB for each of a few arrays.
POSITIONS = 128
Key = tuple[str, int]


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


class Student(Closing):
    """A quant whose scales are tuned. The blocks of the head stay: where it is tied, they are the embeddings too.

    Parameters:
        path: the quant.
        threads: threads of the CPU; None takes all.

    Attributes:
        model: computes with the parameters as `put` has set them.
        parameters: the moves of F16 numbers, by tensor and number of the term.

    Raises:
        BitladderError: torch does not know the architecture, or no tensor has blocks that can move.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None) -> None:
        self.model = TorchModel(path, memory=1 << 62, threads=threads)
        with GgufFile(path) as file:
            self.scales = {
                name: FreeScales(file.tensors[name].type.name, file.read(file.tensors[name]), file.tensors[name].width)
                for name in self.model.matrices
                if name != self.model.head and can_round(file.tensors[name].type.name)
            }
        if not self.scales:
            self.model.close()
            raise BitladderError(f"{self.model.path.name} has no quantized blocks whose scales could be tuned")
        self.parameters: dict[Key, torch.Tensor] = {
            (name, term): move for name, scales in self.scales.items() for term, move in enumerate(scales.moves)
        }
        self._slopes: dict[Key, torch.Tensor] = {}
        self.put()

    def close(self) -> None:
        """Frees the weights."""
        self.model.close()

    def put(self) -> None:
        """Gives the model the parameters as they are now."""
        for name, scales in self.scales.items():
            self.model.weights.replace(name, scales.weights())

    def backward(self, tokens: Tokens, teacher: TorchModel) -> tuple[float, dict[Key, torch.Tensor]]:
        """The divergence from full precision on one sequence, and its derivatives.

        Parameters:
            tokens: int32 [length].
            teacher: the full-precision model.

        Returns:
            Mean KLD over positions, nats, and its derivatives by `parameters`.
        """
        self._slopes = {}
        target = teacher.states(tokens)
        hidden = self.model.states(tokens, self.scales, self._tap)
        divergence, gradient = self._divergence(hidden.detach(), target, teacher)
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        return divergence, self._slopes

    def _tap(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        for term, slope in enumerate(self.scales[name].slopes(gradients.T @ inputs)):
            self._slopes[name, term] = slope

    @torch.no_grad()
    def _divergence(
        self, hidden: torch.Tensor, target: torch.Tensor, teacher: TorchModel
    ) -> tuple[float, torch.Tensor]:
        """Mean KLD over positions from final states [length, width] each, and its gradient by `hidden`."""
        gradient = torch.empty_like(hidden)
        total = 0.0
        for start in range(0, len(hidden), POSITIONS):
            rows = slice(start, start + POSITIONS)
            ours = torch.log_softmax(self.model.head_logits(hidden[rows]), -1)
            theirs = torch.log_softmax(teacher.head_logits(target[rows]), -1)
            probabilities = theirs.exp()
            total += float((probabilities * (theirs - ours)).sum())
            # d KLD / d logits = q − p
            gradient[rows] = self.model.head_gradient(ours.exp_().sub_(probabilities))
        return total / len(hidden), gradient / len(hidden)
