"""A quant as a torch model whose blocks keep their integers, whose F16 numbers can move, and their descent (Adam)."""

import itertools
import math
import os

import numpy as np
import torch

from bitladder.calibrate import Routed, TorchModel, UnfinishedWork, weight_gradient
from bitladder.engine import Tokens
from bitladder.errors import BitladderError, overflow
from bitladder.files import Closing
from bitladder.gguf import GgufFile
from bitladder.progress import SILENT, Progress
from bitladder.refine.model_files import Bytes
from bitladder.refine.options import TuneOptions
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
        device: what makes products with weights; None is the CPU.

    Attributes:
        model: computes with the parameters as `put` has set them.
        parameters: the moves of F16 numbers, by tensor and number of the term.

    Raises:
        BitladderError: torch does not know the architecture, or no tensor has blocks that can move.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None, device: str | None = None) -> None:
        self.model = TorchModel(path, memory=1 << 62, threads=threads, device=device)
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

    def _tap(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor, routed: Routed | None) -> None:
        for term, slope in enumerate(self.scales[name].slopes(weight_gradient(inputs, gradients, routed))):
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
            products = self.model.head_products(hidden[rows])
            ours = torch.log_softmax(self.model.modules.after_head(products), -1)
            theirs = torch.log_softmax(teacher.head_logits(target[rows]), -1)
            probabilities = theirs.exp()
            total += float((probabilities * (theirs - ours)).sum())
            # d KLD / d logits = q − p
            gradient[rows] = self.model.head_gradient(ours.exp_().sub_(probabilities), products)
        return total / len(hidden), gradient / len(hidden)


def rates(options: TuneOptions, steps: int) -> list[float]:
    """The rate of each step: it grows over the first steps, then falls to 0 along half a cosine.

    Example:
        >>> rates(TuneOptions(tune_rate=0.1, warm_up=2), 4)[0] == 0.1 / 2
        True
    """
    return [
        options.tune_rate * min(1, (step + 1) / options.warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
        for step in range(steps)
    ]


def descend(
    student: Student,
    teacher: TorchModel,
    chunks: Tokens,
    options: TuneOptions,
    *,
    keep: UnfinishedWork | None = None,
    progress: Progress = SILENT,
) -> list[float]:
    """Moves the parameters of a student towards a lower KLD from the teacher, a step for each chunk (Adam).

    Parameters:
        student: the quant.
        teacher: the full-precision model.
        chunks: int32 [chunks, n_ctx].
        options: rates, and the order of chunks.
        keep: saves the state each minute, and has the state of a descent that was interrupted.
        progress: where work is shown.

    Returns:
        The KLD of each step, nats per token, as it was before the step.

    Raises:
        BitladderError: a KLD is not finite.
    """
    order = np.random.default_rng(options.tune_seed).permutation(len(chunks))
    means: dict[Key, torch.Tensor] = {key: torch.zeros_like(move) for key, move in student.parameters.items()}
    squares = {key: torch.zeros_like(move) for key, move in student.parameters.items()}
    seen = np.zeros(len(order))
    state = {"seen": seen} | {
        f"{label}{index}": values.numpy()  # the same memory
        for label, kept in (("move", student.parameters), ("mean", means), ("square", squares))
        for index, values in enumerate(kept.values())
    }
    done = 0 if keep is None else keep.load_state("tune", state, progress)
    student.put()
    with progress.task("tune", len(order)) as bar:
        bar.advance(done)
        steps = enumerate(zip(order, rates(options, len(order)), strict=True), 1)
        for step, (index, rate) in itertools.islice(steps, done, None):
            divergence, slopes = student.backward(chunks[index], teacher)
            if not math.isfinite(divergence):
                raise overflow(f"in step {step} the KLD of {student.model.path.name} is")
            for key, slope in slopes.items():
                mean = means[key].lerp_(slope, 1 - options.mean_decay)
                square = squares[key].lerp_(slope.square_(), 1 - options.square_decay)
                spread = (square / (1 - options.square_decay**step)).sqrt_().add_(options.epsilon)
                student.parameters[key].addcdiv_(mean, spread, value=-rate / (1 - options.mean_decay**step))
            student.put()
            seen[step - 1] = divergence
            bar.note(f"KLD {seen[max(0, step - 20) : step].mean():.5f}")
            bar.advance()
            if keep is not None and keep.due():
                keep.save_state("tune", step, state)
    return seen.tolist()
