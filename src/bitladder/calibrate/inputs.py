"""The inputs of a model's weights: which there are, which weights share one, and the decoding that shows them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.sum_order import Turn, Turns
from bitladder.engine import (
    Context,
    Decoding,
    Lane,
    Lanes,
    Model,
    Multiplication,
    SatisfiedObserver,
    Tokens,
    WatchingUntilSatisfied,
    lane_count,
)
from bitladder.errors import BitladderError, UsageError, overflow
from bitladder.gguf import in_main_block

Floats = npt.NDArray[np.float32]
Experts = npt.NDArray[np.int32]
HEADS = ("output.weight", "token_embd.weight")  # the second one where the head is tied to the embeddings
# Tokens of the shortest computation whose dense inputs count, in llama-imatrix and here. A chunk is never shorter.
MIN_CALIBRATION_CTX = 16


@dataclasses.dataclass(frozen=True)
class WeightInput:
    """An input that one or more weights multiply. It is watched at the first of them.

    Parameters:
        names: the weights, in the order of the computation.
        width: numbers in a row of the input, n_in.
        matrices: 1; the number of experts; or the number of slices of a weight with three dimensions.
        experts: whether each token goes to some of the matrices only. Slices see every token.
    """

    names: tuple[str, ...]
    width: int
    matrices: int
    experts: bool

    @property
    def leader(self) -> str:
        """The weight at which the input is watched."""
        return self.names[0]


class _Survey:
    """An observer that notes every multiplication and looks at no input."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int, bool], list[Multiplication]] = {}

    def wants(self, seen: Multiplication) -> bool:
        if in_main_block(seen.weight) or seen.weight in HEADS:
            key = (seen.input_id, seen.shape[2] * seen.shape[3], seen.experts)
            self.seen.setdefault(key, []).append(seen)
        return False

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        raise AssertionError("a survey wants no input")


def model_inputs(model: Model, threads: int | None = None) -> list[WeightInput]:
    """The inputs of all weights of blocks and of the head, in the order of the computation.

    One token is decoded to see the graph. A weight that is multiplied twice has the input that it meets first.

    Raises:
        BitladderError: the model multiplies by no weight of a block.
    """
    survey = _Survey()
    with Context(model, Decoding(n_ctx=32, threads=threads), observer=survey) as context:
        context.decode([max(model.bos, 0)], [0], [0], [True])
    inputs, known = [], set[str]()
    for (_, matrices, experts), multiplications in survey.seen.items():
        names = tuple(dict.fromkeys(seen.weight for seen in multiplications if seen.weight not in known))
        known.update(names)
        if names:
            inputs.append(WeightInput(names, multiplications[0].shape[0], matrices, experts))
    if not inputs:
        raise BitladderError(f"{model.name} multiplies by no weight of a block: nothing can be collected")
    return inputs


class ChunkObserver(SatisfiedObserver, Protocol):
    """An observer that hears which tokens come next. It wants an input at most once in a computation, or keeps it."""

    def begin(self, first: int, count: int) -> None:
        """The next computation has the tokens first … first+count−1 of a chunk, in order."""

    def take(self) -> Any:
        """What it kept of the chunk."""


def chunks_at_once(decoding: Decoding, n_ctx: int) -> int:
    """Chunks of `n_ctx` tokens that `watch_chunks` decodes side by side.

    A chunk of several computations is past an input only in its last one: the next chunk would wait for too long.
    """
    return lane_count(decoding) if decoding.n_ubatch >= n_ctx else 1


def watch_chunks(
    model: Model,
    chunks: Tokens,
    observers: Callable[[], ChunkObserver],
    decoding: Decoding,
    *,
    done: int = 0,
) -> Iterator[tuple[int, list[Any]]]:
    """Decodes chunks for observers.

    Chunks are decoded side by side, but each input is shown in the order of the chunks: what observers add up does not
    depend on the number of threads. Each computation ends with the last input that its observer waits for.

    Parameters:
        model: the loaded model.
        chunks: int32 [chunks, n_ctx].
        observers: makes an observer, which is shown the inputs of one chunk after the other. Observers share what they
            add up. No two of them are shown the same input at once.
        decoding: its `n_ubatch` is the number of tokens of a computation; its `threads` and `gpu_layers` are used.
        done: chunks to skip.

    Yields:
        The number of chunks that are done, of which the observers were shown all inputs and no input of a later one,
        and what observers kept of each chunk since the last time.
    """
    n_ctx = chunks.shape[1]
    step = min(decoding.n_ubatch, n_ctx)
    most = chunks_at_once(decoding, n_ctx)
    decoding = decoding.replace(n_ctx=n_ctx, n_batch=step, n_ubatch=step)
    seen = [_InTurn(observers()) for _ in range(most)]
    callbacks = iter([WatchingUntilSatisfied(each) for each in seen])
    with Lanes(model, decoding, callback=lambda: next(callbacks), most=most) as lanes:
        while done < len(chunks):
            turns = Turns(range(done, min(done + len(lanes), len(chunks))))

            def read(lane: Lane, number: int, turns: Turns = turns) -> Any:
                with turns.of(turns.chunks[number]) as turn:
                    lane.context.clear()
                    for first in range(0, n_ctx, step):
                        stop = min(first + step, n_ctx)
                        seen[lane.number].begin(first, stop - first, turn, last=stop == n_ctx)
                        decode_columns(lane.context, chunks[turn.chunk : turn.chunk + 1], first, stop)
                    return seen[lane.number].take()

            kept = list(lanes.each(len(turns.chunks), read))
            done = turns.chunks.stop
            yield done, kept


class _InTurn:
    """An observer that shows another one its inputs when it is the chunk's turn."""

    def __init__(self, observer: ChunkObserver) -> None:
        self._observer = observer
        self.wants, self.satisfied, self.take = observer.wants, observer.satisfied, observer.take

    def begin(self, first: int, count: int, turn: Turn, *, last: bool) -> None:
        """As of `ChunkObserver`; and whether this is the last computation of the chunk."""
        self._turn, self._last = turn, last
        self._observer.begin(first, count)

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Waits for the turn."""
        self._turn.wait(seen.weight)
        self._observer.see(seen, inputs, experts)
        if self._last:
            self._turn.leave(seen.weight)


def decode_columns(context: Context, rows: Tokens, first: int, stop: int) -> None:
    """Decodes the tokens first … stop−1 of some sequences, int32 [sequences, n_ctx], side by side.

    All tokens are outputs, even if nobody reads their logits: the last block drops the others early.
    """
    tokens = rows[:, first:stop]
    positions = np.arange(first, first + tokens.shape[1], dtype=np.int32)
    sequences = np.repeat(np.arange(len(rows), dtype=np.int32), tokens.shape[1])
    context.decode(tokens.reshape(-1), np.tile(positions, len(rows)), sequences, np.ones(tokens.size, np.bool_))


def refuse_not_finite(seen: Multiplication, inputs: Floats) -> None:
    """Raises BitladderError that names the weight if its input has a value that is not finite."""
    if not np.isfinite(inputs).all():
        raise overflow(f"the inputs of {seen.weight} are")


def refuse_short(sizes: Mapping[str, int]) -> None:
    """Raises UsageError for an option (such as "-c") with too few tokens to calibrate with."""
    for flag, tokens in sizes.items():
        if tokens < MIN_CALIBRATION_CTX:
            raise UsageError(f"{flag} {tokens} is too small: calibration needs at least {MIN_CALIBRATION_CTX} tokens")
