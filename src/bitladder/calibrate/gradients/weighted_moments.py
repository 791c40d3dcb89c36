"""Second moments of inputs, weighted by what an error at each token costs, and of the gradients of outputs.

To second order an error ΔW of a weight matrix raises the model's KLD by ½ E[(gᵀ ΔW x)²] per token. Here x is the
matrix's input, and g the gradient, with respect to its output, of the log-probability of labels that are drawn from the
model. (The second derivative of the KLD at its minimum is the Fisher information of such labels.) If g and x were
independent, and g alike in all directions, this would be ½ tr(ΔW H ΔWᵀ) with H = E[xxᵀ]. They are not: at an attention
sink ‖g‖² is hundreds of times its mean. Hence H = E[w xxᵀ] and, for the rows, O = E[v ggᵀ]. YAQA (arXiv 2505.22988)
calls the pair a Kronecker-factored sketch of the Hessian. For errors whose columns have the covariance C, and rows R,
the expectation above is tr(C H) with w = gᵀRg and tr(R O) with v = xᵀCx. Rounding for H and O leaves errors where these
are small, so C and R are taken to be (H + λ)⁻¹ and (O + λ)⁻¹: w and v are leverages. With w = ‖g‖² and v = 1, which
suit errors that are alike everywhere, quants of two small models had 2 to 12 % more KLD.
"""

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.gradients.usable import CHECKED_TOKENS, check_logits, require_torch, torch_threads
from bitladder.engine import Floats, Tokens
from bitladder.errors import UsageError
from bitladder.keys import Algorithm
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

    from bitladder.calibrate.gradients.forward import TorchModel

GRADIENT_MOMENTS = Algorithm(
    "moments by gradients",
    ("tokens weighted by the squared length of their gradients", "tokens weighted by leverages"),
)


@dataclasses.dataclass(frozen=True)
class GradientOptions(Options):
    """How moments are weighted by gradients."""

    outputs: bool = option(True, help="Moments of the gradients of outputs, which rounding uses too.")
    draws: int = option(1, least=1, help="Labels that are drawn for each position.")
    seed: int = option(0, help="Seed of the labels.")
    pilots: int = option(
        4, least=2, help="Every fourth chunk, by default, is used only for the moments that leverages are made of."
    )
    fewest: int = option(8, least=1, help="With fewer chunks tokens are weighted by the squared length of gradients.")
    damping: float = option(
        0.1, help="Damping of the moments that leverages are made of, as a share of their diagonal."
    )


@dataclasses.dataclass(frozen=True)
class GradientMoments:
    """Moments of one weight. w and v are leverages with mean 1.

    With too few chunks, and without outputs (never known of a head), w is ‖g‖² divided by its mean, and v = 1.

    Parameters:
        name: the weight.
        tokens: tokens that were read.
        inputs: E[w xxᵀ], float32 [n_in, n_in].
        outputs: E[v ggᵀ] in squared nats, float32 [n_out, n_out]; None if it is not known.
        by_position: mean of ‖g‖² at each position of a chunk, divided by its mean over all, float32 [n_ctx].
    """

    name: str
    tokens: int
    inputs: Floats
    outputs: Floats | None
    by_position: Floats


