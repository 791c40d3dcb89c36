"""Second moments weighted by gradients, from texts to the file that rounding reads (see calibrate.moments)."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.collect_imatrix import MIN_CTX
from bitladder.calibrate.collect_moments import (
    MEMORY_SHARE,
    MomentsResult,
    merge_moments,
    model_sha256,
    write_result,
)
from bitladder.calibrate.gradients.hyperparameters import read_sizes
from bitladder.calibrate.gradients.needs import require_torch, torch_threads
from bitladder.calibrate.gradients.weighted_moments import GradientMoments, weighted_moments
from bitladder.calibrate.imatrix import read_imatrix, write_imatrix
from bitladder.calibrate.inputs import model_inputs
from bitladder.calibrate.moments.assemble import Source
from bitladder.calibrate.moments.moments_file import Floats, MomentsFile, Provenance, Shape, pack_triangle
from bitladder.calibrate.moments.passes import IMATRIX, ImatrixBeside, run_passes
from bitladder.calibrate.unfinished import Keep, job_key
from bitladder.engine.devices import main_memory
from bitladder.engine.model import Model
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf.reader import GgufFile
from bitladder.progress import SILENT, Progress
from bitladder.text.chunks import Reading
from bitladder.text.texts import Text


def why_not(model: str | os.PathLike[str]) -> str | None:
    """Why there are no gradients of a model, in a few words; None if there should be. Only its header is read."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install 'bitladder[torch]')"
    from bitladder.calibrate.gradients.families import FAMILIES

    with GgufFile(model) as file:
        family = FAMILIES.get(file.architecture)
        if family is None:
            return f"the torch forward pass does not know the architecture {file.architecture!r}"
        try:
            read_sizes(file, interleaved=family.interleaved)
        except BitladderError as error:
            return str(error)
    return None


def collect_gradient_moments(
    model: str | os.PathLike[str],
    texts: Sequence[Text],
    out: str | os.PathLike[str],
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    from_chunk: int = 0,
    spread: bool = True,
    parse_special: bool = False,
    outputs: bool = True,
    imatrix: str | os.PathLike[str] | None = None,
    process_output: bool = False,
    in_files: Sequence[str | os.PathLike[str]] = (),
    memory: int | None = None,
    draws: int = 1,
    seed: int = 0,
    n_ubatch: int = 512,
    threads: int | None = None,
    gpu_layers: int = 0,
    progress: Progress = SILENT,
) -> MomentsResult:
    """Collect second moments weighted by gradients (`weighted_moments`) over some texts and write them.

    Parameters as of calibrate's collect_moments; `outputs` keeps E[ggᵀ] too; `draws` and `seed` of the labels. What a
    finished pass gave stays in the folder `out`.parts, and a run that was cut short goes on with the next one. An
    imatrix beside takes a forward pass of the library's, `gpu_layers` of which are on the GPU. Raises BitladderError as
    `weighted_moments` does, and for a text that is too short or files of another model.
    """
    out = pathlib.Path(out)
    if n_ctx < MIN_CTX:
        raise UsageError(f"-c {n_ctx} is too short: at least {MIN_CTX} tokens are needed")
    if not texts:
        return merge_moments(out, in_files, progress)
    torch = require_torch()
    reading = Reading(n_ctx, chunks, from_chunk, spread, parse_special)
    options: list[Any] = [dataclasses.asdict(reading), "gradients", outputs, draws, seed, str(torch.__version__)]
    options += [imatrix is not None, process_output, n_ubatch]
    keep = Keep(out, job_key(model, texts, options))
    with contextlib.ExitStack() as opened:
        others: list[Source] = [opened.enter_context(MomentsFile(path)) for path in in_files]
        with Model(model, vocab_only=imatrix is None, gpu_layers=gpu_layers) as loaded:
            rows = reading.rows(loaded, texts)
            if imatrix is not None:
                names = [text.name for text in texts]
                beside = ImatrixBeside(model_inputs(loaded, threads), names, process_output)
                run_passes(loaded, rows, [[]], keep, beside, n_ubatch=n_ubatch, threads=threads, progress=progress)
        room = memory or max(main_memory() // MEMORY_SHARE // 2, 1 << 28)  # as much again is used for weights
        shapes = _shapes(model, room, outputs, threads)
        missing = [name for name in shapes if not keep.has(name)]
        if missing:
            arguments: dict[str, Any] = {"outputs": outputs, "memory": room, "draws": draws, "seed": seed}
            for moments in weighted_moments(
                model, rows, names=missing, threads=threads, progress=progress, **arguments
            ):
                _keep_one(keep, moments)
        provenance = Provenance([text.name for text in texts], len(rows), n_ctx, "gradients", model_sha256(model))
        source = _Kept(shapes, keep, rows.size, provenance)
        result = write_result(out, [source, *others], 1, progress)
        if imatrix is not None:
            write_imatrix(read_imatrix(keep.path(IMATRIX)), imatrix)
    keep.remove()
    return result


def _shapes(model: str | os.PathLike[str], memory: int, outputs: bool, threads: int | None) -> dict[str, Shape]:
    """The sizes of all entries, in the order of the computation."""
    from bitladder.calibrate.gradients.forward import TorchModel

    with torch_threads(threads), TorchModel(model, memory=memory, threads=threads) as ours:
        sizes = {name: ours.shape(name) for name in ours.matrices}
        head = ours.head
    return {name: Shape(1, n_in, n_out if outputs and name != head else 0) for name, (n_out, n_in) in sizes.items()}


def _keep_one(keep: Keep, moments: GradientMoments) -> None:
    if moments.outputs is not None:
        keep.put(f"{moments.name}.outputs", pack_triangle(moments.outputs))
    keep.put(moments.name, pack_triangle(moments.inputs))  # the last one, as it says that the entry is whole


class _Kept:
    """Moments in a folder, as a source (see calibrate.assemble)."""

    def __init__(self, shapes: Mapping[str, Shape], keep: Keep, tokens: int, provenance: Provenance) -> None:
        self.provenance = provenance
        self._shapes, self._keep, self._tokens = shapes, keep, tokens

    def names(self) -> list[str]:
        return list(self._shapes)

    def entry(self, name: str) -> str:
        return name

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        return np.array([self._tokens], np.int64)

    def packed(self, name: str, matrix: int = 0) -> Floats:
        return np.asarray(self._keep.get(name))

    def packed_outputs(self, name: str) -> Floats | None:
        return np.asarray(self._keep.get(f"{name}.outputs")) if self._shapes[name].n_out else None
