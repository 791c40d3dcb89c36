"""Whether a file is a quant of the base: by its headers, and by its weights, which are those of the base, rounded."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitladder.engine import RowKernels, TensorType
from bitladder.errors import BitladderError
from bitladder.files import sha256_bytes
from bitladder.gguf import GgufFile, TensorInfo, block_of, kind_of, ranges
from bitladder.units import number_of, some_of

TOKENS = "tokenizer.ggml.tokens"
# What decides how text becomes tokens. Quantizers sometimes correct token types and templates, but never these.
TOKENIZER = ("model", "pre", "merges", "scores", "add_space_prefix", "add_bos_token", "bos_token_id")
# Keys of the architecture that do not change what the model computes on a short text.
HARMLESS = (".context_length", ".rope.scaling.original_context_length", ".vocab_size", ".pooling_type")
# Tensors that a quantizer can add or leave out: a copy of a tied head, precomputed rotations, scales of a tensor.
OPTIONAL = ("output.weight", "rope_freqs.weight", ".scale", ".input_scale")


# "other": the file is certainly no quant of the base. "sign": it is probably of another checkpoint, or was changed on
# purpose. "note": the difference leaves the comparison fair.
Gravity = Literal["other", "sign", "note"]


@dataclasses.dataclass(frozen=True)
class OriginFinding:
    """A difference of a file from the base: how grave it is, what was looked at, and a sentence."""

    gravity: Gravity
    about: Literal["architecture", "vocabulary", "tokenizer", "hyperparameters", "tensors", "weights", "perplexity"]
    text: str


def gravest(findings: Sequence[OriginFinding]) -> Gravity | None:
    """The gravest of several findings; None if there are none."""
    order: tuple[Gravity, ...] = ("other", "sign", "note")
    return next((gravity for gravity in order if any(finding.gravity == gravity for finding in findings)), None)


def check_structure(base: GgufFile, model: GgufFile) -> list[OriginFinding]:
    """How the headers of `model` differ from those of `base`; empty if it can be a quant of the base."""
    if base.architecture != model.architecture:
        return [
            OriginFinding(
                "other",
                "architecture",
                f"another architecture: {model.architecture or 'none'}, the base is {base.architecture}",
            )
        ]
    return [*_vocabulary(base, model), *_hyperparameters(base, model), *_tensors(base, model)]


def _vocabulary(base: GgufFile, model: GgufFile) -> Iterable[OriginFinding]:
    ours, theirs = base.metadata.get(TOKENS), model.metadata.get(TOKENS)
    if ours is None or theirs is None:
        yield OriginFinding("other", "vocabulary", "it has no vocabulary" if ours else "the base has no vocabulary")
        return
    if ours.raw != theirs.raw:
        mine, other = list(ours.python()), list(theirs.python())
        first = next(
            (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other))
        )
        yield OriginFinding(
            "other",
            "vocabulary",
            f"another vocabulary: {number_of(len(other), 'token')} (sha256 {sha256_bytes(theirs.raw)[:12]}), the base "
            f"has {len(mine):,} ({sha256_bytes(ours.raw)[:12]}); they differ from token {first} on",
        )
        return
    changed = [name for name in TOKENIZER if _raw(base, name) != _raw(model, name)]
    if changed:
        yield OriginFinding(
            "note",
            "tokenizer",
            f"the tokenizer has other settings ({', '.join(changed)}): it can cut text into other tokens; it is "
            "measured on the base's tokens",
        )


def _raw(file: GgufFile, name: str) -> bytes | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    return None if value is None else value.raw


def _hyperparameters(base: GgufFile, model: GgufFile) -> Iterable[OriginFinding]:
    prefix = base.architecture + "."
    changed = {
        key: (base.get(key), model.get(key))
        for key in sorted({*base.metadata, *model.metadata})
        if key.startswith(prefix) and base.get(key) != model.get(key)
    }
    grave = {key: pair for key, pair in changed.items() if not key.endswith(HARMLESS)}
    # A key that only one of the files has can be a default that the other one leaves out.
    certain = {key: pair for key, pair in grave.items() if None not in pair}
    if certain:
        yield OriginFinding("sign", "hyperparameters", f"other hyperparameters: {_pairs(certain)}")
    rest = {key: pair for key, pair in changed.items() if key not in certain}
    if rest:
        yield OriginFinding("note", "hyperparameters", f"metadata differ: {_pairs(rest)}")


def _pairs(changed: dict[str, tuple[object, object]]) -> str:
    shown = [f"{key} {_shown(theirs)}, the base has {_shown(ours)}" for key, (ours, theirs) in changed.items()]
    return "; ".join(shown[:3]) + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "")


def _shown(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _tensors(base: GgufFile, model: GgufFile) -> Iterable[OriginFinding]:
    shapes = [
        name
        for name in base.tensors.keys() & model.tensors.keys()
        if base.tensors[name].shape != model.tensors[name].shape
    ]
    if shapes:
        name = min(shapes, key=list(base.tensors).index)
        yield OriginFinding(
            "other",
            "tensors",
            f"other shapes: {number_of(len(shapes), 'tensor')}, the first {name} is "
            f"{list(model.tensors[name].shape)}, in the base {list(base.tensors[name].shape)}",
        )
    missing = [name for name in base.tensors if name not in model.tensors and not name.endswith(OPTIONAL)]
    added = [name for name in model.tensors if name not in base.tensors and not name.endswith(OPTIONAL)]
    if missing:
        blocks = {block_of(name) for name in missing} - {block_of(name) for name in model.tensors}
        if blocks and None not in blocks:
            text = f"blocks {ranges(number for number in blocks if number is not None)} are left out"
            yield OriginFinding("note", "tensors", f"pruned: {text}")
        else:
            yield OriginFinding("sign", "tensors", f"{_names(missing)} missing")
    if added:
        yield OriginFinding("sign", "tensors", f"{_names(added)} that the base does not have")


def _names(names: list[str]) -> str:
    return some_of(names, "tensor")


Floats = npt.NDArray[np.float32]

ROWS = 32  # rows of each matrix, evenly spread
# A distance of more than this many times that of rounding is no rounding. Over all kinds and types the ratio was at
# most 1.1 with an imatrix and 1.5 with blocks chosen for the output; after ten steps of training it was 3.7 in q6_K and
# 11.7 in q8_0.
LIMIT = 2.0
# Relative error of storage as BF16 (8 bits of mantissa), root mean square and largest. One of two makers may have
# started from a BF16 copy.
STORAGE, VECTOR_LIMIT = 2**-9 / math.sqrt(3), 2**-9


@dataclasses.dataclass
class Distance:
    """Squares summed over rows.

    Parameters:
        actual: squared distance of the file from the base.
        rounded: squared distance of the rounded base from the base.
        size: squares of the base.

    Example:
        >>> Distance(actual=4.0, rounded=1.0, size=100.0).ratio
        2.0
    """

    actual: float = 0.0
    rounded: float = 0.0
    size: float = 0.0

    @property
    def ratio(self) -> float:
        """The distance as a multiple of that of plain rounding."""
        return self.share / self.expected if self.expected else 1.0

    @property
    def share(self) -> float:
        """The distance as a share of the weights' size."""
        return math.sqrt(self.actual / self.size) if self.size else 0.0

    @property
    def expected(self) -> float:
        """The share that plain rounding makes; at least that of storage in 16 bits."""
        return max(math.sqrt(self.rounded / self.size), STORAGE) if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class WeightDistances:
    """Distances of a file from the base: of matrices by kind and type, of vectors (norms, biases) by kind."""

    matrices: dict[tuple[str, str], Distance]
    vectors: dict[str, Distance]

    @property
    def whole(self) -> Distance:
        """The distance over all matrices."""
        parts = self.matrices.values()
        return Distance(
            sum(part.actual for part in parts), sum(part.rounded for part in parts), sum(part.size for part in parts)
        )


def check_weights(base: GgufFile, model: GgufFile, threads: int | None = None) -> list[OriginFinding]:
    """Signs that a file's weights are not those of the base, rounded; empty if there are none."""
    return judge(distances(base, model, threads))


def distances(base: GgufFile, model: GgufFile, threads: int | None = None) -> WeightDistances:
    """Measures ROWS rows of every tensor that both files have in the same shape."""
    result = WeightDistances(collections.defaultdict(Distance), collections.defaultdict(Distance))
    kernels = RowKernels(threads)
    try:
        for name, ours in base.tensors.items():
            theirs = model.tensors.get(name)
            if theirs is None or theirs.shape != ours.shape:
                continue
            rows = _rows(ours)
            here, there = (_read(file, tensor, rows, kernels) for file, tensor in ((base, ours), (model, theirs)))
            kind = kind_of(name)
            if len(ours.shape) == 1:
                _add(result.vectors[kind], here, there, here)
                continue
            rounded = _round(here, theirs.type, kernels)
            if rounded is not None:
                _add(result.matrices[kind, theirs.type.name], here, there, rounded)
    finally:
        kernels.close()
    return result


def judge(measured: WeightDistances) -> list[OriginFinding]:
    """The signs of another checkpoint in some distances."""
    signs = []
    far = {key: distance for key, distance in measured.matrices.items() if not distance.ratio <= LIMIT}
    if far:
        (kind, type_name), farthest = max(far.items(), key=lambda item: item[1].ratio)
        signs.append(
            OriginFinding(
                "sign",
                "weights",
                f"its weights are not rounded weights of the base: {kind} in {type_name} differs by "
                f"{farthest.share:.2%}, and rounding to that type gives {farthest.expected:.2%} (too far for "
                f"{len(far)} of {number_of(len(measured.matrices), 'kind')}); it was made from another checkpoint, or "
                "changed on purpose",
            )
        )
    moved = {kind: norms.share for kind, norms in measured.vectors.items() if not norms.share <= VECTOR_LIMIT}
    if moved:
        kind = max(moved, key=lambda name: moved[name])
        signs.append(
            OriginFinding(
                "sign",
                "weights",
                f"norms or biases, which quantizers keep, differ from those of the base (mostly {kind}, by "
                f"{moved[kind]:.2%}): it was made from another checkpoint, or tuned afterwards",
            )
        )
    return signs


