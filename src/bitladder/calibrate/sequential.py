"""Second moments of a model that is being quantized: each group of weights sees what those before it, already
replaced, put out.

Rounded weights change the inputs of everything after them. Moments of the full-precision model know nothing of that;
these do, and rounding can then make up for errors of earlier blocks: with x the input in full precision and x̃ the one
that the weight will really get, it should make ‖W x − Ŵ x̃‖² small (GPTAQ, arXiv 2504.02692, calls it asymmetric
calibration). That is the plain problem for x̃ with another target; see `asymmetric_target`.

The library cannot start in the middle of a model. Each group of weights takes a pass over the chunks from the first
block to the group's last input: G groups cost (G + 1)/2 passes through the whole model, as many again with `cross`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.inputs import Experts, WeightInput, model_inputs, watch_chunks
from bitladder.calibrate.moments.collector import MomentCollector
from bitladder.calibrate.moments.entries import EntryPart, MomentEntry, make_entries
from bitladder.calibrate.moments.moments_file import Floats, unpack_triangle
from bitladder.closing import Closing
from bitladder.engine.context import Context
from bitladder.engine.decoding import Decoding
from bitladder.engine.model import Model, Tokens
from bitladder.engine.observe import Multiplication, WatchingUntilSatisfied
from bitladder.engine.weights import Weights
from bitladder.errors import BitladderError
from bitladder.gguf.names import block_of
from bitladder.progress import SILENT, Progress


@dataclasses.dataclass(frozen=True)
class ShiftedMoment:
    """Second moments of one weight's inputs x̃ behind replaced weights.

    `inputs` float32 [matrices, n_in, n_in]: E[w x̃x̃ᵀ]; `counts` int64 [matrices] tokens. `cross` float32 [n_in, n_in]:
    E[w x x̃ᵀ], x the input in full precision; None if it was not asked for, and of experts (a token may go to others).
    """

    inputs: Floats
    counts: npt.NDArray[np.int64]
    cross: Floats | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Moments of one group of weights, by name, and the function that replaces a weight by float32 [rows, n_in]."""

    moments: Mapping[str, ShiftedMoment]
    replace: Callable[[str, Floats], None]


def sequential_moments(
    path: str | os.PathLike[str], chunks: Tokens, *, blocks: int = 1, by_input: bool = False, **options: object
) -> Iterator[Group]:
    """Yield the moments of one group of weights after the other; replace weights before asking for the next group.

    Parameters: as of SequentialModel and its `groups`. Raises BitladderError as they do.
    """
    with SequentialModel(path, chunks, **options) as model:  # type: ignore[arg-type]
        for names in model.groups(blocks, by_input=by_input):
            yield Group(model.collect(names), model.replace)


