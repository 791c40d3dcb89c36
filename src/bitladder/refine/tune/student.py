"""A quant as a torch model whose blocks' F16 numbers can move."""

import os

import torch

from bitladder.calibrate.gradients.forward import TorchModel
from bitladder.closing import Closing
from bitladder.engine.model import Tokens
from bitladder.errors import BitladderError
from bitladder.gguf.reader import GgufFile
from bitladder.refine.tune.free import FreeScales
from bitladder.rounding import can_round

# Positions whose logits are held at once: at 150,000 tokens of vocabulary some 80 MB for each of a few arrays.
ROWS = 128
Key = tuple[str, int]


class Student(Closing):
    """`model` computes with what `put` has set from `parameters`, the moves of blocks' numbers by (tensor, part).

    The head's blocks stay as they are: where it is tied, they are the embeddings too. Raises BitladderError as
    `TorchModel` does, and if no tensor has blocks that can move.
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
            (name, part): move for name, scales in self.scales.items() for part, move in enumerate(scales.moves)
        }
        self._slopes: dict[Key, torch.Tensor] = {}
        self.put()

    def close(self) -> None:
        """Forget the weights."""
        self.model.close()

    def put(self) -> None:
        """Let the model compute with the parameters as they are now."""
        for name, scales in self.scales.items():
            self.model.weights.replace(name, scales.weights())

    def backward(self, tokens: Tokens, teacher: TorchModel) -> tuple[float, dict[Key, torch.Tensor]]:
        """KLD from the teacher's predictions of one sequence, mean over its positions, and its derivatives.

        Parameters: tokens int32 [length]. Derivatives have the keys of `parameters`.
        """
        self._slopes = {}
        target = teacher.states(tokens)
        hidden = self.model.states(tokens, self.scales, self._tap)
        divergence, gradient = self._divergence(hidden.detach(), target, teacher)
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        return divergence, self._slopes

    def _tap(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        for part, slope in enumerate(self.scales[name].slopes(gradients.T @ inputs)):
            self._slopes[name, part] = slope

    @torch.no_grad()
    def _divergence(
        self, hidden: torch.Tensor, target: torch.Tensor, teacher: TorchModel
    ) -> tuple[float, torch.Tensor]:
        """Mean KLD over positions from final states [length, width] each, and its gradient by `hidden`."""
        gradient = torch.empty_like(hidden)
        total = 0.0
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            ours = torch.log_softmax(self.model.head_logits(hidden[rows]), -1)
            theirs = torch.log_softmax(teacher.head_logits(target[rows]), -1)
            probabilities = theirs.exp()
            total += float((probabilities * (theirs - ours)).sum())
            # d KLD / d logits = q − p
            gradient[rows] = self.model.head_gradient(ours.exp_().sub_(probabilities))
        return total / len(hidden), gradient / len(hidden)
