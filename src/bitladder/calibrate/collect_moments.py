"""Collects second moments of a model's inputs over texts, E[w xxᵀ], and writes the file that rounding reads.

What a token counts (w) comes from gradients, from trying what an error at its position costs, or is 1.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from bitladder.calibrate.collect_imatrix import IMATRIX, ImatrixOptions, ImatrixSums, covering_chunks
from bitladder.calibrate.coverage import coverage_warning
from bitladder.calibrate.gradients.usable import (
    check_logits,
    has_half_products,
    require_torch,
    torch_threads,
    why_no_gradients,
)
from bitladder.calibrate.gradients.weighted_moments import GRADIENT_MOMENTS, GradientOptions, moments_by_gradients
from bitladder.calibrate.imatrix import read_imatrix, write_imatrix
from bitladder.calibrate.inputs import Floats, model_inputs, refuse_short
from bitladder.calibrate.moments.collector import make_entries, plan_passes
from bitladder.calibrate.moments.moments_file import MomentsFile, MomentsSource, write_sources
from bitladder.calibrate.moments.passes import IMATRIX_FILE, CollectedMoments, run_passes
from bitladder.calibrate.moments.positions import POSITIONS, PositionOptions, position_weights
from bitladder.calibrate.moments.schema import Provenance
from bitladder.calibrate.unfinished import UnfinishedWork, job_key
from bitladder.engine import Decoding, Model, Tokens, main_memory, sequence_logits, torch_device
from bitladder.errors import GradientsError, UsageError
from bitladder.files import sha256_file
from bitladder.gguf import joined_sha256, shards_of
from bitladder.keys import Algorithm
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress
from bitladder.text import Reading, Text
from bitladder.units import number_of

Weighting = Literal["gradients", "positions", "tokens"]
RoundingMoments = Literal["plain", "weighted"]
Path = str | os.PathLike[str]

MOMENTS = Algorithm(
    "moments",
    (
        "means of w xxᵀ; each input is added up once",
        "added up in float32; kept as correlations in F16 and diagonals in F32",
    ),
    uses=(POSITIONS, GRADIENT_MOMENTS),
)


@dataclasses.dataclass(frozen=True)
class MomentsOptions(Options):
    """What a token counts, and what is collected."""

    weighting: Weighting | None = option(
        None,
        "--weighting",
        help="Weight of a token: the cost of an error there, by gradients (needs torch) or by its position (measured "
        "with noise); or 1.",
        unset="gradients if torch and transformers compute the model's logits, else positions",
    )
    memory: float | None = option(
        None,
        "--memory",
        least=1e-6,
        decides=False,
        metavar="GIB",
        help="GiB for the work. What does not fit is computed forward twice by gradients, and else takes another pass "
        "over the text.",
        unset="a quarter of main memory",
    )
    positions: PositionOptions = option(PositionOptions)
    gradients: GradientOptions = option(GradientOptions)
    imatrix: ImatrixOptions = option(ImatrixOptions)

    def memory_bytes(self) -> int:
        """Bytes for the work: `memory`, or a quarter of main memory."""
        return max(main_memory() // 4, 1 << 28) if self.memory is None else int(self.memory * 2**30)


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


def usual_weighting(model: Path) -> Weighting:
    """What tokens count by if nobody chooses: "gradients" where they can be had (`why_no_gradients`), or "positions".

    Only the model's header is read. Whoever keeps moments under a key has this in the key. Where the logits show that
    gradients cannot be trusted, `collect_moments` takes positions all the same.
    """
    return "gradients" if why_no_gradients(model) is None else "positions"


# Nine parameters: the inputs, the outputs, options of three kinds, and who hears of the work.
@MOMENTS.entry
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
    reading, decoding, options = reading or Reading(), decoding or Decoding(), options or MomentsOptions()
    refuse_short({"-c": decoding.n_ctx} | ({} if imatrix is None else {"-ub": decoding.n_ubatch}))
    if not texts:
        raise UsageError("second moments need a text: pass -f")
    out, datasets = pathlib.Path(out), [text.name for text in texts]
    weighting = options.weighting or usual_weighting(model)
    if options.weighting is None:
        reason = why_no_gradients(model)
        if weighting == "gradients":
            reason = _why_not_trusted(model, texts, reading, decoding, options)
            weighting = "positions" if reason else weighting
        progress.info(f"tokens are weighted by {weighting}" + (f": {reason}" if reason else ""))
    settings = [reading, decoding, decoding.n_ubatch, options, weighting, imatrix is not None]
    device = None
    if weighting == "gradients":
        torch_version, modules = str(require_torch().__version__), importlib.metadata.version("transformers")
        device = torch_device(decoding.device)
        settings += [torch_version, modules, has_half_products(device), *([] if device is None else [device])]
    passes = 1
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(MomentsFile(path)) for path in in_files]
        work = UnfinishedWork(out, job_key(model, texts, MOMENTS, IMATRIX, settings=settings))
        only_vocabulary = weighting == "gradients" and imatrix is None and reading.expert_coverage is None
        with Model(model, vocab_only=only_vocabulary, gpu_layers=decoding.gpu_layers) as loaded:
            inputs = [] if only_vocabulary else model_inputs(loaded, decoding.threads)
            chunks = covering_chunks(loaded, texts, reading, inputs, decoding, work, progress)
            provenance = Provenance(datasets, len(chunks), decoding.n_ctx, weighting, model_sha256(model))
            beside = None
            if imatrix is not None:
                beside = ImatrixSums(inputs, options.imatrix.process_output), datasets
            if weighting != "gradients":
                weights = _position_weights(model, chunks, work, decoding, options, progress)
                planned = plan_passes(make_entries(inputs, weights, decoding.n_ctx), options.memory_bytes())
                passes = len(planned)
                if passes > 1:
                    progress.info(
                        f"{number_of(passes, 'pass', 'passes')} over the chunks; more memory (--memory) would need "
                        "fewer"
                    )
                last = run_passes(loaded, chunks, planned, work, beside, decoding, progress)
                source: MomentsSource = CollectedMoments(planned, last, work, provenance)
            elif beside is not None:
                run_passes(loaded, chunks, [[]], work, beside, decoding, progress)
        if weighting == "gradients":
            source = moments_by_gradients(
                model,
                chunks,
                work,
                provenance,
                options.gradients,
                options.memory_bytes(),
                decoding.threads,
                device,
                progress,
            )
        result = _write(out, [source, *others], passes, reading.expert_coverage, progress)
        if imatrix is not None:
            write_imatrix(read_imatrix(work.path(IMATRIX_FILE)), imatrix, options.imatrix.form)
    work.remove()
    return result


def _why_not_trusted(
    model: Path, texts: Sequence[Text], reading: Reading, decoding: Decoding, options: MomentsOptions
) -> str | None:
    """Why gradients of a model cannot be trusted, after a look at its logits, or do not fit; None if they can."""
    with Model(model, vocab_only=True) as vocabulary:
        tokens = reading.rows(vocabulary, texts, decoding.n_ctx)[0]
    from bitladder.calibrate.gradients.forward import TorchModel
    from bitladder.calibrate.gradients.gradient_pass import choose_matrices, lanes_of, plan_entries, room_for_sums

    try:
        memory, threads = options.memory_bytes(), decoding.threads
        with torch_threads(threads), TorchModel(model, memory=memory // 2, threads=threads) as ours:
            check_logits(model, ours.checked(tokens), threads=threads, ours=ours)
            plans = plan_entries(ours, choose_matrices(ours, None), options.gradients)
            room_for_sums(ours, plans, memory, lanes_of(ours, memory, decoding.n_ctx, threads))
    except GradientsError as error:
        return str(error)
    return None


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


def model_sha256(model: Path) -> str:
    """The hash of a model's content, of all its shards."""
    return joined_sha256([sha256_file(part) for part in shards_of(pathlib.Path(model))])