class SequentialModel(Closing):
    """A loaded model whose weights can be replaced, and the moments of its inputs as they are now.

    Parameters: `path` a model in F32 or F16 (weights are kept in its types); `chunks` int32 [chunks, n_ctx]; `weights`
    of tokens by weight's name, [n_ctx] or [chunks, n_ctx] (none: all alike); `cross` collects E[w x x̃ᵀ] too, for which
    the model is loaded a second time; `n_ubatch` tokens are computed at once. Memory is that of one group's sums, see
    `groups`. `model` is the loaded model, to measure with. Raises BitladderError if it does not load.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        chunks: Tokens,
        *,
        weights: Mapping[str, npt.NDArray[np.floating]] | None = None,
        cross: bool = False,
        n_ubatch: int = 512,
        threads: int | None = None,
        gpu_layers: int = 0,
        progress: Progress = SILENT,
    ) -> None:
        self._chunks, self._weights = chunks, weights
        self._n_ubatch, self._threads, self._progress = n_ubatch, threads, progress
        self._exact: Model | None = None
        # Blocks that are not repacked are multiplied alike in both, so that what was not replaced gives equal inputs.
        self.model = Model(path, mmap=False, repack=False, gpu_layers=gpu_layers)
        try:
            self._exact = Model(path, repack=False, gpu_layers=gpu_layers) if cross else None
            self._inputs = model_inputs(self.model, threads)
            self._handles = Weights(self.model)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the models."""
        self.model.close()
        if self._exact:
            self._exact.close()

    def groups(self, blocks: int = 1, *, by_input: bool = False) -> list[list[str]]:
        """All weights in the order of the computation: so many neighbouring blocks together, and the head last.

        With `by_input` each input is a group (q, k and v; output; gate and up; down): rounding then knows of errors
        within a block too, for about four times the passes. Raises BitladderError for less than one block.
        """
        if blocks < 1:
            raise BitladderError(f"a group has at least one block, not {blocks}")
        if by_input:
            return [list(one.names) for one in self._inputs]
        found: dict[int, list[str]] = {}
        for one in self._inputs:
            for name in one.names:
                block = block_of(name)
                found.setdefault(-1 if block is None else block // blocks, []).append(name)
        head = found.pop(-1, [])
        return [*(found[number] for number in sorted(found)), *([head] if head else [])]

    def cost(self, groups: Sequence[Sequence[str]]) -> float:
        """What collecting these groups costs, in passes through all blocks (of this model; `cross` doubles it)."""
        order = {name: index for index, one in enumerate(self._inputs) for name in one.names}
        return sum((max(order[name] for name in names) + 1) / len(self._inputs) for names in groups)

    def replace(self, name: str, values: Floats) -> None:
        """Put other values, float32 [rows, n_in], in a weight's place, rounded to the type that the model has for it.

        Raises BitladderError for a weight that the model does not use, or another size.
        """
        self._handles.set(name, values)

    def collect(self, names: Sequence[str]) -> dict[str, ShiftedMoment]:
        """The moments of these weights' inputs, through the model as it is now.

        Raises BitladderError for a name that the model does not multiply by, or inputs that are not finite.
        """
        wanted = _chosen(self._inputs, names, self.model.path.name)
        entries = make_entries(wanted, self._weights or {}, self._chunks.shape[1])
        parts = [EntryPart(entry, 0, entry.input.matrices) for entry in entries]
        plain = MomentCollector(parts)
        pair = None
        if self._exact:
            pair = _Pair(plain, entries, self._exact, self._chunks, self._n_ubatch, self._threads)
        what = names[0].removesuffix(".weight") + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        try:
            with self._progress.task(f"moments of {what}", len(self._chunks)) as bar:
                decoding = Decoding(n_ubatch=self._n_ubatch, threads=self._threads)
                for _ in watch_chunks(self.model, self._chunks, pair or plain, decoding):
                    bar.advance()
        finally:
            if pair:
                pair.close()
        found: dict[str, ShiftedMoment] = {}
        for adding in plain.parts:
            entry = adding.part.entry
            inputs = np.stack([unpack_triangle(packed) for packed in adding.packed()])
            cross = pair.mean(entry) if pair else None
            found |= dict.fromkeys(entry.names, ShiftedMoment(inputs, adding.counts, cross))
        return found


def _chosen(inputs: Sequence[WeightInput], names: Sequence[str], where: str) -> list[WeightInput]:
    """The inputs of these weights only."""
    known = {name for one in inputs for name in one.names}
    for name in names:
        if name not in known:
            raise BitladderError(f"{where} does not multiply by a weight called {name!r}; see bitladder recipe show")
    kept = ((one, tuple(name for name in one.names if name in names)) for one in inputs)
    return [dataclasses.replace(one, names=some) for one, some in kept if some]


class _Capture:
    """Keeps the inputs of some weights in one computation."""

    def __init__(self, leaders: Sequence[str]) -> None:
        self._leaders = leaders
        self.found: dict[str, Floats] = {}

    def wants(self, seen: Multiplication) -> bool:
        return seen.weight in self._leaders and seen.weight not in self.found

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        self.found[seen.weight] = inputs.copy()

    def satisfied(self) -> bool:
        return len(self.found) == len(self._leaders)


class _Pair(Closing):
    """A MomentCollector, and beside it E[w x x̃ᵀ] with x from another model, which is decoded in step."""

    def __init__(
        self,
        plain: MomentCollector,
        entries: Sequence[MomentEntry],
        exact: Model,
        chunks: Tokens,
        n_ubatch: int,
        threads: int | None,
    ) -> None:
        self._plain, self._chunks = plain, chunks
        self._entries: dict[str, list[MomentEntry]] = {}
        dense: list[WeightInput] = []
        for entry in entries:
            if not entry.input.experts and entry.input.matrices == 1:
                self._entries.setdefault(entry.input.leader, []).append(entry)
                dense.append(entry.input)
        self._sums = {
            entry.name: np.zeros((entry.input.width, entry.input.width)) for entry in entries if entry.input in dense
        }
        self._capture = _Capture(list(self._entries))
        step = min(n_ubatch, chunks.shape[1])
        decoding = Decoding(n_ctx=chunks.shape[1], n_batch=step, n_ubatch=step, threads=threads)
        self._context = Context(exact, decoding, callback=WatchingUntilSatisfied(self._capture))
        self._at: tuple[int, slice] = (0, slice(0))
        self._tokens = 0

    def close(self) -> None:
        self._context.close()

    def begin(self, chunk: int, first: int, count: int) -> None:
        """Decode the same tokens with the exact model first."""
        self._plain.begin(chunk, first, count)
        self._at = chunk, slice(first, first + count)
        if not self._entries:
            return
        if not first:
            self._context.clear()
        self._capture.found.clear()
        positions = np.arange(first, first + count, dtype=np.int32)
        tokens = self._chunks[chunk, self._at[1]]
        self._context.decode(tokens, positions, np.zeros(count, np.int32), np.ones(count, np.bool_))
        self._tokens += count

    def wants(self, seen: Multiplication) -> bool:
        return self._plain.wants(seen)

    def satisfied(self) -> bool:
        return self._plain.satisfied()

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        self._plain.see(seen, inputs, experts)
        chunk, where = self._at
        for entry in self._entries.get(seen.weight, []):
            exact = self._capture.found[seen.weight][0]
            if entry.profile is not None:
                profile = entry.profile if entry.profile.ndim == 1 else entry.profile[chunk]
                exact = exact * profile[where, None]
            self._sums[entry.name] += exact.T @ inputs[0]

    def mean(self, entry: MomentEntry) -> Floats | None:
        """E[w x x̃ᵀ] of an entry, or None if it is not collected."""
        sums = self._sums.get(entry.name)
        return None if sums is None else (sums / max(self._tokens, 1)).astype(np.float32)


def asymmetric_target(weights: Floats, inputs: Floats, cross: Floats, damping: float = 1.0) -> Floats:
    """The weights that, given x̃, come nearest to what the exact ones give for x: round these instead, with E[x̃x̃ᵀ].

    E‖W x − Ŵ x̃‖² = E‖(W* − Ŵ) x̃‖² + what Ŵ cannot change, with W* = W C H̃⁻¹, C = E[x x̃ᵀ] and H̃ = E[x̃x̃ᵀ]. Damped
    by a share of the mean of H̃'s diagonal, and written as a correction, W* = W + W (C − H̃)(H̃ + λI)⁻¹: where nothing
    is known it is W. Most of x̃ − x is noise, for the sake of which the plain regression takes weight from every
    direction in which inputs vary little, as much as rounding takes; a damping of 1 forgoes that.
    Parameters: weights [n_out, n_in], inputs and cross [n_in, n_in]; returns float32 [n_out, n_in].
    Raises BitladderError if sizes do not fit or moments are not finite.
    """
    width = weights.shape[1]
    if inputs.shape != (width, width) or cross.shape != (width, width):
        raise BitladderError(f"second moments of {inputs.shape} and {cross.shape} do not fit rows of {width}")
    exact = inputs.astype(np.float64)
    scale = float(exact.diagonal().mean())
    if not (np.isfinite(exact).all() and np.isfinite(cross).all()):
        raise BitladderError("second moments are not finite; collect them again")
    if scale <= 0:
        return weights.astype(np.float32)
    exact[np.diag_indices(width)] += damping * scale
    change = np.linalg.solve(exact, (cross.astype(np.float64) - inputs).T).T
    return (weights + weights @ change).astype(np.float32)
