"""The order of a model's channels is free: it is chosen so that the head's inputs are rounded least.

The CPU's kernels of K-quants round 256 inputs at once, in steps that the largest of them sets. Where the embeddings are
the head too, no scale can move in front of the head, and nothing behind it reduces the error. But it is free which
channels share such a block. All that reads or writes the stream between layers can be put in another order, and
computes the same.
"""

import dataclasses
from concurrent.futures import Future

import numpy as np

from bitladder.calibrate import decode_columns
from bitladder.engine import LANES, Decoding, HiddenStates, Lane, Lanes, Model, WatchingUntilSatisfied
from bitladder.gguf import EMBEDDING, HEAD, GgufFile, name_in_block
from bitladder.refine.model_files import Doubles, Floats, Indices, column_squares
from bitladder.refine.options import SmoothingOptions
from bitladder.refine.smooth.links import FLOATS

BLOCK = 256  # QK_K in ggml-common.h: what a block of Q8_K holds
ORDER_LENGTH = 64  # of a chunk of random tokens: which channels are large hardly depends on the text

# Tensors with a value for each channel of the stream in each row, or that are one such row; and those with a row for
# each channel.
_NORMS = ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
_READERS = (
    *("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_qkv", "ffn_gate", "ffn_up", "ffn_gate_inp"),
    *("ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_inp_shexp"),
)
_WRITERS = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
_ACROSS = frozenset(
    [f"{stem}.weight" for stem in (*_NORMS, *_READERS)] + [f"{stem}.bias" for stem in (*_NORMS, *_WRITERS)]
)
_DOWN = frozenset(f"{stem}.weight" for stem in _WRITERS)
# Tensors that the order of the stream does not touch: biases of q, k, v, gate and up, norms of heads, frequencies.
_FREE = frozenset(
    [f"{stem}.bias" for stem in _READERS if stem not in ("token_embd", "output")]
    + ["attn_q_norm.weight", "attn_k_norm.weight", "rope_freqs.weight", "exp_probs_b.bias"]
)


@dataclasses.dataclass(frozen=True)
class Order:
    """An order of the channels of the stream.

    Parameters:
        channels: their numbers in the new order, int64 [width].
        columns: names of the tensors whose columns are channels.
        rows: names of the tensors whose rows are channels.
        noise: the expected factor of the error of the head's rounded inputs.
    """

    channels: Indices
    columns: frozenset[str]
    rows: frozenset[str]
    noise: float


def find_order(
    file: GgufFile, loaded: Future[Model], options: SmoothingOptions, threads: int | None = None
) -> Order | None:
    """The order in which the head loses least. Decodes random tokens.

    There is none if the head has a matrix of its own (then scales can move), if its inputs are not rounded in blocks of
    256, if a tensor is quantized or not known here, and if no order is better.

    Parameters:
        file: a full-precision model.
        loaded: the same model.
        options: how large channels are found.
        threads: threads of the CPU; None takes all.

    Raises:
        BitladderError: the model does not load or decode.
    """
    embeddings = file.tensors.get(EMBEDDING)
    if embeddings is None or not may_be_ordered(tied=HEAD not in file.tensors, width=embeddings.width):
        return None
    width = embeddings.width
    stems = {name: name_in_block(name) for name in file.tensors}
    if not set(stems.values()) <= _ACROSS | _DOWN | _FREE:
        return None
    columns = frozenset(name for name, stem in stems.items() if stem in _ACROSS)
    rows = frozenset(name for name, stem in stems.items() if stem in _DOWN)
    if any(file.tensors[name].type.name not in FLOATS for name in columns | rows):
        return None
    if any(file.tensors[name].width != width for name in columns) or any(
        file.tensors[name].rows_per_matrix != width for name in rows
    ):
        return None
    inputs = _head_inputs(loaded.result(), options.order_chunks, threads)
    weights = column_squares(file, embeddings)[0]
    channels, noise = order_for_blocks(np.square(inputs, dtype=np.float64), weights, options.outliers)
    return Order(channels, columns, rows, noise) if noise < 1 else None


