"""Second moments of inputs, weighted by what an error at each token costs, and of the gradients of outputs.

To second order an error ΔW of a weight matrix raises the model's KLD by ½ E[(gᵀ ΔW x)²] per token: x is the matrix's
input and g the gradient, with respect to its output, of the log-probability of labels that are drawn from the model.
(The second derivative of the KLD at its minimum is the Fisher information of such labels.) Were g and x independent,
and g alike in all directions, this would be ½ tr(ΔW H ΔWᵀ) with H = E[xxᵀ]. They are not: at an attention sink ‖g‖² is
hundreds of times its mean. Hence H = E[‖g‖² xxᵀ] / E[‖g‖²] and, for the rows, E[ggᵀ]; YAQA (arXiv 2505.22988) calls
the pair a Kronecker-factored sketch of the Hessian.
"""

import dataclasses
import os
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from bitladder.engine.context import Floats
from bitladder.engine.model import Tokens
from bitladder.errors import UsageError
from bitladder.gradients.check import check
from bitladder.gradients.needs import require_torch, torch_threads
from bitladder.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

    from bitladder.gradients.model import TorchModel

CHECKED_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class GradientMoments:
    """Of one weight, over `tokens` tokens.

    `inputs` float32 [n_in, n_in]: E[w xxᵀ], w = ‖g‖² divided by its mean, so that weights average 1.
    `outputs` float32 [n_out, n_out]: E[ggᵀ] in squared nats, or None where it was not asked for (never of a head).
    `power`: the mean of ‖g‖²; ½ · power · tr(ΔW inputs ΔWᵀ) estimates the KLD, in nats per token, that ΔW adds, if
    all outputs matter alike. `by_position` float32 [n_ctx]: the mean w at each position of a chunk.
    """

    name: str
    tokens: int
    inputs: Floats
    outputs: Floats | None
    power: float
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
    from bitladder.gradients.model import TorchModel

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

                for index, chunk in enumerate(chunks):
                    model.backward(chunk, group, tap, generator=chunk_generator(seed, index), draws=draws)
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
        size = 4 * (n_in * n_in + (n_out * n_out if outputs and name != model.head else 0))
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

    def add(self, inputs: "torch.Tensor", gradients: "torch.Tensor") -> None:
        """One sequence: inputs [length, n_in], gradients [length, n_out]."""
        import torch

        norms = torch.linalg.vector_norm(gradients, dim=1)
        scaled = inputs * norms[:, None]
        self.inputs.addmm_(scaled.T, scaled)
        if self.outputs is not None:
            self.outputs.addmm_(gradients.T, gradients)
        self.powers.append(norms.double().square().numpy())

    def finish(self, name: str, length: int) -> GradientMoments:
        """Means from sums."""
        profile = np.mean(np.stack(self.powers), axis=0)
        tokens = length * len(self.powers)
        power = float(profile.mean())
        total = max(power * tokens, np.finfo(np.float64).tiny)
        return GradientMoments(
            name,
            tokens,
            (self.inputs / total).numpy(),
            None if self.outputs is None else (self.outputs / tokens).numpy(),
            power,
            (profile / max(power, np.finfo(np.float64).tiny)).astype(np.float32),
        )
