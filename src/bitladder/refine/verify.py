"""Is a quant what it says it is: its blocks derived again from the full-precision model.

A file that others made verifies too, as far as the library's own kernels and the imatrix made it.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from bitladder.calibrate import MomentsFile, read_imatrix
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo, refuse_other_model
from bitladder.progress import SILENT, Progress
from bitladder.quantize import TUNE_KEY
from bitladder.refine.round.output_rounding import OutputRounding, joined_sha256
from bitladder.refine.round.quantize_rounded import METHOD_KEY, MOMENTS_KEY
from bitladder.rounding import Method, RoundingOptions, can_round, same_integers
from bitladder.trial import Renderer

Way = Literal["copied", "stock", "stock without importance", "rounded", "tuned", "differs"]


@dataclasses.dataclass(frozen=True)
class Verified:
    """How each tensor of a quant came about: "copied" from the source, by the library's kernel ("stock", with the
    imatrix, or without), "rounded" for the output, "tuned" (in a file that says so: the integers are those of one of
    these ways, and only F16 numbers of blocks differ), or "differs": none of these gives its bytes."""

    ways: dict[str, Way]

    @property
    def differing(self) -> list[str]:
        """The tensors that could not be derived."""
        return [name for name, way in self.ways.items() if way == "differs"]


def verify(
    quant: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    imatrix: str | os.PathLike[str] | None = None,
    moments: Sequence[str | os.PathLike[str]] = (),
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Verified:
    """Derive every tensor of a quant again and compare bytes.

    Parameters: `source` the full-precision GGUF it was made from; `imatrix` and `moments` those it was made with.
    Rounding for the output repeats to the bit on one kind of processor; another may add in another order. Raises
    BitladderError if the two files are not of one model, or if the quant was made with other moments.
    """
    with GgufFile(quant) as made, GgufFile(source) as original:
        refuse_other_model(made, original)
        found: dict[str, Way] = {}
        with contextlib.ExitStack() as opened:
            known = [opened.enter_context(MomentsFile(path)) for path in moments]
            ways = _ways(made, original, imatrix, known, threads)
            for renderer in ways.values():
                opened.callback(renderer.close)
            bar = opened.enter_context(progress.task("verify", sum(tensor.nbytes for tensor in made.tensors.values())))
            for name, tensor in made.tensors.items():
                found[name] = _way(made, tensor, original.tensors[name], original, ways)
                bar.note(name)
                bar.advance(tensor.nbytes)
    return Verified(found)


def _ways(
    made: GgufFile,
    original: GgufFile,
    imatrix: str | os.PathLike[str] | None,
    moments: Sequence[MomentsFile],
    threads: int | None,
) -> dict[Way, Renderer]:
    """What may have made a tensor, the cheapest to try first."""
    importance = {}
    if imatrix is not None:
        matrix = read_imatrix(imatrix)
        for name, tensor in original.tensors.items():
            columns = matrix.columns(name, tensor)
            if columns is not None:
                importance[name] = columns
    ways: dict[Way, Renderer] = {}
    if importance:
        ways["stock"] = Renderer(original, importance, threads=threads)
    ways["stock without importance"] = Renderer(original, {}, threads=threads)
    if moments:
        ways["rounded"] = Renderer(original, importance, rounding=_rounding(made, moments), threads=threads)
    return ways


def _rounding(made: GgufFile, known: Sequence[MomentsFile]) -> OutputRounding:
    method, digest = made.get(METHOD_KEY), made.get(MOMENTS_KEY)
    if method not in get_args(Method):
        raise BitladderError(
            f"{made.path} was not rounded by bitladder ({METHOD_KEY} is {method!r}); leave out --moments"
        )
    if digest != joined_sha256(known):
        names = " and ".join(str(one.path) for one in known)
        raise BitladderError(f"{made.path} was made with other second moments than {names} ({MOMENTS_KEY})")
    return OutputRounding(known, RoundingOptions(method=method))


def _way(made: GgufFile, tensor: TensorInfo, before: TensorInfo, original: GgufFile, ways: dict[Way, Renderer]) -> Way:
    data = made.read(tensor)
    if tensor.type == before.type:
        return "copied" if np.array_equal(data, original.read(before)) else "differs"
    tuned = bool(made.get(TUNE_KEY)) and can_round(tensor.type.name)
    for way, renderer in ways.items():
        try:
            derived = renderer.blocks(tensor.name, tensor.type)
        except BitladderError:
            continue  # a type that cannot be made without importance, for one
        if np.array_equal(data, derived):
            return way
        if tuned and same_integers(tensor.type.name, data, derived, tensor.width):
            return "tuned"
    return "differs"