def may_be_ordered(*, tied: bool, width: int) -> bool:
    """Whether an order of the channels is looked for.

    Parameters:
        tied: whether embeddings are the head; else scales can move in front of it.
        width: channels.
    """
    return tied and width % BLOCK == 0 and width >= 2 * BLOCK


def order_for_blocks(
    squares: Doubles, weights: Doubles, outliers: int = SmoothingOptions().outliers, block: int = BLOCK
) -> tuple[Indices, float]:
    """An order of channels in which blocks of inputs lose least when they are rounded.

    The inputs of a block have one step, in proportion to the largest. So the rounding of a block costs
    E[max_i x_i²] Σ_i u_i. Block by block, the k largest channels that are left are put together with those whose
    columns are the smallest. k is the number at which this block and all the rest together cost least. Within a block
    channels stay in their order.

    Parameters:
        squares: squared inputs x², float64 [tokens, channels].
        weights: sums of squares u of the columns that multiply them, float64 [channels].
        outliers: how many channels are examined at most as the large ones of a block.
        block: channels of a block.

    Returns:
        Numbers of the channels, int64 [channels], and the factor of the loss (1 if no order is better).

    Example:
        >>> order_for_blocks(np.array([[9.0, 1, 9, 1]]), np.ones(4), block=2)
        (array([0, 2, 1, 3]), 0.5555555555555556)
    """
    count = squares.shape[1]
    sizes = squares.mean(axis=0)
    squares = np.ascontiguousarray(squares.T)  # some channels are taken many times
    left, chosen = np.arange(count), []
    while len(left) > block:
        by_size = left[np.argsort(-sizes[left], kind="stable")]
        by_weight = left[np.argsort(weights[left], kind="stable")]
        best = (np.inf, left[:block])
        for count_large in range(min(outliers, block) + 1):
            large = by_size[:count_large]
            fill = by_weight[~np.isin(by_weight, large)][: block - count_large]
            inside = np.concatenate([large, fill])
            cost = _cost(squares, weights, inside) + _cost(squares, weights, np.setdiff1d(left, inside))
            if cost < best[0]:
                best = (cost, np.sort(inside))
        chosen.append(best[1])
        left = np.setdiff1d(left, best[1])
    order = np.concatenate([*chosen, left])
    before, after = (
        sum(_cost(squares, weights, channels[start : start + block]) for start in range(0, count, block))
        for channels in (np.arange(count), order)
    )
    return (order, after / before) if after < before else (np.arange(count), 1.0)


def _cost(squares: Doubles, weights: Doubles, inside: Indices) -> float:
    """Of channels in a block, with squares [channels, tokens]."""
    return float(squares[inside].max(axis=0).mean() * weights[inside].sum())


class _HeadInputs(HiddenStates):
    """Keeps the inputs of the head, and ends the computation there."""

    def satisfied(self) -> bool:
        return bool(self._parts)


def _head_inputs(model: Model, chunks: int, threads: int | None) -> Floats:
    decoding = Decoding(n_ctx=ORDER_LENGTH, n_batch=ORDER_LENGTH, n_ubatch=ORDER_LENGTH, threads=threads)
    seen = [_HeadInputs(EMBEDDING) for _ in range(LANES)]
    callbacks = iter(map(WatchingUntilSatisfied, seen))
    with Lanes(model, decoding, callback=lambda: next(callbacks)) as lanes:
        tokens = np.random.default_rng(0).integers(0, model.n_vocab, (chunks, ORDER_LENGTH)).astype(np.int32)

        def read(lane: Lane, chunk: int) -> Floats:
            lane.context.clear()
            decode_columns(lane.context, tokens[chunk : chunk + 1], 0, ORDER_LENGTH)
            return seen[lane.number].take()

        return np.concatenate(list(lanes.each(chunks, read)))
