"""The order of a model's channels, which is free, chosen so that the head's inputs are rounded least.

The CPU's kernels of K-quants round 256 inputs at once, in steps that the largest of them sets. Embeddings that are the
head too leave no scale to move in front of it: what comes in is as large as it is, and nothing behind evens out the
error. But which channels share such a block is free. All that reads or writes the stream between layers can be put in
another order, and computes the same.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import watch_chunks
from bitladder.engine.decoding import Decoding
from bitladder.engine.model import Model
from bitladder.engine.observe import Multiplication
from bitladder.gguf.names import name_in_block
from bitladder.gguf.reader import GgufFile
from bitladder.refine.smooth.links import FLOATS
from bitladder.refine.smooth.pieces import column_squares

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

HEAD, EMBEDDINGS = "output.weight", "token_embd.weight"
BLOCK = 256  # QK_K in ggml-common.h: what a block of Q8_K holds
OUTLIERS = 64  # at most so many channels are looked at as the large ones of a block
CHUNKS, LENGTH = 16, 64  # of random tokens: which channels are large hardly depends on the text

# What has a value for each channel of the stream in each of its rows, or is one such row; and what has a row for each.
_NORMS = ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
_READERS = (
    *("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_qkv", "ffn_gate", "ffn_up", "ffn_gate_inp"),
    *("ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_inp_shexp"),
)
_WRITERS = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
_ACROSS = frozenset([f"{one}.weight" for one in (*_NORMS, *_READERS)] + [f"{one}.bias" for one in (*_NORMS, *_WRITERS)])
_DOWN = frozenset(f"{one}.weight" for one in _WRITERS)
# What the stream's order is nothing to: biases of q, k, v, gate and up, norms of heads, frequencies.
_FREE = frozenset(
    [f"{one}.bias" for one in _READERS if one not in ("token_embd", "output")]
    + ["attn_q_norm.weight", "attn_k_norm.weight", "rope_freqs.weight", "exp_probs_b.bias"]
)


@dataclasses.dataclass(frozen=True)
class Order:
    """Channels in their new order, int64 [width]; tensors whose `columns`, and whose `rows`, are channels; and `noise`,
    by what the error of the head's rounded inputs is expected to be multiplied."""

    channels: Indices
    columns: frozenset[str]
    rows: frozenset[str]
    noise: float


def find_order(file: GgufFile, *, threads: int | None = None) -> Order | None:
    """The order in which the head loses least, or None where there is none to choose.

    That is: the head is no embedding (then scales can move), its inputs are not rounded in blocks of 256, a tensor is
    quantized or not known here, or no order is better. Decodes random tokens; raises BitladderError if that fails.
    """
    embeddings = file.tensors.get(EMBEDDINGS)
    if embeddings is None or HEAD in file.tensors:
        return None
    width = embeddings.width
    if width % BLOCK or width < 2 * BLOCK:
        return None
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
    inputs = _head_inputs(file, threads)
    weights = column_squares(file, embeddings)[0]
    channels, noise = order_for_blocks(np.square(inputs, dtype=np.float64), weights)
    return Order(channels, columns, rows, noise) if noise < 1 else None


def order_for_blocks(squares: Doubles, weights: Doubles, block: int = BLOCK) -> tuple[Indices, float]:
    """Channels, int64 [channels], in an order in which blocks of inputs lose least when they are rounded, and by what
    that multiplies the loss.

    Parameters: `squares` of inputs, [tokens, channels]; `weights`, sums of squares of the columns that multiply them,
    [channels]. Inputs of a block have one step, in proportion to the largest, so that its rounding costs
    E[max_i x_i²] Σ_i u_i. Block by block, the k largest channels that are left are put with those whose columns are
    the smallest, with the k at which this block and all the rest together cost least. Within a block channels stay as
    they were.
    """
    count = squares.shape[1]
    sizes = squares.mean(axis=0)
    left, chosen = np.arange(count), []
    while len(left) > block:
        by_size = left[np.argsort(-sizes[left], kind="stable")]
        by_weight = left[np.argsort(weights[left], kind="stable")]
        best = (np.inf, left[:block])
        for large in range(min(OUTLIERS, block) + 1):
            outliers = by_size[:large]
            fill = by_weight[~np.isin(by_weight, outliers)][: block - large]
            inside = np.concatenate([outliers, fill])
            cost = _cost(squares, weights, inside) + _cost(squares, weights, np.setdiff1d(left, inside))
            if cost < best[0]:
                best = (cost, np.sort(inside))
        chosen.append(best[1])
        left = np.setdiff1d(left, best[1])
    order = np.concatenate([*chosen, left])
    before, after = (
        sum(_cost(squares, weights, one[start : start + block]) for start in range(0, count, block))
        for one in (np.arange(count), order)
    )
    return (order, after / before) if after < before else (np.arange(count), 1.0)


def _cost(squares: Doubles, weights: Doubles, inside: Indices) -> float:
    return float(squares[:, inside].max(axis=1).mean() * weights[inside].sum())


class _HeadInputs:
    """Keeps what the head multiplies."""

    def __init__(self) -> None:
        self.found: list[Floats] = []
        self._seen = False

    def begin(self, chunk: int, first: int, count: int) -> None:
        self._seen = False

    def wants(self, seen: Multiplication) -> bool:
        return seen.weight == EMBEDDINGS

    def see(self, seen: Multiplication, inputs: Floats, experts: npt.NDArray[np.int32] | None) -> None:
        self.found.append(inputs.reshape(-1, inputs.shape[-1]).copy())
        self._seen = True

    def satisfied(self) -> bool:
        return self._seen


def _head_inputs(file: GgufFile, threads: int | None) -> Floats:
    seen = _HeadInputs()
    with Model(file.path, repack=False) as model:
        tokens = np.random.default_rng(0).integers(0, model.n_vocab, (CHUNKS, LENGTH)).astype(np.int32)
        for _ in watch_chunks(model, tokens, seen, Decoding(threads=threads)):
            pass
    return np.concatenate(seen.found)