@GRADIENT_MOMENTS.entry
def weighted_moments(
    path: str | os.PathLike[str],
    chunks: Tokens,
    *,
    names: Collection[str] | None = None,
    options: GradientOptions | None = None,
    memory: int = 4 << 30,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Iterator[GradientMoments]:
    """Yields the moments of a model's weights, in the order of the computation from the last to the first.

    The same seed, model, chunks and threads give the same moments.

    Parameters:
        path: the model.
        chunks: sequences, int32 [chunks, n_ctx].
        names: weights; None takes all, the head included.
        options: how tokens are weighted.
        memory: bytes for moments; as much again is used for expanded weights. What does not fit at once takes another
            pass over the chunks.
        threads: threads of the CPU.
        progress: hears of the work.

    Raises:
        BitladderError: torch is not installed, does not know the architecture, or does not compute the library's
            logits (`check_logits`).
        UsageError: a name is not a matrix of the model.
    """
    require_torch()
    from bitladder.calibrate.gradients.forward import TorchModel

    options = options or GradientOptions()
    with torch_threads(threads), TorchModel(path, memory=memory, threads=threads) as model:
        check_logits(path, chunks[0, :CHECKED_TOKENS], threads=threads, ours=model)
        groups = _groups(model, choose_matrices(model, names), options.outputs, memory)
        pilots = range(0, len(chunks), options.pilots) if len(chunks) >= options.fewest else range(0)
        order = [*pilots, *(index for index in range(len(chunks)) if index not in pilots)]
        with progress.task("gradients", len(groups) * len(chunks)) as bar:
            for group in groups:
                sums = {
                    name: _GradientSums(model.shape(name), options.outputs and name != model.head) for name in group
                }

                def tap(
                    name: str, inputs: "torch.Tensor", gradients: "torch.Tensor", sums: dict[str, _GradientSums] = sums
                ) -> None:
                    sums[name].add(inputs, gradients)

                for place, index in enumerate(order):
                    if pilots and place == len(pilots):
                        for weight_sums in sums.values():
                            weight_sums.use_leverages(options.damping)
                    generator = chunk_generator(options.seed, index)
                    model.backward(chunks[index], group, tap, generator=generator, draws=options.draws)
                    bar.advance()
                for name in group:
                    yield sums.pop(name).finish(name, chunks.shape[1])


def chunk_generator(seed: int, index: int) -> "torch.Generator":
    """The generator that draws the labels of chunk `index`: the same in every pass."""
    return cast("torch.Generator", require_torch().Generator().manual_seed(seed * 1_000_003 + index))


def choose_matrices(model: "TorchModel", names: Collection[str] | None) -> list[str]:
    """The names (None: all matrices), from the last in the computation to the first.

    Raises UsageError for a name that is not a matrix.
    """
    if names is None:
        return model.matrices[::-1]
    unknown = [name for name in names if name not in model.matrices]
    if unknown:
        raise UsageError(f"{model.path.name} does not multiply by a weight called {unknown[0]!r}")
    return [name for name in reversed(model.matrices) if name in names]


def _groups(model: "TorchModel", names: Sequence[str], outputs: bool, memory: int) -> list[list[str]]:
    """Neighbouring weights whose moments fit into `memory` bytes together. A pass ends at the first of them."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        n_out, n_in = model.shape(name)
        size = 4 * (n_in * n_in + n_out * n_out) * 2 if outputs and name != model.head else 4 * n_in * n_in
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= size
    return groups


class _GradientSums:
    """The sums of one weight.

    Sums are float32: at some hundred chunks their rounding, 10⁻⁶ of a diagonal entry, is far below the sampling error.
    """

    def __init__(self, shape: tuple[int, int], outputs: bool) -> None:
        import torch

        n_out, n_in = shape
        self.inputs = torch.zeros(n_in, n_in)
        self.outputs = torch.zeros(n_out, n_out) if outputs else None
        self.powers: list[npt.NDArray[np.float64]] = []
        self._inverses: tuple[torch.Tensor, torch.Tensor] | None = None
        self._totals = [0.0, 0.0]  # of w and v

    def use_leverages(self, damping: float) -> None:
        """Starts again from 0, and weights tokens from now on by leverages that the sums so far give."""
        if self.outputs is not None:
            self._inverses = damped_inverse(self.inputs, damping), damped_inverse(self.outputs, damping)
            self.inputs.zero_()
            self.outputs.zero_()
            self._totals = [0.0, 0.0]

    def add(self, inputs: "torch.Tensor", gradients: "torch.Tensor") -> None:
        """Adds a sequence: inputs [length, n_in], gradients [length, n_out]."""
        squares = gradients.square().sum(1)
        of_inputs, of_outputs = squares, squares.new_ones(len(squares))
        if self._inverses is not None:
            inverse_inputs, inverse_outputs = self._inverses
            of_inputs = ((gradients @ inverse_outputs) * gradients).sum(1).clamp_min_(0)
            of_outputs = ((inputs @ inverse_inputs) * inputs).sum(1).clamp_min_(0)
        self._sum(0, self.inputs, inputs, of_inputs)
        if self.outputs is not None:
            self._sum(1, self.outputs, gradients, of_outputs)
        self.powers.append(squares.double().numpy())

    def _sum(self, which: int, sums: "torch.Tensor", rows: "torch.Tensor", weights: "torch.Tensor") -> None:
        scaled = rows * weights.sqrt()[:, None]
        sums.addmm_(scaled.T, scaled)
        self._totals[which] += float(weights.double().sum())

    def finish(self, name: str, length: int) -> GradientMoments:
        """Means from sums."""
        least = np.finfo(np.float64).tiny
        profile = np.mean(np.stack(self.powers), axis=0)
        inputs, outputs = (max(total, least) for total in self._totals)
        return GradientMoments(
            name,
            length * len(self.powers),
            (self.inputs / inputs).numpy(),
            None if self.outputs is None else (self.outputs / outputs).numpy(),
            (profile / max(float(profile.mean()), least)).astype(np.float32),
        )


def damped_inverse(sums: "torch.Tensor", damping: float) -> "torch.Tensor":
    """The inverse of a sum of outer products, scaled to a mean diagonal of 1 and damped: float32 [n, n].

    Example:
        >>> import torch
        >>> damped_inverse(torch.diag(torch.tensor([30.0, 10.0])), 0.5).diagonal().numpy().round(3).tolist()
        [0.5, 1.0]
    """
    import torch

    mean = sums.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = sums / mean + damping * torch.eye(len(sums))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
