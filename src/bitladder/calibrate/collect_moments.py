"""Collecting second moments without gradients: decode texts, watch every multiplication, add up w xxᵀ of its inputs.

An input that several weights multiply is added up once. Where the sums of all inputs do not fit into the memory that
is allowed, texts are decoded again for the rest, each time only as far as is needed.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.collect_imatrix import MIN_CTX, SAVE_SECONDS
from bitladder.calibrate.imatrix import read_imatrix, write_imatrix
from bitladder.calibrate.inputs import choose_inputs, model_inputs
from bitladder.calibrate.moments.assemble import Source, write_sources
from bitladder.calibrate.moments.entries import make_entries, plan_passes
from bitladder.calibrate.moments.moments_file import Floats, MomentsFile, Provenance
from bitladder.calibrate.moments.passes import IMATRIX, Collected, ImatrixBeside, run_passes
from bitladder.calibrate.moments.positions import position_weights
from bitladder.calibrate.unfinished import Keep, job_key
from bitladder.engine.devices import main_memory
from bitladder.engine.model import Model, Tokens
from bitladder.errors import BitladderError, UsageError
from bitladder.files import sha256_bytes, sha256_file
from bitladder.gguf.shards import joined_sha256, shards_of
from bitladder.progress import SILENT, Progress
from bitladder.text.chunks import Reading, spread_evenly
from bitladder.text.texts import Text

MEMORY_SHARE = 4  # of main memory one part in so many is used, if nothing else is said
POSITION_CHUNKS = 8  # on so many chunks is tried what an error at a position costs
WEIGHTINGS = ("tokens", "positions")


@dataclasses.dataclass(frozen=True)
class MomentsResult:
    """The file, the weights that it covers, how many entries they share, chunks in it, passes over them that were
    made, how tokens were weighted, and experts that no token reached, by weight."""

    path: pathlib.Path
    weights: int
    entries: int
    chunks: int
    passes: int
    weighting: str
    gaps: dict[str, list[int]]


def collect_moments(
    model: str | os.PathLike[str],
    texts: Sequence[Text],
    out: str | os.PathLike[str],
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    from_chunk: int = 0,
    spread: bool = True,
    parse_special: bool = False,
    weighting: str = "tokens",
    weights: Mapping[str, npt.NDArray[np.floating]] | None = None,
    names: Sequence[str] | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    process_output: bool = False,
    in_files: Sequence[str | os.PathLike[str]] = (),
    memory: int | None = None,
    n_ubatch: int = 512,
    threads: int | None = None,
    gpu_layers: int = 0,
    save_seconds: float = SAVE_SECONDS,
    progress: Progress = SILENT,
) -> MomentsResult:
    """Collect the second moments of a model's inputs over some texts and write them (format: `moments`).

    Parameters: every text is cut into chunks of `n_ctx` tokens; `from_chunk` are skipped at its start and at most
    `chunks` used, which `spread` takes from all over the text: its beginning alone is rarely like the rest. `weighting`
    "tokens" counts all alike, "positions" by what an error at the position costs (`position_weights`); or `weights`
    say it, by weight's name, [n_ctx] or [all chunks, n_ctx], scaled to mean 1. `names` of weights (None: all, the head
    included). `imatrix` is a file for the importance matrix of the same chunks, with output.weight in it if
    `process_output`. `in_files` are moments to add (without texts they are only merged). `memory` bytes are used for
    sums (None: a quarter of main memory), more only if a single matrix does not fit. `n_ubatch` tokens are computed at
    once. What is finished stays in the folder `out`.parts, and the pass at hand is kept there every `save_seconds`; a
    run that was cut short goes on from there.

    Raises BitladderError: text too short, values not finite, files of another model; UsageError for options that make
    no sense.
    """
    out = pathlib.Path(out)
    if n_ctx < MIN_CTX:
        raise UsageError(f"-c {n_ctx} is too short: at least {MIN_CTX} tokens are needed")
    if weighting not in WEIGHTINGS:
        raise UsageError(f"tokens are weighted by {' or '.join(WEIGHTINGS)} here, not by {weighting!r}")
    if not texts and imatrix is not None:
        raise UsageError("an imatrix beside the moments needs a text (-f)")
    if not texts:
        return merge_moments(out, in_files, progress)
    with contextlib.ExitStack() as opened:
        others: list[Source] = [opened.enter_context(MomentsFile(path)) for path in in_files]
        reading = Reading(n_ctx, chunks, from_chunk, spread, parse_special)
        layout: dict[str, Any] = {"n_ubatch": n_ubatch, "threads": threads, "progress": progress}
        beside = [imatrix is not None, process_output]
        options = [dataclasses.asdict(reading), weighting, _digest(weights), names and sorted(names), beside, n_ubatch]
        keep = Keep(out, job_key(model, texts, options), save_seconds)
        with Model(model, gpu_layers=gpu_layers) as loaded:
            rows = reading.rows(loaded, texts)
            inputs = model_inputs(loaded, threads)
            wanted = choose_inputs(inputs, names, loaded.path.name)
            if weights is None and weighting == "positions":
                weights = _try_positions(model, rows, keep, threads, gpu_layers, progress)
            entries = make_entries(wanted, weights, len(rows), n_ctx)
            passes = plan_passes(entries, memory or max(main_memory() // MEMORY_SHARE, 1 << 28))
            if len(passes) > 1:
                progress.info(f"{len(passes)} passes over the chunks; more memory (--memory) would need fewer")
            matrix = ImatrixBeside(inputs, [text.name for text in texts], process_output) if imatrix else None
            last = run_passes(loaded, rows, passes, keep, matrix, **layout)
        label = weighting if weights is None else "positions"
        provenance = Provenance([text.name for text in texts], len(rows), n_ctx, label, model_sha256(model))
        result = write_result(out, [Collected(passes, last, keep, provenance), *others], len(passes), progress)
        if imatrix is not None:
            write_imatrix(read_imatrix(keep.path(IMATRIX)), imatrix)
    keep.remove()
    return result


def merge_moments(
    out: pathlib.Path, in_files: Sequence[str | os.PathLike[str]], progress: Progress = SILENT
) -> MomentsResult:
    """Write the mean of some files of moments, each token counting alike. Raises BitladderError if they do not fit."""
    if not in_files:
        raise BitladderError("nothing to do: give a text (-f) or moments to merge (--in-file)")
    with contextlib.ExitStack() as opened:
        return write_result(out, [opened.enter_context(MomentsFile(path)) for path in in_files], 0, progress)


def write_result(out: pathlib.Path, sources: Sequence[Source], passes: int, progress: Progress) -> MomentsResult:
    """Write what some sources hold together, and warn of experts without data."""
    provenance = write_sources(out, sources)
    gaps = {}
    names = sources[0].names()
    for name in names:
        counts = np.sum([source.counts(name) for source in sources], axis=0)
        if not counts.all():
            gaps[name] = np.flatnonzero(counts == 0).tolist()
    if gaps:
        progress.warn(
            f"{sum(map(len, gaps.values()))} experts in {len(gaps)} weights were reached by no token: nothing is known "
            "of their inputs. Use more, or more varied, calibration text"
        )
    entries = len({tuple(source.entry(name) for source in sources) for name in names})
    return MomentsResult(out, len(names), entries, provenance.chunk_count, passes, provenance.weighting, gaps)


def model_sha256(model: str | os.PathLike[str]) -> str:
    """The hash of a model's content, of all its shards."""
    return joined_sha256([sha256_file(part) for part in shards_of(pathlib.Path(model))])


def _digest(weights: Mapping[str, npt.NDArray[np.floating]] | None) -> str:
    if weights is None:
        return ""
    return sha256_bytes(
        b"".join(name.encode() + weights[name].astype(np.float32).tobytes() for name in sorted(weights))
    )


def _try_positions(
    model: str | os.PathLike[str], rows: Tokens, keep: Keep, threads: int | None, gpu_layers: int, progress: Progress
) -> dict[str, Floats]:
    """What positions cost, tried on some of the chunks, or as it is kept."""
    if not keep.has("positions"):
        few = rows[spread_evenly(len(rows), min(POSITION_CHUNKS, len(rows)))]
        found = position_weights(model, few, threads=threads, gpu_layers=gpu_layers, progress=progress)
        keep.put("positions.names", np.array(list(found)))
        keep.put("positions", np.stack(list(found.values())))
    names, profiles = keep.get("positions.names"), keep.get("positions")
    return dict(zip(names.tolist(), profiles, strict=True))
