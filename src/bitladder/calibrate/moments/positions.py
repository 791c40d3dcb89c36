"""What an error costs at the first token of a chunk, at the next few, and at the rest: measured in the loaded model.

Noise is added to what a weight puts out, at some positions of a chunk, and the divergence of the model's predictions
is measured. To second order it is ½σ² Σ_t E‖g_t‖² over those positions, with g the gradient that the package
`gradients` computes. So the mean ‖g_t‖² of a class of positions is known up to a factor that all classes share. Three
numbers for each weight are most of what is needed: an attention sink is nearly always the first token. This needs no
torch, and works for any architecture and back end that the library runs.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.inputs import Floats, decode_columns
from bitladder.engine import Context, Decoding, Model, NoisyOutputs, Tokens
from bitladder.errors import overflow
from bitladder.gguf import block_of, kind_of
from bitladder.keys import Algorithm
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress
from bitladder.text import spread_evenly

Sums = npt.NDArray[np.float64]

# Where classes of positions begin: the first token, those after it that a model may take for a sink too, the rest.
EDGES = (0, 1, 8)
# A divergence between these is trusted: above the rounding of the library's own arithmetic (some 10⁻⁷), below what
# bends the model. The noise is changed at most so often until it is.
_MOST, _LEAST, _TRIES = 0.1, 1e-5, 4
_STEP = 4  # predictions at every fourth position are compared, after the first few
_BATCH = 512  # tokens decoded at once, about

POSITIONS = Algorithm("weights of positions", ("noise at the first token, at the next seven, and at the rest",))


@dataclasses.dataclass(frozen=True)
class PositionOptions(Options):
    """How the weights of positions are measured."""

    tried_chunks: int = option(8, least=1, help="Chunks that are tried, from all over those that are read.")
    length: int = option(128, least=1, help="Tokens of each chunk that are decoded, from its beginning.")
    blocks_together: int = option(3, least=1, help="Neighbouring blocks whose weights of a kind are tried together.")
    noise: float = option(
        0.2, help="Standard deviation of the noise that is tried first, as a share of an output's root mean square."
    )
    seed: int = option(0, help="Seed of the noise.")


@POSITIONS.entry
def position_weights(
    path: str | os.PathLike[str],
    chunks: Tokens,
    *,
    options: PositionOptions | None = None,
    decoding: Decoding | None = None,
    progress: Progress = SILENT,
) -> dict[str, Floats]:
    """What the token at each position of a chunk counts, for each weight of a block.

    Some chunks are decoded side by side, once for each kind of weight, group of neighbouring blocks, and class of
    positions. The effect of a class on a later prediction hardly depends on how much later the prediction is. So the
    first tokens of a chunk tell of all. Weights of one group share their result. The head is not tried: the cost of an
    error of its output is known, 1 − Σp², and varies little.

    Parameters:
        path: the model.
        chunks: int32 [chunks, n_ctx].
        options: how much is tried.
        decoding: its `threads` and `gpu_layers` are used.
        progress: hears of the work.

    Returns:
        float32 [n_ctx] with mean 1, by weight.

    Raises:
        BitladderError: the model does not load, or noise cannot be added to its outputs.
    """
    options, decoding = options or PositionOptions(), decoding or Decoding()
    n_ctx = chunks.shape[1]
    tried = chunks[spread_evenly(len(chunks), min(options.tried_chunks, len(chunks)))]
    heads = tried[:, : min(options.length, n_ctx)]
    together = min(len(heads), max(1, _BATCH // heads.shape[1]))
    classes = [np.arange(a, b) for a, b in itertools.pairwise([*EDGES, heads.shape[1]]) if a < b]
    size = together * heads.shape[1]
    side_by_side = Decoding(n_ctx=heads.shape[1], n_batch=size, n_ubatch=size, threads=decoding.threads)
    noise = NoisyOutputs()
    rng = np.random.default_rng(options.seed)
    totals: dict[tuple[str, ...], Sums] = {}
    amounts: dict[tuple[str, ...], float] = {}
    with (
        Model(path, gpu_layers=decoding.gpu_layers) as model,
        Context(model, side_by_side, n_seq=together, callback=noise) as context,
        progress.task("position weights", len(heads)) as bar,
    ):
        for start in range(0, len(heads), together):
            trial = _NoiseTrial(context, noise, heads[start : start + together])
            groups = _groups(noise.squares, options.blocks_together)
            for group in groups:
                klds, amounts[group] = trial.divergences(group, classes, amounts.get(group, options.noise), rng)
                totals[group] = totals.get(group, 0.0) + klds * trial.count
                bar.advance(trial.count / len(groups))
    profiles: dict[str, Floats] = {}
    for group, klds in totals.items():
        profile = _profile(klds, [*EDGES[: len(klds)], n_ctx])
        profiles |= dict.fromkeys(group, profile)
    return profiles


def _profile(klds: Sums, edges: Sequence[int]) -> Floats:
    """The weight of each position, from the divergence that all positions of a class cause together.

    Example:
        >>> _profile(np.array([5.0, 3.0]), [0, 1, 4]).tolist()
        [2.5, 0.5, 0.5, 0.5]
    """
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


class _NoiseTrial:
    """Decodes some sequences, int32 [count, length], many times: first as they are, then with noise."""

    def __init__(self, context: Context, noise: NoisyOutputs, tokens: Tokens) -> None:
        self._context = context
        self._noise = noise
        self._tokens = tokens
        self.count, self._length = tokens.shape
        first = np.arange(min(EDGES[-1], self._length))
        rest = np.arange(EDGES[-1] + _STEP - 1, self._length, _STEP)
        self._compared = np.concatenate([first, rest])
        # How many predictions each of those stands for.
        self._shares = np.concatenate(
            [np.full(len(first), 1.0), np.full(len(rest), (self._length - len(first)) / max(1, len(rest)))]
        )
        noise.measure(tokens.size)
        self._before = self._decode()
        self._probabilities = np.exp(self._before)
        # The first token's outputs can be hundreds of times the others', so it does not count for the size of noise.
        self._sizes = {
            name: float(np.sqrt(squares.reshape(self.count, self._length)[:, 1:].mean()))
            for name, squares in noise.squares.items()
        }

    def divergences(
        self, group: Sequence[str], classes: Sequence[npt.NDArray[np.intp]], amount: float, rng: np.random.Generator
    ) -> tuple[Sums, float]:
        """KLD of each class for noise of one variance, divided by the square of `amount`; and the amount to use next.

        While the sum is outside the range that is trusted, the amount is changed and all classes are done again.
        """
        for attempt in range(_TRIES):
            klds = np.array([self._kld(group, part, amount, rng) for part in classes])
            total = klds.sum()
            if _LEAST < total < _MOST or attempt + 1 == _TRIES:
                break
            amount *= 3.0 if total <= _LEAST else 0.3
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
        """Log-probabilities at the positions that are compared, float32 [count, n, n_vocab]."""
        self._context.clear()
        decode_columns(self._context, self._tokens, 0, self._length)
        logits = self._context.logits().reshape(self.count, self._length, -1)[:, self._compared]
        if not np.isfinite(logits).all():
            raise overflow(f"the logits of {self._context.model.name} are")
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logits
