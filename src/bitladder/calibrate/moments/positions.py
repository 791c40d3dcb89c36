"""What an error costs at the first token, at the next few, and at the rest: found by trying, in the loaded model.

Noise is added to what a weight puts out, at some positions of a chunk, and the divergence of the model's predictions
is measured. To second order it is ½σ² Σ_t E‖g_t‖² over those positions, g the gradient that the package `gradients`
computes: so the mean ‖g_t‖² of a class of positions is known up to a factor that all classes share. Three numbers per
weight are what most of the gain needs: where there is an attention sink it is nearly always the first token. No torch,
and any architecture and back end that the library runs.
"""

import collections
import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.engine.activations import NoisyOutputs
from bitladder.engine.context import Context
from bitladder.engine.decoding import Decoding
from bitladder.engine.model import Model, Tokens
from bitladder.gguf.names import block_of, kind_of
from bitladder.progress import SILENT, Progress

Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]

# Where classes of positions begin: the first token, those after it that a model may take for a sink too, the rest.
EDGES = (0, 1, 8)
LENGTH = 128
# Deviations of the noise, in units of an output's root mean square over the chunk. A second-order effect should be
# above the rounding of the library's own arithmetic (a KLD of some 10⁻⁷) and below what bends the model.
NOISE = 0.2
_TOO_MUCH, _TOO_LITTLE, _TRIES = 0.1, 1e-5, 4
_STEP = 4  # predictions at every fourth position are compared, after the first few
_BATCH = 512  # tokens decoded at once, about


def position_weights(
    path: str | os.PathLike[str],
    chunks: Tokens,
    *,
    edges: Sequence[int] = EDGES,
    length: int = LENGTH,
    blocks_together: int = 3,
    seed: int = 0,
    threads: int | None = None,
    gpu_layers: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Floats]:
    """Weights w_t of the positions of a chunk, by weight's name: float32 [n_ctx] each, with mean 1.

    Parameters: `chunks` int32 [chunks, n_ctx]. Their first `length` tokens are decoded, some chunks side by side, once
    per kind of weight, group of `blocks_together` neighbouring blocks, and class; `edges` are where classes of
    positions begin. The effect of one class on a later prediction hardly depends on how much later it is, so what is
    seen over `length` tokens is taken for all n_ctx. Weights of one group share their result. The head is not tried
    and not in the result: what an error of its output costs is known, 1 − Σp², and varies little. Raises BitladderError
    if the model does not load or cannot be disturbed.
    """
    n_ctx = chunks.shape[1]
    heads = chunks[:, : min(length, n_ctx)]
    together = min(len(heads), max(1, _BATCH // heads.shape[1]))
    classes = [np.arange(a, b) for a, b in itertools.pairwise([*edges, heads.shape[1]]) if a < b]
    noise = NoisyOutputs()
    size = together * heads.shape[1]
    decoding = Decoding(n_ctx=heads.shape[1], n_batch=size, n_ubatch=size, threads=threads)
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, ...], Sums] = {}
    amounts: dict[tuple[str, ...], float] = {}
    with (
        Model(path, gpu_layers=gpu_layers) as model,
        Context(model, decoding, n_seq=together, callback=noise) as context,
        progress.task("position weights", len(heads)) as bar,
    ):
        for start in range(0, len(heads), together):
            trial = _Trial(context, noise, heads[start : start + together])
            groups = _groups(noise.squares, blocks_together)
            for group in groups:
                klds, amounts[group] = trial.divergences(group, classes, amounts.get(group, NOISE), rng)
                found[group] = found.get(group, 0.0) + klds * trial.count
                bar.advance(trial.count / len(groups))
    profiles: dict[str, Floats] = {}
    for group, klds in found.items():
        profile = _profile(klds, [*edges[: len(klds)], n_ctx])
        profiles |= dict.fromkeys(group, profile)
    return profiles


def _profile(klds: Sums, edges: Sequence[int]) -> Floats:
    """The weight of each position, from the divergence that all positions of a class cause together."""
    profile = np.concatenate(
        [np.full(b - a, kld / (b - a)) for kld, (a, b) in zip(klds, itertools.pairwise(edges), strict=True)]
    )
    normed: Floats = (profile / max(profile.mean(), np.finfo(np.float64).tiny)).astype(np.float32)
    return normed


def _groups(names: Iterable[str], together: int) -> list[tuple[str, ...]]:
    """Weights of the same kind in neighbouring blocks."""
    groups: dict[tuple[str, int], list[str]] = collections.defaultdict(list)
    for name in names:
        block = block_of(name)
        if block is not None:
            groups[kind_of(name), block // together].append(name)
    return [tuple(group) for group in groups.values()]


class _Trial:
    """Decodes some sequences, int32 [count, length], again and again: as they are first, then disturbed."""

    def __init__(self, context: Context, noise: NoisyOutputs, tokens: Tokens) -> None:
        self._context = context
        self._noise = noise
        self._tokens = tokens
        self.count, self._length = tokens.shape
        some = np.arange(min(EDGES[-1], self._length))
        rest = np.arange(EDGES[-1] + _STEP - 1, self._length, _STEP)
        self._looked_at = np.concatenate([some, rest])
        # How many predictions each of those stands for.
        self._shares = np.concatenate(
            [np.full(len(some), 1.0), np.full(len(rest), (self._length - len(some)) / max(1, len(rest)))]
        )
        noise.measure()
        self._before = self._decode()
        self._probabilities = np.exp(self._before)
        # The first token's outputs can be hundreds of times the others': it does not count for the size of noise.
        self._sizes = {
            name: float(np.sqrt(squares.reshape(self.count, self._length)[:, 1:].mean()))
            for name, squares in noise.squares.items()
        }

    def divergences(
        self, group: Sequence[str], classes: Sequence[npt.NDArray[np.intp]], amount: float, rng: np.random.Generator
    ) -> tuple[Sums, float]:
        """KLD of each class for noise of one variance, divided by the square of `amount`, and the amount to use next.

        The amount is changed, and all classes are done again, while the sum is not in the range where it is to be
        trusted.
        """
        for attempt in range(_TRIES):
            klds = np.array([self._kld(group, part, amount, rng) for part in classes])
            total = klds.sum()
            if _TOO_LITTLE < total < _TOO_MUCH or attempt + 1 == _TRIES:
                break
            amount *= 3.0 if total <= _TOO_LITTLE else 0.3
        return klds / amount**2, amount

    def _kld(
        self, group: Sequence[str], positions: npt.NDArray[np.intp], amount: float, rng: np.random.Generator
    ) -> float:
        rows = (np.arange(self.count)[:, None] * self._length + positions).reshape(-1)
        self._noise.disturb({name: amount * self._sizes[name] for name in group}, rows, rng)
        after = self._decode()
        klds = (self._probabilities * (self._before - after)).sum(axis=-1, dtype=np.float64)
        return float((klds @ self._shares).mean() / self._length)

    def _decode(self) -> Floats:
        """Log-probabilities at the positions that are looked at, float32 [count, n, n_vocab]."""
        count, length = self._tokens.shape
        self._context.clear()
        self._context.decode(
            self._tokens.reshape(-1),
            np.tile(np.arange(length, dtype=np.int32), count),
            np.repeat(np.arange(count, dtype=np.int32), length),
            np.ones(count * length, np.bool_),
        )
        logits = self._context.logits().reshape(count, length, -1)[:, self._looked_at]
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits
