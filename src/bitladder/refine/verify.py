"""Is a quant what it says it is: its blocks derived again from the full-precision model.

A file that others made verifies too, as far as the library's own kernels and the imatrix made it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from bitladder.calibrate import MomentsFile, read_imatrix
from bitladder.engine.types import RowKernels, type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo, refuse_other_model
from bitladder.progress import SILENT, Progress
from bitladder.quantize import TUNE_KEY
from bitladder.refine.round.output_rounding import OutputRounding, joined_sha256
from bitladder.refine.round.quantize_rounded import METHOD_KEY, MOMENTS_KEY, SEQUENTIAL_KEY
from bitladder.refine.sequential import Sequential, ShiftedRounding, render_in_order
from bitladder.rounding import Method, RoundingOptions, can_round, same_integers
from bitladder.text.texts import Text
from bitladder.trial import Renderer, StockRounding

Way = Literal["copied", "stock", "stock without importance", "rounded", "tuned", "differs"]


@dataclasses.dataclass(frozen=True)
class Verified:
    """How each tensor of a quant came about: "copied" from the source, by the library's kernel ("stock", with the
    imatrix, or without), "rounded" for the output, "tuned" (in a file that says so: the integers are those of one of
    these ways, and only F16 numbers of blocks differ; or a norm), or "differs": none of these gives its bytes."""

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
    sequential: Sequence[Text] = (),
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Verified:
    """Derive every tensor of a quant again and compare bytes.

    Parameters: `source` the full-precision GGUF it was made from; `imatrix` and `moments` those it was made with,
    `sequential` the texts, if it was rounded from block to block.
    Rounding for the output repeats to the bit on one kind of processor; another may add in another order. Raises
    BitladderError if the two files are not of one model, or if the quant was made with other moments.
    """
    with GgufFile(quant) as made, GgufFile(source) as original:
        refuse_other_model(made, original)
        found: dict[str, Way] = {}
        with contextlib.ExitStack() as opened:
            known = [opened.enter_context(MomentsFile(path)) for path in moments]
            folder = pathlib.Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="bitladder.verify.")))
            ways = _ways(made, original, imatrix, known, sequential, folder, threads, progress)
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
    sequential: Sequence[Text],
    folder: pathlib.Path,
    threads: int | None,
    progress: Progress,
) -> dict[Way, Renderer]:
    """What may have made a tensor, the cheapest to try first."""
    importance = {}
    if imatrix is not None:
        matrix = read_imatrix(imatrix)
        for name, tensor in original.tensors.items():
            columns = matrix.columns(name, tensor)
            if columns is not None:
                importance[name] = columns
    kernels = RowKernels(threads)
    ways: dict[Way, Renderer] = {}
    if importance:
        ways["stock"] = Renderer(original, importance, rounding=StockRounding(kernels), threads=threads)
    ways["stock without importance"] = Renderer(original, {}, rounding=StockRounding(kernels), threads=threads)
    if moments:
        rounding = _rounding(made, moments)
        order = _sequential(made, sequential)
        if order is None:
            ways["rounded"] = Renderer(original, importance, rounding=rounding, threads=threads)
            return ways
        types = {
            name: tensor.type.name
            for name, tensor in made.tensors.items()
            if tensor.type != original.tensors[name].type
        }
        chosen = [name for name, kind in types.items() if rounding.covers(name, type_by_name(kind))]
        shifted = ShiftedRounding(rounding, order, types)
        stock, ways["rounded"] = (
            Renderer(original, importance, rounding=one, folder=folder, threads=threads)
            for one in (StockRounding(kernels), shifted)
        )
        render_in_order(shifted, (stock, ways["rounded"]), types, chosen, threads=threads, progress=progress)
        stock.close()
    return ways


def _sequential(made: GgufFile, texts: Sequence[Text]) -> Sequential | None:
    """What a file was rounded behind, by the texts that are given, or None."""
    said = made.get(SEQUENTIAL_KEY)
    if said is None:
        if texts:
            raise BitladderError(f"{made.path} was not rounded from block to block; leave out --sequential")
        return None
    try:
        facts = json.loads(str(said))
        order = Sequential(tuple(texts), int(facts["chunks"]), int(facts["blocks"]), int(facts["n_ctx"]))
    except (ValueError, KeyError, TypeError) as error:
        raise BitladderError(f"{made.path}: {SEQUENTIAL_KEY} is {said!r}, which says nothing known here") from error
    if order.describe() != said:
        raise BitladderError(
            f"{made.path} was rounded from block to block on other texts than those given by --sequential"
        )
    return order


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
    tuned = bool(made.get(TUNE_KEY))
    if tensor.type == before.type:
        if np.array_equal(data, original.read(before)):
            return "copied"
        return "tuned" if tuned and tensor.name.endswith("norm.weight") else "differs"
    for way, renderer in ways.items():
        try:
            derived = renderer.blocks(tensor.name, tensor.type)
        except BitladderError:
            continue  # a type that cannot be made without importance, for one
        if np.array_equal(data, derived):
            return way
        if tuned and can_round(tensor.type.name) and same_integers(tensor.type.name, data, derived, tensor.width):
            return "tuned"
    return "differs"
