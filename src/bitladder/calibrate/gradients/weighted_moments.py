"""Second moments of inputs, weighted by what an error at each token costs, and of the gradients of outputs.

To second order an error ΔW of a weight matrix raises the model's KLD by ½ E[(gᵀ ΔW x)²] per token: x is the matrix's
input and g the gradient, with respect to its output, of the log-probability of labels that are drawn from the model.
(The second derivative of the KLD at its minimum is the Fisher information of such labels.) Were g and x independent,
and g alike in all directions, this would be ½ tr(ΔW H ΔWᵀ) with H = E[xxᵀ]. They are not: at an attention sink ‖g‖² is
hundreds of times its mean. Hence H = E[w xxᵀ] and, for the rows, O = E[v ggᵀ]; YAQA (arXiv 2505.22988) calls the pair a
Kronecker-factored sketch of the Hessian. For errors whose columns have the covariance C, and rows R, the expectation
above is tr(C H) with w = gᵀRg and tr(R O) with v = xᵀCx. Rounding for H and O leaves errors where these are small, so
that C and R are taken to be (H + λ)⁻¹ and (O + λ)⁻¹: w and v are leverages. With w = ‖g‖² and v = 1, which suit errors
that are alike everywhere, quants of two small models had 2 to 12 % more KLD.
"""

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.gradients.needs import require_torch, torch_threads
from bitladder.calibrate.gradients.usable import check
from bitladder.engine.context import Floats
from bitladder.engine.model import Tokens
from bitladder.errors import UsageError
from bitladder.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

    from bitladder.calibrate.gradients.forward import TorchModel

CHECKED_TOKENS = 128
# Leverages need H and O before these are summed up: every so manieth chunk, of at least so many, is for that alone.
PILOTS, FEWEST = 4, 8
LEVERAGE_DAMPING = 0.1  # λ, of the mean diagonal


@dataclasses.dataclass(frozen=True)
class GradientMoments:
    """Of one weight, over `tokens` tokens.

    `inputs` float32 [n_in, n_in]: E[w xxᵀ], `outputs` float32 [n_out, n_out]: E[v ggᵀ] in squared nats, w and v
    leverages that average 1 (see above). With fewer than FEWEST chunks, and without outputs (never known of a head),
    w is ‖g‖² divided by its mean, and v = 1.
    `by_position` float32 [n_ctx]: the mean of ‖g‖² at each position of a chunk, divided by its mean over all.
    """

    name: str
    tokens: int
    inputs: Floats
    outputs: Floats | None
    by_position: Floats


def weighted_moments(
    path: str | os.PathLike[str],
    chunks: Tokens,
    *,
    names: Collection[str] | None = None,
    outputs: bool = True,
    memory: int = 4 << 30,
    draws: int = 1,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Iterator[GradientMoments]:
    """Yield the moments of a model's weights, in the order of the computation from the last to the first.

    Parameters: `chunks` int32 [chunks, n_ctx], each a sequence of its own. `names` of weights (None: all, the head
    included). `memory` bytes are used for moments, and as much again for expanded weights; what does not fit at once
    takes another pass over the chunks. `draws` of labels per position and chunk, with `seed`: the same seed, model,
    chunks and threads give the same moments. Raises BitladderError if torch is not installed, if the architecture is
    not known here, if torch's logits are not the library's (`check`), or for a name that is no matrix of the model.
    """
    require_torch()
    from bitladder.calibrate.gradients.forward import TorchModel

    with torch_threads(threads), TorchModel(path, memory=memory, threads=threads) as model:
        check(path, chunks[0, :CHECKED_TOKENS], threads=threads, ours=model)
        wanted = choose(model, names)
        groups = _groups(model, wanted, outputs, memory)
        with progress.task("gradients", len(groups) * len(chunks)) as bar:
            for group in groups:
                sums = {name: _Sums(model.shape(name), outputs and name != model.head) for name in group}

                def tap(
                    name: str, inputs: "torch.Tensor", gradients: "torch.Tensor", sums: dict[str, _Sums] = sums
                ) -> None:
                    sums[name].add(inputs, gradients)

                pilots = range(0, len(chunks), PILOTS) if len(chunks) >= FEWEST else range(0)
                for index in [*pilots, *(index for index in range(len(chunks)) if index not in pilots)]:
                    if index == 1 and pilots:
                        for one in sums.values():
                            one.use_leverages()
                    model.backward(chunks[index], group, tap, generator=chunk_generator(seed, index), draws=draws)
                    bar.advance()
                for name in group:
                    yield sums.pop(name).finish(name, chunks.shape[1])


def chunk_generator(seed: int, index: int) -> "torch.Generator":
    """The generator that draws the labels of chunk `index`: the same in every pass."""
    return cast("torch.Generator", require_torch().Generator().manual_seed(seed * 1_000_003 + index))


def choose(model: "TorchModel", names: Collection[str] | None) -> list[str]:
    """The names (None: of all matrices) from the last of the computation to the first. UsageError for an odd one."""
    if names is None:
        return model.matrices[::-1]
    odd = [name for name in names if name not in model.matrices]
    if odd:
        raise UsageError(f"{model.path.name} does not multiply by a weight called {odd[0]!r}")
    return [name for name in reversed(model.matrices) if name in names]


def _groups(model: "TorchModel", names: Sequence[str], outputs: bool, memory: int) -> list[list[str]]:
    """Weights whose moments fit into `memory` bytes together. Neighbours, so that a pass need not go deep for all."""
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


class _Sums:
    """What is added up for one weight.

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

    def use_leverages(self) -> None:
        """Start anew, and from here on weight tokens by the leverages that follow from what was seen so far."""
        if self.outputs is not None:
            self._inverses = _inverse(self.inputs), _inverse(self.outputs)
            self.inputs.zero_()
            self.outputs.zero_()
            self._totals = [0.0, 0.0]

    def add(self, inputs: "torch.Tensor", gradients: "torch.Tensor") -> None:
        """One sequence: inputs [length, n_in], gradients [length, n_out]."""
        squares = gradients.square().sum(1)
        of_inputs, of_outputs = squares, squares.new_ones(len(squares))
        if self._inverses is not None:
            for_inputs, for_outputs = self._inverses
            of_inputs = ((gradients @ for_outputs) * gradients).sum(1).clamp_min_(0)
            of_outputs = ((inputs @ for_inputs) * inputs).sum(1).clamp_min_(0)
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


def _inverse(sums: "torch.Tensor") -> "torch.Tensor":
    """Of what a sum of outer products is proportional to, damped."""
    import torch

    mean = sums.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damped = sums / mean + LEVERAGE_DAMPING * torch.eye(len(sums))
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