def _position_weights(
    model: Path, chunks: Tokens, work: UnfinishedWork, decoding: Decoding, options: MomentsOptions, progress: Progress
) -> Mapping[str, Floats]:
    """What tokens count by their positions, measured or as it was kept; nothing where all count alike."""
    if options.weighting == "tokens":
        sequence_logits(model, chunks[0], threads=decoding.threads)  # refuses a model that overflows
        return {}
    if not work.has("positions"):
        profiles = position_weights(model, chunks, options=options.positions, decoding=decoding, progress=progress)
        work.put("positions.names", np.array(list(profiles)))
        work.put("positions", np.stack(list(profiles.values())))
    names = work.get("positions.names").tolist()
    return dict(zip(names, work.get("positions"), strict=True))


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


def collect_for_rounding(
    model: Path,
    texts: Sequence[Text],
    out: Path,
    kind: RoundingMoments,
    *,
    decoding: Decoding | None = None,
    options: RoundingMomentsOptions | None = None,
    expert_coverage: int | None = None,
    progress: Progress = SILENT,
) -> MomentsResult:
    """Collects one of the two files that rounding needs: weighted moments, or plain ones of more chunks.

    Tokens are weighted by gradients where these can be had and trusted, and else by positions.

    Parameters:
        model: path of a full-precision GGUF.
        texts: the calibration texts.
        out: path of the file.
        kind: "weighted", or "plain", in which all tokens count alike.
        decoding: as for `collect_moments`.
        options: how much is collected.
        expert_coverage: as of `Reading`.
        progress: hears of the work.

    Raises:
        BitladderError: as `collect_moments`.
    """
    options = options or RoundingMomentsOptions()
    weighting = MomentsOptions(positions=options.positions, gradients=options.gradients)
    chunks = options.moments_chunks
    if kind == "plain":
        weighting, chunks = MomentsOptions(weighting="tokens"), options.plain_share * chunks
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    return collect_moments(
        model,
        texts,
        out,
        reading=Reading(chunks=chunks, expert_coverage=expert_coverage),
        decoding=decoding,
        options=weighting,
        progress=progress,
    )
