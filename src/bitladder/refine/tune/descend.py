"""Adam over chunks of text, on what `Student` lets move."""

import dataclasses
import itertools
import math

import numpy as np
import torch

from bitladder.calibrate import UnfinishedWork
from bitladder.calibrate.gradients.forward import TorchModel
from bitladder.engine.model import Tokens
from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress
from bitladder.refine.tune.student import Key, Student

BETA1, BETA2, EPSILON = 0.9, 0.98, 1e-12
WARM_UP = 10  # steps


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How to descend: a step for each chunk, in an order drawn with `seed`.

    `rate` is how far a step moves a parameter at most, as a share of the number it belongs to. It grows over the first
    steps, then falls to 0 along half a cosine.
    """

    rate: float = 3e-4
    seed: int = 0

    def rates(self, steps: int) -> list[float]:
        """The rate of each step."""
        return [
            self.rate * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            for step in range(steps)
        ]


def descend(
    student: Student,
    teacher: TorchModel,
    chunks: Tokens,
    schedule: Schedule,
    *,
    keep: UnfinishedWork | None = None,
    progress: Progress = SILENT,
) -> list[float]:
    """Move the student's parameters towards a lower KLD from the teacher (Adam, arXiv 1412.6980).

    Parameters: chunks int32 [chunks, n_ctx]; `keep` takes the state each minute, and gives back what an interrupted
    descent left there. Returns each step's KLD, nats per token, as it was before the step. Raises BitladderError if it
    is not finite.
    """
    order = np.random.default_rng(schedule.seed).permutation(len(chunks))
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
        steps = enumerate(zip(order, schedule.rates(len(order)), strict=True), 1)
        for step, (index, rate) in itertools.islice(steps, done, None):
            divergence, slopes = student.backward(chunks[index], teacher)
            if not math.isfinite(divergence):
                raise BitladderError(f"the KLD of {student.model.path.name} is not finite in step {step}")
            for key, slope in slopes.items():
                mean = means[key].lerp_(slope, 1 - BETA1)
                square = squares[key].lerp_(slope.square_(), 1 - BETA2)
                spread = (square / (1 - BETA2**step)).sqrt_().add_(EPSILON)
                student.parameters[key].addcdiv_(mean, spread, value=-rate / (1 - BETA1**step))
            student.put()
            seen[step - 1] = divergence
            bar.note(f"KLD {seen[max(0, step - 20) : step].mean():.5f}")
            bar.advance()
            if keep is not None and keep.due():
                keep.save_state("tune", step, state)
    return seen.tolist()
