"""What candidate errors of weights cost in KLD, to second order: the Fisher estimate from one backward pass.

With g the gradient of the log-probability of labels drawn from the model, an error ΔW adds to a sequence's KLD
½ E[(Σ_t g_tᵀ ΔW x_t)²], since Σ_t g_t x_tᵀ is the gradient of the sequence's log-probability with respect to W. If
errors at different tokens were independent this would be ½ Σ_t E[(g_tᵀ ΔW x_t)²]; where they add up (types with
minimums leave errors that correlate with the mean input) the first is several times the second.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.gradients.needs import require_torch, torch_threads
from bitladder.calibrate.gradients.usable import check
from bitladder.calibrate.gradients.weighted_moments import CHECKED_TOKENS, choose, chunk_generator
from bitladder.engine.context import Floats
from bitladder.engine.model import Tokens
from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

# An error ΔW, float32 [n_out, n_in], or what makes it when its turn comes.
Error = Floats | Callable[[], Floats]


@dataclasses.dataclass(frozen=True)
class FisherCost:
    """What one candidate adds to the mean KLD, nats per token.

    `sequence`: summed over each sequence before squaring, with its standard error; what to price with. `token`: squared
    token by token (None if not asked for).
    """

    sequence: float
    sequence_error: float
    token: float | None = None


def fisher_costs(
    path: str | os.PathLike[str],
    chunks: Tokens,
    candidates: Mapping[str, Mapping[str, Error]],
    *,
    tokenwise: bool = False,
    draws: int = 4,
    memory: int = 4 << 30,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, dict[str, FisherCost]]:
    """Estimate the cost of every candidate.

    Parameters: `chunks` int32 [chunks, n_ctx]; `candidates` by weight and by a key of the caller's (the type), each an
    error (rendered minus exact weights) or a function that returns it. Errors are held in `memory` bytes; what does not
    fit at once takes another pass over the chunks. `draws` of labels per chunk: the relative standard error of
    `sequence` is about sqrt(2 / (chunks × draws)). `tokenwise` costs as much as a multiplication by every candidate.
    Errors that are raised: as `weighted_moments`, and a candidate of another shape than its weight.
    """
    require_torch()
    from bitladder.calibrate.gradients.forward import TorchModel

    found: dict[str, dict[str, FisherCost]] = {}
    with torch_threads(threads), TorchModel(path, memory=memory, threads=threads) as model:
        check(path, chunks[0, :CHECKED_TOKENS], threads=threads, ours=model)
        groups: list[list[str]] = []
        room = 0
        for name in choose(model, candidates):
            size = 4 * math.prod(model.shape(name)) * (len(candidates[name]) + 1)
            if not groups or size > room:
                groups.append([])
                room = memory
            groups[-1].append(name)
            room -= size
        with progress.task("Fisher costs", len(groups) * len(chunks)) as bar:
            for group in groups:
                prices = {name: _Prices(name, candidates[name], model.shape(name), tokenwise) for name in group}

                def tap(
                    name: str, inputs: "torch.Tensor", gradients: "torch.Tensor", prices: dict[str, _Prices] = prices
                ) -> None:
                    prices[name].add(inputs, gradients)

                for index, chunk in enumerate(chunks):
                    model.backward(chunk, group, tap, generator=chunk_generator(seed, index), draws=draws)
                    bar.advance()
                found |= {name: price.finish(chunks.shape[1]) for name, price in prices.items()}
    return {name: found[name] for name in candidates}


class _Prices:
    """The candidates of one weight, and what has been added up for them."""

    def __init__(self, name: str, errors: Mapping[str, Error], shape: tuple[int, int], tokenwise: bool) -> None:
        import torch

        self._keys = list(errors)
        self._errors = torch.empty(len(errors), *shape)
        for place, error in zip(self._errors, errors.values(), strict=True):
            values = error() if callable(error) else error
            if values.shape != shape:
                raise BitladderError(f"an error of {name} has the shape {values.shape}, but the weight {shape}")
            place.copy_(torch.from_numpy(np.ascontiguousarray(values, np.float32)))
        self._tokenwise = tokenwise
        self._tokens = np.zeros(len(errors))
        self._sequences: list[npt.NDArray[np.float64]] = []

    def add(self, inputs: "torch.Tensor", gradients: "torch.Tensor") -> None:
        """One draw over one sequence: inputs [length, n_in], gradients [length, n_out]."""
        total = gradients.T @ inputs
        self._sequences.append((self._errors.flatten(1) @ total.flatten()).double().square().numpy())
        if self._tokenwise:
            for index, error in enumerate(self._errors):
                changes = ((inputs @ error.T) * gradients).sum(1)
                self._tokens[index] += float(changes.double().square().sum())

    def finish(self, length: int) -> dict[str, FisherCost]:
        """Costs per token from the sums."""
        costs = 0.5 * np.stack(self._sequences) / length
        count = len(costs)
        means = costs.mean(axis=0)
        errors = costs.std(axis=0, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(means), math.nan)
        tokens = 0.5 * self._tokens / (count * length)
        return {
            key: FisherCost(float(means[i]), float(errors[i]), float(tokens[i]) if self._tokenwise else None)
            for i, key in enumerate(self._keys)
        }
