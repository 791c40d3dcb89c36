"""Collects second moments of a model's inputs over texts, E[w xxᵀ], and writes the file that rounding reads.

What a token counts (w) comes from gradients, from trying what an error at its position costs, or is 1.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from bitladder.calibrate.collect_imatrix import ImatrixSums
from bitladder.calibrate.coverage import coverage_warning
from bitladder.calibrate.gradients.weighted_moments import GradientOptions
from bitladder.calibrate.imatrix import read_imatrix, write_imatrix
from bitladder.calibrate.moments.moments_file import MomentsFile, MomentsSource, write_sources
from bitladder.calibrate.moments.passes import IMATRIX_FILE, CollectedMoments, join_parts, run_passes
from bitladder.calibrate.moments.positions import PositionOptions
from bitladder.calibrate.moments_job import MOMENTS, MomentsJob, MomentsOptions, Path
from bitladder.engine import Decoding
from bitladder.errors import BitladderError, UsageError
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress
from bitladder.text import Reading, Text
from bitladder.units import number_of

COMPLETE = "complete"  # a piece that says that the sums of a text are
RoundingMoments = Literal["plain", "weighted"]


@dataclasses.dataclass(frozen=True)
class MomentsResult:
    """What was written.

    Parameters:
        path: the file.
        weights: weights that it covers.
        entries: entries that they share.
        chunks: chunks that are in it.
        passes: passes over these chunks.
        weighting: what a token counted by.
        gaps: experts that no token reached, by weight.
    """

    path: pathlib.Path
    weights: int
    entries: int
    chunks: int
    passes: int
    weighting: str
    gaps: dict[str, list[int]]


# Nine parameters: the inputs, the outputs, options of three kinds, and who hears of the work.
def collect_moments(
    model: Path,
    texts: Sequence[Text],
    out: Path,
    *,
    reading: Reading | None = None,
    decoding: Decoding | None = None,
    options: MomentsOptions | None = None,
    imatrix: Path | None = None,
    in_files: Sequence[Path] = (),
    progress: Progress = SILENT,
) -> MomentsResult:
    """Collects the second moments of a model's inputs over some texts and writes them (format: `moments.moments_file`).

    What is finished stays in the folder `out`.parts, and the state of the pass at hand is kept there each minute. A
    call that was interrupted continues from there.

    Parameters:
        model: path of a full-precision GGUF.
        texts: the calibration texts, at least one.
        out: path of the file to write.
        reading: which chunks of each text are read; None reads all.
        decoding: chunks of `n_ctx` tokens, one at a time, `n_ubatch` tokens in a computation.
        options: what a token counts, and what is collected.
        imatrix: path of an importance matrix to write from the same chunks, if any.
        in_files: moments to add.
        progress: hears of the work.

    Raises:
        BitladderError: a text is too short, a value is not finite, a file is of another model, or gradients cannot be
            had (see `gradients.weighted_moments`).
        UsageError: there is no text, or chunks are shorter than MIN_CALIBRATION_CTX tokens.
    """
    job = MomentsJob(model, texts, reading, decoding, options, imatrix=imatrix is not None, progress=progress)
    return collect_job(job, pathlib.Path(out), imatrix=imatrix, in_files=in_files)


@MOMENTS.entry
def collect_job(
    job: MomentsJob, out: pathlib.Path, *, imatrix: Path | None = None, in_files: Sequence[Path] = ()
) -> MomentsResult:
    """Collects what a job describes. The parameters, the result and errors are those of `collect_moments`."""
    decoding, passes, progress = job.decoding, 1, job.progress
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(MomentsFile(path)) for path in in_files]
        work = job.work(out)
        with job.read(work) as (loaded, inputs, chunks, by_text):
            provenance = job.provenance(len(chunks))
            beside = None
            if imatrix is not None:
                beside = ImatrixSums(inputs, job.options.imatrix.process_output), provenance.datasets
            if job.weighting != "gradients":
                planned = job.passes(inputs, chunks, work)
                passes = len(planned)
                if passes > 1:
                    progress.info(
                        f"{number_of(passes, 'pass', 'passes')} over the chunks; more memory (--memory) would need "
                        "fewer"
                    )
                last = run_passes(loaded, chunks, by_text, planned, work, beside, decoding, progress)
                source: MomentsSource = CollectedMoments(planned, last, work, provenance)
            elif beside is not None:
                run_passes(loaded, chunks, by_text, [[]], work, beside, decoding, progress)
        if job.weighting == "gradients":
            source = job.gradients(chunks, by_text).collect(work, provenance, progress)
        result = _write(out, [source, *others], passes, job.reading.expert_coverage, progress)
        if imatrix is not None:
            write_imatrix(read_imatrix(work.path(IMATRIX_FILE)), imatrix, job.options.imatrix.form)
    work.remove()
    return result


@MOMENTS.entry
def collect_text(job: MomentsJob, out: pathlib.Path, number: int) -> pathlib.Path:
    """Leaves the sums of one text in a folder beside `out`, for `join_texts`. What is there is not made again.

    Parameters:
        job: all texts, and how they are read.
        out: path of the file that is to be.
        number: of the text.

    Returns:
        The last file of the folder that is written.

    Raises:
        BitladderError: as `collect_moments`.
    """
    work = job.work(out, number)
    complete = work.folder / COMPLETE
    if work.has(COMPLETE):
        return complete
    with job.read(work, number) as (loaded, inputs, chunks, by_text):
        if job.weighting != "gradients":
            run_passes(
                loaded, chunks, by_text, job.passes(inputs, chunks, work), work, None, job.decoding, job.progress
            )
    if job.weighting == "gradients":
        job.gradients(chunks, by_text).collect_text(work, job.progress)
    work.put(COMPLETE, np.zeros(0))
    return complete


@MOMENTS.entry
def join_texts(job: MomentsJob, out: pathlib.Path) -> MomentsResult:
    """Writes the moments of all texts from what `collect_text` left of each: the bytes of `collect_moments`.

    Parameters:
        job: as of `collect_text`.
        out: path of the file.

    Raises:
        BitladderError: the sums of a text are missing or damaged.
    """
    works = [job.work(out, number) for number in range(len(job.texts))]
    for work in works:
        if not work.has(COMPLETE):
            raise BitladderError(f"{work.folder} is not complete; give the command again")
    whole = job.work(out)
    with job.read(works[0]) as (_, inputs, chunks, by_text):
        provenance, passes = job.provenance(len(chunks)), 1
        if job.weighting != "gradients":
            planned = job.passes(inputs, chunks, works[0])
            join_parts(planned, works, whole, job.progress)
            source: MomentsSource = CollectedMoments(planned, {}, whole, provenance)
            passes = len(planned)
    if job.weighting == "gradients":
        source = job.gradients(chunks, by_text).join(works, whole, provenance, job.progress)
    result = _write(out, [source], passes, job.reading.expert_coverage, job.progress)
    for work in (*works, whole):
        work.remove()
    return result


def merge_moments(out: Path, in_files: Sequence[Path], *, progress: Progress = SILENT) -> MomentsResult:
    """Writes the mean of some files of moments, in which each token counts alike.

    Parameters:
        out: path of the file to write.
        in_files: files of moments, of one model.
        progress: hears of gaps.

    Raises:
        BitladderError: there is no file to merge, or the files do not fit together.
    """
    if not in_files:
        raise UsageError("nothing to do: give a text (-f) or moments to merge (--in-file)")
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(MomentsFile(path)) for path in in_files]
        return _write(pathlib.Path(out), sources, 0, None, progress)


def _write(
    out: pathlib.Path, sources: Sequence[MomentsSource], passes: int, wanted: int | None, progress: Progress
) -> MomentsResult:
    """Writes what some sources hold together, and warns of experts without data."""
    provenance = write_sources(out, sources)
    if len({source.provenance.model_sha256 for source in sources} - {""}) > 1:
        progress.warn(
            "the moments that were added are of different files. If these are not one model in several precisions, "
            "their sum belongs to none of them"
        )
    names = sources[0].names()
    counts = {name: np.sum([source.counts(name) for source in sources], axis=0) for name in names}
    gaps = {name: np.flatnonzero(each == 0).tolist() for name, each in counts.items() if not each.all()}
    tokens = max(int(each.max()) for each in counts.values())
    if warning := coverage_warning({name: each for name, each in counts.items() if len(each) > 1}, tokens, wanted):
        progress.warn(warning)
    entries = len({tuple(source.entry(name) for source in sources) for name in names})
    return MomentsResult(out, len(names), entries, provenance.chunk_count, passes, provenance.weighting, gaps)


@dataclasses.dataclass(frozen=True)
class RoundingMomentsOptions(Options):
    """Which second moments rounding gets. Gradients cost much, and correlations need many tokens: hence two files."""

    GROUP = "Rounding"

    moments_chunks: int = option(
        8,
        "--moments-chunks",
        least=1,
        metavar="N",
        help="Chunks of each calibration text, spread over it, for second moments.",
        efforts={"high": 64},
    )
    plain_share: int = option(2, least=1, help="Times as many chunks for moments in which all tokens count alike.")
    positions: PositionOptions = option(PositionOptions)
    gradients: GradientOptions = option(GradientOptions)


def job_for_rounding(
    model: Path,
    texts: Sequence[Text],
    kind: RoundingMoments,
    *,
    decoding: Decoding | None = None,
    options: RoundingMomentsOptions | None = None,
    expert_coverage: int | None = None,
    progress: Progress = SILENT,
) -> MomentsJob:
    """One of the two files that rounding needs: weighted moments, or plain ones of more chunks.

    Tokens are weighted by gradients where these can be had and trusted, and else by positions.

    Parameters:
        model: path of a full-precision GGUF.
        texts: the calibration texts.
        kind: "weighted", or "plain", in which all tokens count alike.
        decoding: as for `collect_moments`.
        options: how much is collected.
        expert_coverage: as of `Reading`.
        progress: hears of the work.

    Raises:
        BitladderError: as `collect_moments`.
    """
    options = options or RoundingMomentsOptions()
    if kind == "plain":
        chunks, weighting = options.plain_share * options.moments_chunks, MomentsOptions(weighting="tokens")
    else:
        chunks = options.moments_chunks
        weighting = MomentsOptions(positions=options.positions, gradients=options.gradients)
    reading = Reading(chunks=chunks, expert_coverage=expert_coverage)
    return MomentsJob(model, texts, reading, decoding, weighting, progress=progress)