def _rows(tensor: TensorInfo) -> list[tuple[int, int]]:
    """Evenly spread spans of rows: of a large tensor, four spans of ROWS / 4 rows."""
    if tensor.rows <= ROWS:
        return [(0, tensor.rows)]
    step = ROWS // 4
    return [(start, start + step) for start in np.linspace(0, tensor.rows - step, 4, dtype=int).tolist()]


def _read(file: GgufFile, tensor: TensorInfo, spans: list[tuple[int, int]], kernels: RowKernels) -> Floats:
    data = np.concatenate([file.read(tensor, start, stop) for start, stop in spans])
    return kernels.dequantize(data, tensor.type, tensor.width)


def _round(rows: Floats, kind: TensorType, kernels: RowKernels) -> Floats | None:
    """Rows of the base as the stock kernel rounds them; None for a type that cannot be made."""
    # Types of two bits and fewer need an importance. With ones the kernel weights by the squares of the rows, as the
    # stock tool does without an imatrix.
    importance = np.ones(rows.shape[1], np.float32)
    try:
        return kernels.dequantize(kernels.quantize(rows, kind, importance), kind, rows.shape[1])
    except BitladderError:
        return None


def _add(to: Distance, base: Floats, model: Floats, rounded: Floats) -> None:
    to.actual += float(np.square(model - base, dtype=np.float64).sum())
    to.rounded += float(np.square(rounded - base, dtype=np.float64).sum())
    to.size += float(np.square(base, dtype=np.float64).sum())
