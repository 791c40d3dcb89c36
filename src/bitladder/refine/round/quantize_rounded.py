"""Quantizing with rounded blocks: prepare, render, try, write."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Sequence

from bitladder.calibrate import MomentsFile
from bitladder.engine import Decoding, torch_device, type_by_name
from bitladder.evaluate import decision_chunk, decision_settings
from bitladder.files import Closing, refuse_inputs
from bitladder.gguf import shards_of
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.quantize import PreparedQuant, QuantizeOptions, QuantizeResult, prepare, write
from bitladder.refine.model_files import ModelFiles
from bitladder.refine.options import GuardOptions, RefineOptions
from bitladder.refine.round.guard import GUARD, Guard, GuardReport
from bitladder.refine.round.output_rounding import (
    OUTPUT_ROUNDING,
    OutputRounding,
    joined_sha256,
    refuse_other_moments,
)
from bitladder.rounding import RoundingOptions
from bitladder.text import EXCERPTS, Text, excerpts
from bitladder.trial import Pair, Renderer, kept_base, render_all, rendering_shares

ROUNDED_QUANT = Algorithm(
    "rounded quant",
    ("the preset's or a recipe's types, rounded blocks where the guard keeps them",),
    uses=(EXCERPTS, OUTPUT_ROUNDING, GUARD),
)

# What the file says of its blocks, for `bitladder verify`.
METHOD_KEY, MOMENTS_KEY = "bitladder.rounding", "bitladder.rounding.moments.sha256"
DEVICE_KEY = "bitladder.rounding.device"  # only where it is not the CPU


@dataclasses.dataclass(frozen=True)
class RoundedQuant:
    """A quant with rounded blocks.

    Parameters:
        result: the file.
        guard: what the guard measured; None without one.
        losses: tr(O ΔW H ΔWᵀ) of the library's blocks and of the rounded ones, by tensor.
    """

    result: QuantizeResult
    guard: GuardReport | None
    losses: dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The text on which blocks are tried, and how."""

    text: Text
    options: GuardOptions
    decoding: Decoding


