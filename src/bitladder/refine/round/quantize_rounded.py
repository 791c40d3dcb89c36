"""Quantizing with chosen blocks: prepare, render, guard, write."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Sequence

from bitladder.calibrate import MomentsFile
from bitladder.engine.types import type_by_name
from bitladder.evaluate import Settings, load_or_compute_base
from bitladder.progress import SILENT, Progress
from bitladder.quantize import PreparedQuant, QuantizeOptions, QuantizeResult, prepare, refuse_target, write
from bitladder.refine.round.guard import Guard, GuardOptions, GuardReport
from bitladder.refine.round.output_rounding import OutputRounding, joined_sha256, refuse_other_moments
from bitladder.rounding import RoundingOptions
from bitladder.text.texts import Text
from bitladder.trial import Renderer, render_all

# What the file says of its blocks, for `bitladder verify`.
METHOD_KEY, MOMENTS_KEY = "bitladder.rounding", "bitladder.rounding.moments.sha256"


@dataclasses.dataclass(frozen=True)
class RefineOptions:
    """How to choose blocks, and on what they are tried.

    `guard` is the text (None: blocks are not tried), `settings` how it is measured. `work` is the folder in which
    rendered tensors are kept for the next time (None: for this time only).
    """

    rounding: RoundingOptions = dataclasses.field(default_factory=RoundingOptions)
    guard: Text | None = None
    settings: Settings = dataclasses.field(default_factory=lambda: Settings(chunks=8))
    work: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Refined:
    """The file, what the guard saw (None without one), and output errors by tensor: the library's blocks', and now."""

    result: QuantizeResult
    guard: GuardReport | None
    losses: dict[str, tuple[float, float]]


def quantize_refined(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: QuantizeOptions,
    moments: Sequence[str | os.PathLike[str]],
    refine: RefineOptions,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Refined:
    """Quantize a full-precision GGUF with blocks chosen for the layers' outputs.

    Parameters as for `quantize.quantize`; `moments` files of second moments of the same model. Types and sizes are the
    same as without. Raises BitladderError before anything is written if something does not fit together.
    """
    refuse_target(source, out)
    with contextlib.ExitStack() as opened:
        known = [opened.enter_context(MomentsFile(path)) for path in moments]
        rounding = OutputRounding(known, refine.rounding)
        extra = {METHOD_KEY: refine.rounding.method, MOMENTS_KEY: joined_sha256(known)}
        with prepare(source, options, imatrix=imatrix, metadata=extra, progress=progress) as prepared:
            refuse_other_moments(known, prepared.file, progress)
            return _refine(prepared, out, rounding, refine, threads, progress)


def _refine(
    prepared: PreparedQuant,
    out: str | os.PathLike[str],
    rounding: OutputRounding,
    refine: RefineOptions,
    threads: int | None,
    progress: Progress,
) -> Refined:
    types = {one.name: one.type.name for one in prepared.choice.tensors if one.changes and one.name == one.source.name}
    chosen = {name: kind for name, kind in types.items() if rounding.covers(name, type_by_name(kind))}
    with tempfile.TemporaryDirectory(dir=pathlib.Path(out).parent, prefix=".rounding.") as temporary:
        folder = refine.work or pathlib.Path(temporary)
        stock, rounded = (
            Renderer(prepared.file, prepared.importance, rounding=method, folder=folder, threads=threads)
            for method in (None, rounding)
        )
        try:
            render_all(rounded, chosen.items(), progress=progress)
            report = None
            if refine.guard is not None:
                base_file = folder / f"{refine.guard.sha256[:12]}.{refine.settings.n_ctx}.base"
                base = load_or_compute_base(
                    prepared.file.path, refine.guard, refine.settings, path=base_file, progress=progress
                )
                tried = GuardOptions(guard_chunks=refine.settings.chunks or len(base.chunks))
                with base, Guard(base, stock, rounded, types, tried, refine.settings) as guard:
                    report = guard.run(list(chosen), progress)
            kept = [name for name in chosen if report is None or name not in report.stock]

            blocks = {name: functools.partial(rounded.blocks, name, type_by_name(chosen[name])) for name in kept}
            result = write(prepared, out, threads=threads, progress=progress, blocks=blocks)
        finally:
            for one in (stock, rounded):
                one.close()
    losses = {name: rounding.losses[name, kind] for name, kind in chosen.items() if (name, kind) in rounding.losses}
    return Refined(result, report, losses)
