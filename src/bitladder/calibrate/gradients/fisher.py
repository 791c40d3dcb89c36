"""What candidate errors of weights cost in KLD, to second order: the Fisher estimate from one backward pass.

With g the gradient of the log-probability of labels drawn from the model, an error ΔW adds to a sequence's KLD
½ E[(Σ_t g_tᵀ ΔW x_t)²], since Σ_t g_t x_tᵀ is the gradient of the sequence's log-probability with respect to W. If
errors at different tokens were independent this would be ½ Σ_t E[(g_tᵀ ΔW x_t)²]. Where they add up (types with
minimums leave errors that correlate with the mean input) the first is several times the second.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.gradients.usable import check_logits, require_torch, torch_threads
from bitladder.engine import Floats, Tokens, threads_available
from bitladder.errors import BitladderError
from bitladder.keys import Algorithm
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

    from bitladder.calibrate.gradients.torch_weights import Routed

# An error ΔW, float32 [n_out, n_in], or a function that makes it when it is needed.
Error = Floats | Callable[[], Floats]

FISHER: Algorithm = Algorithm(
    "Fisher costs",
    (
        "errors are summed over a sequence before they are squared",
        "the forward pass is that of transformers' modules",
        "errors of all experts of a tensor are summed",
        "products do not depend on the number of threads",
    ),
)


@dataclasses.dataclass(frozen=True)
class FisherOptions(Options):
    """How costs are estimated."""

    draws: int = option(4, least=1, help="Labels that are drawn for each position.")
    seed: int = option(0, help="Seed of the labels.")
    tokenwise: bool = option(False, help="Costs squared token by token too, for comparison.")


@dataclasses.dataclass(frozen=True)
class FisherCost:
    """What one candidate adds to the mean KLD, nats per token.

    Parameters:
        sequence: with errors summed over each sequence before they are squared: what to price with.
        sequence_error: its standard error.
        token: with errors squared token by token; None without `tokenwise`.
    """

    sequence: float
    sequence_error: float
    token: float | None = None


@FISHER.entry
def fisher_costs(
    path: str | os.PathLike[str],
    chunks: Tokens,
    candidates: Mapping[str, Mapping[str, Error]],
    *,
    options: FisherOptions | None = None,
    memory: int = 4 << 30,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, dict[str, FisherCost]]:
    """Estimates the cost of every candidate.

    Parameters:
        path: the model.
        chunks: sequences, int32 [chunks, n_ctx].
        candidates: errors (rendered minus exact weights, those of all experts below each other) by weight and by a key
            of the caller's, such as the type.
        options: the relative standard error of `sequence` is about sqrt(2 / (chunks × draws)). `tokenwise` costs as
            much as a multiplication by every candidate.
        memory: bytes for errors. What does not fit at once takes another pass over the chunks.
        threads: threads of the CPU.
        progress: hears of the work.

    Raises:
        BitladderError: as `weighted_moments`; or a candidate has another shape than its weight.
    """
    one_each = {"initializer": require_torch().set_num_threads, "initargs": (1,)}
    from bitladder.calibrate.gradients.forward import TorchModel
    from bitladder.calibrate.gradients.gradient_pass import chunk_generator
    from bitladder.calibrate.gradients.segments import choose_matrices

    options = options or FisherOptions()
    costs: dict[str, dict[str, FisherCost]] = {}
    with (
        torch_threads(threads),
        TorchModel(path, memory=memory, threads=threads) as model,
        ThreadPoolExecutor(threads or threads_available(), **one_each) as products,
    ):
        model.set_repeatable(products)
        check_logits(path, model.checked(chunks[0]), threads=threads, ours=model)
        groups: list[list[str]] = []
        names, room = choose_matrices(model, candidates), 0
        shapes = {name: (model.experts(name) * model.shape(name)[0], model.shape(name)[1]) for name in names}
        for name in names:
            size = 4 * math.prod(shapes[name]) * (len(candidates[name]) + 1)
            if not groups or size > room:
                groups.append([])
                room = memory
            groups[-1].append(name)
            room -= size
        with progress.task("Fisher costs", len(groups) * len(chunks)) as bar:
            for group in groups:
                sums = {name: _CostSums(name, candidates[name], shapes[name], options.tokenwise) for name in group}

                def tap(
                    name: str,
                    inputs: "torch.Tensor",
                    gradients: "torch.Tensor",
                    routed: "Routed | None",
                    sums: dict[str, _CostSums] = sums,
                ) -> None:
                    sums[name].add(inputs, gradients, routed)

                for index, chunk in enumerate(chunks):
                    generator = chunk_generator(options.seed, index)
                    model.backward(chunk, group, tap, generator=generator, draws=options.draws)
                    bar.advance()
                costs |= {name: weight_sums.finish(chunks.shape[1]) for name, weight_sums in sums.items()}
    return {name: costs[name] for name in candidates}


class _CostSums:
    """The candidates of one weight, and the sums for each.

    Example:
        >>> import torch
        >>> sums = _CostSums("blk.0.attn_v.weight", {"q4_0": np.ones((1, 1), np.float32)}, (1, 1), True)
        >>> sums.add(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]]))
        >>> cost = sums.finish(2)["q4_0"]  # ½ (1 + 2)² / 2 and ½ (1² + 2²) / 2
        >>> cost.sequence, cost.token
        (2.25, 1.25)
    """

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

    def add(self, inputs: "torch.Tensor", gradients: "torch.Tensor", routed: "Routed | None" = None) -> None:
        """Adds one draw over one sequence: inputs [rows, n_in], gradients [rows, n_out]."""
        from bitladder.calibrate.gradients.torch_weights import weight_gradient

        total = weight_gradient(inputs, gradients, routed)
        with torch_threads(1):  # so that sums have one order
            products = self._errors.flatten(1) @ total.flatten()
        self._sequences.append(products.double().square().numpy())
        if not self._tokenwise:
            return
        for index, error in enumerate(self._errors):
            changes = _changes(inputs, gradients, error, routed)
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


def _changes(
    inputs: "torch.Tensor", gradients: "torch.Tensor", error: "torch.Tensor", routed: "Routed | None"
) -> "torch.Tensor":
    """gᵀ ΔW x of each token, [tokens]; of experts the sum over those of the token."""
    import torch

    if routed is None:
        return ((inputs @ error.T) * gradients).sum(1)
    changes, matrices = gradients.new_zeros(int(routed.tokens.max()) + 1), torch.split(error, gradients.shape[1])
    for expert, rows in routed.parts():
        changes.index_add_(0, routed.tokens[rows], ((inputs[rows] @ matrices[expert].T) * gradients[rows]).sum(1))
    return changes
