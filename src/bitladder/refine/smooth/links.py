"""Where the scale of a channel can move while the model computes the same, and by how much it is moved."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import Imatrix
from bitladder.engine import in_order
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, block_of, block_prefix, prediction_tensors
from bitladder.progress import Progress
from bitladder.refine.model_files import Doubles, Floats, column_squares
from bitladder.refine.options import SmoothingOptions
from bitladder.units import number_of


class SmoothingError(BitladderError):
    """A model in which no scale can move."""


FLOATS = ("f32", "f16", "bf16")  # types of weights that can change
_EXPERTS = ("_exps", "_shexp")
# The norm, and what may multiply its output. A norm that meets other matrices than these is left alone.
_NORMS = {
    "attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "ffn_norm": (
        *("ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps"),
        *("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_inp_shexp"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Link:
    """Channels that some tensors make and the columns of others multiply.

    Readers see `groups` × `repeats` × `size` channels, of which makers have `groups` × `size`. Attention heads that
    share a head of v are `repeats`; else there are 1 × 1 × channels.

    Parameters:
        kind: the maker's part of the name, such as "attn_norm".
        makers: a vector of the channels, or a matrix with a row for each; and its bias.
        readers: matrices with a column for each channel.
        size: channels of a head, or all.
        groups: heads of v.
        repeats: heads of attention that share a head of v.
        matrices: the number of experts, each of which has scales of its own, or 1.
    """

    kind: str
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    size: int
    groups: int = 1
    repeats: int = 1
    matrices: int = 1


def links_of(file: GgufFile) -> list[Link]:
    """The links of a model, by block. Raises SmoothingError for a model without any that is known here."""
    blocks = sorted({block for name in file.tensors if (block := block_of(name)) is not None})
    links = [link for block in blocks for link in _of_block(file, block)]
    if not prediction_tensors(file) and "output.weight" in file.tensors and "output_norm.weight" in file.tensors:
        links.append(_of_norm(file, "output_norm", ["output.weight"]))
    if not links:
        raise SmoothingError(
            f"{file.path}: no norm, v or up whose scale can move ({file.architecture or 'no architecture'}); "
            "use it without smoothing"
        )
    return links


def _of_block(file: GgufFile, block: int) -> list[Link]:
    start, links = block_prefix(block), []
    weights = [name for name in file.tensors if name.startswith(start) and name.endswith(".weight")]
    names = {name.removeprefix(start).removesuffix(".weight") for name in weights}
    for norm, known in _NORMS.items():
        readers = [f"{start}{stem}.weight" for stem in known if stem in names]
        # With attention and feed-forward side by side one norm serves both, and the other does not exist.
        if norm in names and len(readers) > 1 and _NORMS.keys() <= names:
            links.append(_of_norm(file, start + norm, readers))
    if {"attn_v", "attn_output"} <= names and not names & {"attn_sub_norm", "attn_v_norm"}:
        links += _of_values(file, block, start)
    for suffix in ("", *_EXPERTS):
        if {f"ffn_{stem}{suffix}" for stem in ("gate", "up", "down")} <= names and "ffn_sub_norm" not in names:
            down = file.tensors[f"{start}ffn_down{suffix}.weight"]
            matrices = down.rows // down.rows_per_matrix
            maker = f"{start}ffn_up{suffix}"
            links.append(
                Link("ffn_up", _with_bias(file, maker), (down.name,), down.width, matrices=matrices),
            )
    return links


def _of_norm(file: GgufFile, norm: str, readers: Sequence[str]) -> Link:
    kind = norm.rpartition(".")[2]
    return Link(kind, _with_bias(file, norm), tuple(readers), file.tensors[norm + ".weight"].width)


def _of_values(file: GgufFile, block: int, start: str) -> list[Link]:
    values, output = file.tensors[f"{start}attn_v.weight"], file.tensors[f"{start}attn_output.weight"]
    repeats, groups = output.width // values.rows, 1
    if repeats > 1:
        heads = file.get(f"{file.architecture}.attention.head_count_kv", 0)
        groups = heads[block] if isinstance(heads, list) else heads
    if not groups or values.rows % groups or values.rows * repeats != output.width:
        return []
    makers = _with_bias(file, f"{start}attn_v")
    return [Link("attn_v", makers, (output.name,), values.rows // groups, groups, repeats)]


def _with_bias(file: GgufFile, stem: str) -> tuple[str, ...]:
    return tuple(name for name in (f"{stem}.weight", f"{stem}.bias") if name in file.tensors)


def balance(
    inputs: npt.NDArray[np.floating],
    weights: npt.NDArray[np.floating],
    most_powers: int = SmoothingOptions().most_powers,
) -> Floats:
    """Scales s with which blocks of weights, and blocks of inputs, lose least.

    A block is rounded in steps that its largest members set. With sums instead of maxima, rounding the weights costs
    about (Σ h_i / s_i²)(Σ u_i s_i²), and rounding the inputs, as kernels of quantized weights do, costs the same
    product. By Cauchy and Schwarz it is least where h_i / s_i² ∝ u_i s_i², so s_i = (h_i / u_i)^¼. SmoothQuant
    (arXiv 2211.10438) balances largest values for the same reason, AWQ (arXiv 2306.00978) searches a power of h.
    Powers of two move between floating-point weights without rounding. The median channel keeps its scale. A channel
    that never varies, or that nothing multiplies, gets the nearest scale that is allowed.

    Parameters:
        inputs: mean squares h of the channels, [channels].
        weights: sums of squares u of the columns that multiply them, [channels].
        most_powers: powers of two by which a channel may be scaled, to either side.

    Returns:
        Powers of two, float32 [channels].

    Example:
        >>> balance(np.array([1.0, 256.0, 1.0]), np.ones(3)).tolist()
        [1.0, 4.0, 1.0]
    """
    inputs, weights = np.asarray(inputs, np.float64), np.asarray(weights, np.float64)
    alive = (inputs > 0) & (weights > 0)
    if not alive.any():
        return np.ones(len(inputs), np.float32)
    tiny = np.finfo(np.float64).tiny
    exponents = (np.log2(np.maximum(inputs, tiny)) - np.log2(np.maximum(weights, tiny))) / 4
    exponents -= np.median(exponents[alive])
    return cast("Floats", np.exp2(np.rint(np.clip(exponents, -most_powers, most_powers))).astype(np.float32))


def link_scales(
    file: GgufFile,
    links: Sequence[Link],
    imatrix: Imatrix,
    options: SmoothingOptions,
    progress: Progress,
    threads: int | None = None,
) -> list[tuple[Link, Floats]]:
    """Scales for each link.

    Parameters:
        file: the model.
        links: where scales can move; each has an entry in the matrix.
        imatrix: the importance matrix of the model.
        options: how far a channel may be scaled.
        progress: where work is shown.
        threads: threads of the CPU; None takes all.

    Returns:
        Each link and its scales, float32 [matrices, channels of the readers].

    Raises:
        BitladderError: the matrix belongs to another model, or weights are not finite.
    """
    scales = []
    works = [functools.partial(_squares, file, link) for link in links]
    with (
        progress.task("rescale channels", sum(_weights(file, link) for link in links)) as task,
        contextlib.closing(in_order(works, threads)) as sums,
    ):
        for link, squares in zip(links, sums, strict=True):
            importance = link_importance(imatrix, link)
            assert importance is not None
            shape = (link.matrices, link.groups, link.repeats, link.size)
            # Heads that share a head of v share its scales.
            shared = [np.asarray(values, np.float64).reshape(shape).sum(2) for values in (importance, squares)]
            rows = []
            for matrix in range(link.matrices):
                inputs, weights = (values[matrix].reshape(-1) for values in shared)
                rows.append(balance(inputs, weights, options.most_powers))
            whole = np.stack(rows).reshape(link.matrices, link.groups, 1, link.size)
            scales.append((link, np.broadcast_to(whole, shape).reshape(link.matrices, -1)))
            task.advance(_weights(file, link))
    return scales


def _weights(file: GgufFile, link: Link) -> int:
    return sum(file.tensors[name].elements for name in link.readers)


def _squares(file: GgufFile, link: Link) -> Doubles:
    """Sums of squares of the columns of what reads a link, float64 [matrices, channels]."""
    each = [column_squares(file, file.tensors[name], link.matrices) for name in link.readers]
    squares: Doubles = np.sum(each, axis=0)
    return squares


def link_importance(imatrix: Imatrix, link: Link) -> Doubles | None:
    """Mean squares of the channels of a link, up to a factor.

    Experts that no token reached are taken to be like the others.

    Parameters:
        imatrix: the importance matrix of the model.
        link: the link.

    Returns:
        float64 [matrices, channels]; None if no reader has an entry.

    Raises:
        BitladderError: the matrix belongs to another model.
    """
    for name in link.readers:
        entry = imatrix.entries.get(name)
        if entry is None:
            continue
        sums = np.asarray(entry.sums, np.float64)
        if sums.shape[1] != link.groups * link.repeats * link.size or (link.matrices > 1 and len(sums) < link.matrices):
            raise BitladderError(
                f"the imatrix belongs to another model: {name} has {number_of(sums.shape[1], 'column')} there"
            )
        whole: Doubles = sums.sum(axis=0)
        if link.matrices == 1:
            return whole[None]
        reached = sums.sum(axis=1, keepdims=True) > 0
        return np.asarray(np.where(reached, sums, whole))
    return None