@ROUNDED_QUANT.entry
def quantize_rounded(
    files: ModelFiles,
    out: str | os.PathLike[str],
    options: QuantizeOptions,
    refine: RefineOptions,
    held_out: Text | None,
    decoding: Decoding,
    *,
    work: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> RoundedQuant:
    """Quantizes a full-precision model with blocks chosen for the outputs of its layers.

    Types and sizes are the same as without.

    Parameters:
        files: the model, its importance matrix and its second moments.
        out: path of the quant; a file that exists is replaced.
        options: the preset or the types.
        refine: how blocks are rounded and tried.
        held_out: a text that was not calibrated on, on which blocks are tried; None tries nothing.
        decoding: how the model is decoded for that, and which device rounds.
        work: a folder in which rendered tensors are kept for the next time; None keeps nothing.
        progress: where work is shown.

    Raises:
        BitladderError: files do not fit together; nothing is written then.
    """
    refuse_inputs([out], [*shards_of(files.model), *files.moments, *([files.imatrix] if files.imatrix else [])])
    with contextlib.ExitStack() as opened:
        moments = [opened.enter_context(MomentsFile(path)) for path in files.moments]
        rounding = OutputRounding(moments, refine.rounding, decoding.device, progress)
        extra = {METHOD_KEY: refine.rounding.method, MOMENTS_KEY: joined_sha256(moments)}
        extra |= {} if torch_device(decoding.device) is None else {DEVICE_KEY: decoding.device}
        prepared = opened.enter_context(
            prepare(files.model, options, imatrix=files.imatrix, metadata=extra, progress=progress)
        )
        refuse_other_moments(moments, prepared.file, progress)
        if work is None:
            folder = tempfile.TemporaryDirectory(dir=pathlib.Path(out).parent, prefix=".rounding.", suffix=".tmp")
            work = pathlib.Path(opened.enter_context(folder))
        trial = None if held_out is None else _Trial(held_out, refine.guard, decoding)
        return _round(prepared, out, rounding, trial, work, decoding.threads, progress)


class RoundAhead(Closing):
    """The tensors of several quants, to be rounded into a folder, from which `quantize_rounded` takes them.

    Second moments of a tensor are factored once for all its types. What the folder has no room for is left out.

    Parameters:
        files: the model, its importance matrix and its second moments.
        quants: the presets or types.
        options: how blocks are rounded.
        work: the folder.
        decoding: tensors that are rounded at once (threads), and which device rounds.
        progress: where work is shown.

    Raises:
        BitladderError: files do not fit together.
    """

    def __init__(
        self,
        files: ModelFiles,
        quants: Sequence[QuantizeOptions],
        options: RoundingOptions,
        work: pathlib.Path,
        *,
        decoding: Decoding | None = None,
        progress: Progress = SILENT,
    ) -> None:
        decoding, self._progress = decoding or Decoding(), progress
        with contextlib.ExitStack() as opened:
            moments = [opened.enter_context(MomentsFile(path)) for path in files.moments]
            self._rounding = OutputRounding(moments, options, decoding.device, progress)
            self._quants = [
                opened.enter_context(prepare(files.model, quant, imatrix=files.imatrix)) for quant in quants
            ]
            file, importance = self._quants[0].file, self._quants[0].importance
            self._renderer = opened.enter_context(
                Renderer(file, importance, rounding=self._rounding, folder=work, threads=decoding.threads)
            )
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Closes the files."""
        self._opened.close()

    def render(self, pairs: Sequence[Pair] | None = None) -> None:
        """Rounds the tensors.

        Parameters:
            pairs: a share of them, which the folder has room for: name of a tensor, and of a type. None rounds all.
        """
        if pairs is None:
            pairs = self._fitting()
        else:
            self._renderer.room = sum(self._size(pair) for pair in pairs)
        render_all(self._renderer, pairs, progress=self._progress)

    def shares(self, count: int, threads: int) -> list[list[Pair]]:
        """Shares of the tensors for so many machines of so many threads (`trial.rendering_shares`)."""
        return rendering_shares(self._renderer, self._fitting(), count, threads)

    def _fitting(self) -> list[Pair]:
        """The pairs of tensor and type that the folder has room for."""
        pairs: dict[Pair, None] = {}
        room = self._renderer.room
        for quant in self._quants:
            for pair in _rounded_types(quant, self._rounding).items():
                size = self._size(pair)
                if pair not in pairs and size <= room:
                    pairs[pair] = None
                    room -= size
        return list(pairs)

    def _size(self, pair: Pair) -> int:
        return self._renderer.nbytes(pair[0], type_by_name(pair[1]))


def _changes(quant: PreparedQuant) -> dict[str, str]:
    """The type of each tensor that gets other values than it has, by name."""
    choices = quant.choice.tensors
    return {choice.name: choice.type.name for choice in choices if choice.changes and choice.name == choice.source.name}


def _rounded_types(quant: PreparedQuant, rounding: OutputRounding) -> dict[str, str]:
    """Those of them that get other blocks than the library's."""
    return {name: kind for name, kind in _changes(quant).items() if rounding.covers(name, type_by_name(kind))}


def guard_text(calibration: Sequence[Text], options: GuardOptions, n_ctx: int) -> Text:
    """Passages of the calibration texts on which a guard tries blocks, for want of another text.

    Parameters:
        calibration: the texts.
        options: how many chunks, and where they begin.
        n_ctx: tokens of a chunk, of which a guard's has half.
    """
    return excerpts(calibration, options.guard_chunks, decision_chunk(n_ctx), offset=options.guard_offset)


def _round(
    prepared: PreparedQuant,
    out: str | os.PathLike[str],
    rounding: OutputRounding,
    trial: _Trial | None,
    work: pathlib.Path,
    threads: int | None,
    progress: Progress,
) -> RoundedQuant:
    types, covered = _changes(prepared), _rounded_types(prepared, rounding)
    with (
        Renderer(prepared.file, prepared.importance, folder=work, threads=threads) as stock,
        Renderer(prepared.file, prepared.importance, rounding=rounding, folder=work, threads=threads) as rounded,
    ):
        render_all(rounded, covered.items(), progress=progress)
        report = None if trial is None else _try(trial, stock, rounded, types, list(covered), work, progress)
        kept = [name for name in covered if report is None or name not in report.stock]

        blocks = {name: functools.partial(rounded.blocks, name, type_by_name(covered[name])) for name in kept}
        result = write(prepared, out, threads=threads, progress=progress, blocks=blocks)
    losses = {name: rounding.losses[name, kind] for name, kind in covered.items() if (name, kind) in rounding.losses}
    return RoundedQuant(result, report, losses)


def _try(
    trial: _Trial,
    stock: Renderer,
    rounded: Renderer,
    types: dict[str, str],
    candidates: list[str],
    work: pathlib.Path,
    progress: Progress,
) -> GuardReport:
    settings = decision_settings(trial.decoding, trial.options.guard_chunks)
    with (
        kept_base(work, stock.file.path, trial.text, settings, progress) as base,
        Guard(base, stock, rounded, types, trial.options, settings) as guard,
    ):
        return guard.run(candidates, progress)
