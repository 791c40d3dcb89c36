"""Adam (arXiv 1412.6980) over chunks of text, on the numbers that a `Student` lets move."""

import itertools
import math

import numpy as np
import torch

from bitladder.calibrate import UnfinishedWork
from bitladder.calibrate.gradients.forward import TorchModel
from bitladder.engine.model import Tokens
from bitladder.errors import overflow
from bitladder.progress import SILENT, Progress
from bitladder.refine.options import TuneOptions
from bitladder.refine.tune.student import Key, Student


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
