"""The noise floor: how far the full-precision model is from itself when nothing but arithmetic differs.

A difference between two quants below it says nothing about their weights.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.engine import Context, KernelInputs, Model, Workers, type_by_name
from bitladder.errors import BitladderError
from bitladder.evaluate.base.hidden import BASE, HiddenBase
from bitladder.evaluate.divergence import LogitBlocks, check_finite, divergence
from bitladder.evaluate.identity import MeasureOptions, decode
from bitladder.evaluate.scores import Noise, NoiseFigure
from bitladder.evaluate.token_scores import mean
from bitladder.gguf import GgufFile
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress

Floats = npt.NDArray[np.float32]

# Types that stand for all whose kernels round their inputs alike: to Q8_0 (blocks of 32), and to Q8_K (of 256).
SMALL_BLOCKS, LARGE_BLOCKS = "q8_0", "q6_K"
# The CPU's flash attention sums in float32 over MANY tokens or more at once, and in float16 over fewer (GGML_FA_TILE_Q
# of ggml). CUDA multiplies FEW tokens or fewer with kernels of their own (MMVQ_MAX_BATCH_SIZE of ggml).
MANY, FEW = 64, 8


def other_ubatch(settings: MeasureOptions) -> int:
    """An -ub for which the library takes other kernels than for that of the settings."""
    size = min(settings.n_ubatch, settings.n_batch, settings.n_ctx)
    if size >= MANY:
        return FEW
    if settings.n_ctx >= MANY:
        return MANY
    return 1 if size > 1 else settings.n_ctx


NOISE = Algorithm(
    "noise",
    (
        "another -ub, and inputs rounded to Q8_0",
        "inputs rounded to Q8_K too",
        "another -ub on the other side of a kernel, with rounded inputs too",
        "a rounding that cannot be had is left out, with the reason",
    ),
    uses=(BASE,),
)


@NOISE.entry
def noise_floor(base: HiddenBase, chunks: int, settings: MeasureOptions, progress: Progress = SILENT) -> Noise:
    """Measures how far the model of a base is from itself, over the first `chunks` chunks of the base.

    Another -ub takes other kernels, whose results differ in the last digits. A quant makes much more of that: the last
    digits decide how its kernels round their inputs. So another -ub is tried three times: on the model as it is, with
    the input of every multiplication by a weight rounded to Q8_0, as the CPU kernels of Q8_0, Q5_0 and the like round
    it, and rounded to Q8_K, as those of K-quants and most I-quants do. What each rounding costs by itself is measured
    too. A rounding is left out if no weight is wide enough for it. It is left out with a reason if inputs cannot be
    rounded so: on a GPU, or if they are too large for the type.

    Raises:
        BitladderError: the model does not load or decode.
    """
    n_ubatch = other_ubatch(settings)
    other = dataclasses.replace(settings, n_batch=n_ubatch, n_ubatch=n_ubatch)
    with settings.load(base.model.path) as model, Workers(settings.threads) as workers:
        passes = _Passes(model, base, min(chunks, len(base.chunks)), workers, progress)
        (batch,) = passes.run([other], KernelInputs())
        small, small_batch = passes.rounded([settings, other], SMALL_BLOCKS)
        large, large_batch = passes.rounded([settings, other], LARGE_BLOCKS)
    if passes.reasons:
        progress.warn(f"the noise floor has no figure with rounded inputs: {'; '.join(passes.reasons)}")
    return Noise(
        chunks=passes.count,
        n_ubatch=n_ubatch,
        batch=batch,
        activations=small,
        activations_batch=small_batch,
        activations_k=large,
        activations_k_batch=large_batch,
        left_out="; ".join(passes.reasons) or None,
    )


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Passes of the model over the first `count` chunks of the base."""

    model: Model
    base: HiddenBase
    count: int
    workers: Workers
    progress: Progress
    reasons: list[str] = dataclasses.field(default_factory=list)  # why roundings were left out

    def rounded(self, passes: Sequence[MeasureOptions], name: str) -> Sequence[NoiseFigure | None]:
        """`run` with inputs rounded as for weights of a type."""
        kind = type_by_name(name)
        with GgufFile(self.model.path) as file:
            wide = [name for name, tensor in file.tensors.items() if tensor.width % kind.block == 0]
        inputs = KernelInputs()
        inputs.pretend(dict.fromkeys(wide, kind))
        try:
            return self.run(passes, inputs) if wide else [None] * len(passes)
        except BitladderError as error:
            if str(error) not in self.reasons:
                self.reasons.append(str(error))
            return [None] * len(passes)

    def run(self, passes: Sequence[MeasureOptions], inputs: KernelInputs) -> list[NoiseFigure]:
        """The divergence of each pass from the pass before it, of the first from the base."""
        chunks, name = self.base.chunks, self.model.name
        kld = np.empty((len(passes), self.count, chunks.scored))
        with contextlib.ExitStack() as stack:
            contexts = [stack.enter_context(self._context(settings, inputs)) for settings in passes]
            task = stack.enter_context(self.progress.task(f"Noise floor of {name}", self.count))
            for chunk in range(self.count):
                known = self.base.rows(chunk)
                before: LogitBlocks = self.base.logits(chunk, 0, chunks.scored)
                shift_before = known.top_logit
                for row, context in enumerate(contexts):
                    logits = np.concatenate([part.copy() for _, part in decode(context, chunks, chunk)])
                    shift = logits[np.arange(chunks.scored), known.top]
                    check_finite(shift, name)
                    kld[row, chunk], _ = divergence(before, logits, shift_before, shift, self.workers)
                    before, shift_before = _RunLogits(logits), shift
                task.advance()
        figures = [mean(values.ravel()) for values in kld]
        return [
            NoiseFigure(value=figure.value, error=figure.error, max=float(values.max()))
            for figure, values in zip(figures, kld, strict=True)
        ]

    def _context(self, settings: MeasureOptions, inputs: KernelInputs) -> Context:
        return Context(self.model, settings, callback=inputs)


@dataclasses.dataclass(frozen=True)
class _RunLogits:
    """Logits of a pass, float32 [rows, n_vocab] (a `divergence.LogitBlocks`)."""

    values: Floats
    step: int = 4096

    @property
    def count(self) -> int:
        """Blocks that make up the vocabulary."""
        return -(-int(self.values.shape[1]) // self.step)

    def block(self, index: int, slot: int) -> tuple[int, Floats]:
        """The first token id of a block and a copy of its logits, float32 [rows, block]."""
        first = index * self.step
        return first, self.values[:, first : first + self.step].copy()
