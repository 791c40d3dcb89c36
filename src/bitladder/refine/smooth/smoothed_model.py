"""Writing a smoothed model, and trying whether that helps.

It has the same tensors and types, scales moved and channels ordered, and the same logits. Its importance matrix and
second moments change with it. For the trial a preset of the model as it is, and of the smoothed model, is measured on a
text.
"""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from bitladder.calibrate import Imatrix, read_imatrix, write_imatrix
from bitladder.engine import Aside, Context, Decoding, Model, logit_differences, sequence_logits, threads_available
from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate import MEASURE, decision_chunk, decision_settings, measure, paired_mean
from bitladder.files import refuse_inputs, replacing, sha256_file, sync_file
from bitladder.gguf import EMBEDDING, GgufFile, open_model
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.quantize import QUANTIZE, QuantizeOptions, quantize
from bitladder.refine.model_files import Floats, ModelFiles, copy_model
from bitladder.refine.options import SmoothingOptions
from bitladder.refine.smooth.changes import Change, changed_imatrix, changed_rows, changes_of, smoothed_moments
from bitladder.refine.smooth.links import FLOATS, Link, SmoothingError, link_importance, link_scales, links_of
from bitladder.refine.smooth.order import Order, find_order
from bitladder.text import EXCERPTS, Text, excerpts
from bitladder.trial import kept_base
from bitladder.units import number_of

SMOOTHING = Algorithm(
    "smoothing",
    (
        "channels are rescaled by powers of two between norms, v, up and the weights behind them",
        "channels are ordered where the head cannot be scaled",
        "the norm before a head stays where prediction heads share the head",
    ),
)

KEY = "bitladder.smooth.imatrix.sha256"  # in files that are smoothed: the importance matrix they were smoothed by
CHECKED_TOKENS = 64
SMOOTHING_TRIAL = Algorithm(
    "smoothing trial",
    (
        "quants of both models are compared with full precision",
        "chunks have half the length, and all their tokens but the first sixteenth are scored",
        "files of both are measured as rungs are",
        "a gain within the error of the difference is none",
    ),
    uses=(EXCERPTS, MEASURE, QUANTIZE, SMOOTHING),
)
PRESET = "Q4_K_M"


@dataclasses.dataclass(frozen=True)
class SmoothResult:
    """A smoothed model.

    Parameters:
        links: links used, by kind.
        head_noise: the expected factor of the error of the head's rounded inputs; None if the order stayed.
        moved: how far logits moved at most, as a share of their range.
        changes: what happened to each tensor.
    """

    links: dict[str, int]
    head_noise: float | None
    moved: float
    changes: dict[str, Change] = dataclasses.field(repr=False)


@SMOOTHING.entry
def smooth_model(
    source: ModelFiles,
    out: ModelFiles,
    options: SmoothingOptions | None = None,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> SmoothResult:
    """Writes a model whose channels are rescaled and ordered, its importance matrix and its second moments.

    The logits of some tokens are compared. A kind of link that changes them is left out, with a warning, and so is the
    order.

    Parameters:
        source: an F32, F16 or BF16 model, its importance matrix and its second moments.
        out: paths of the files to write; as many second moments as `source` has.
        options: what is done.
        threads: threads of the CPU; None takes all.
        progress: where work is shown.

    Raises:
        SmoothingError: weights are quantized, or nothing can change without changing the logits.
        BitladderError: the matrix is of another model, or scaled weights overflow.
    """
    options = options or SmoothingOptions()
    if source.imatrix is None or out.imatrix is None:
        raise UsageError("smoothing needs an importance matrix: pass --imatrix")
    matrix, digest = read_imatrix(source.imatrix), sha256_file(source.imatrix)
    with open_model(source.model) as file, contextlib.ExitStack() as opened:
        refuse_inputs([out.model, out.imatrix, *out.moments], [*file.parts, source.imatrix, *source.moments])
        if file.get(KEY):
            raise BitladderError(f"{file.path} is smoothed already")
        _refuse_other_imatrix(file, matrix, source.imatrix)
        # The library takes a while to load a model, in one thread.
        loaded = opened.enter_context(Aside(threads)).submit(Model, source.model, repack=False)
        opened.callback(_close, loaded)
        parts = _Parts(
            link_scales(file, _links(file, matrix, source.imatrix), matrix, options, progress, threads)
            if options.scales
            else [],
            find_order(file, loaded, options, threads) if options.order else None,
        )
        if not parts.names():
            raise SmoothingError(
                f"{file.path}: no other order of channels is known to be better; one is sought where embeddings are "
                "the head and their width is a multiple of 256"
            )
        with replacing(out.model) as temporary:
            attempt = _Attempt(file, loaded.result(), digest, temporary, threads)
            make = functools.partial(_write, attempt, source, out, options, threads=threads, progress=progress)
            try:
                moved = make(parts)
            except _MovedError:
                parts = parts.only([name for name in parts.names() if attempt.neutral(parts.only([name]), options)])
                progress.warn(
                    f"{file.path.name} has other tensors that read channels: only "
                    f"{', '.join(parts.names()) or 'nothing'} can change"
                )
                try:
                    if not parts.names():
                        raise
                    moved = make(parts)
                except _MovedError:
                    remedy = "no scale can move without changing the logits; do not smooth it"
                    raise SmoothingError(f"{file.path}: {remedy}") from None
    changes = parts.changes()
    write_imatrix(changed_imatrix(matrix, changes), out.imatrix)
    return SmoothResult(parts.links(), None if parts.order is None else parts.order.noise, moved, changes)


class _MovedError(Exception):
    """Logits moved by more than they may."""


def _write(
    attempt: "_Attempt",
    source: ModelFiles,
    out: ModelFiles,
    options: SmoothingOptions,
    parts: "_Parts",
    *,
    threads: int | None,
    progress: Progress,
) -> float:
    """Writes the model, and its moments while logits are compared. Returns how far those moved."""
    attempt.write(parts, progress)
    count = threads or threads_available()
    share = count // 4  # of each model; threads of a context spin where they do not have a CPU each
    with attempt.comparing(max(1, share if source.moments else count // 2)) as moved:

        def approve() -> None:
            if not moved.result() <= options.tolerance:
                raise _MovedError

        if moved.done():
            approve()  # a single thread has compared them already
        smoothed_moments(
            source.moments, parts.changes(), out.moments, attempt.sha256, threads=count - 2 * share, approve=approve
        )
        approve()
        return moved.result()


def _close(loaded: Future[Model]) -> None:
    if loaded.exception() is None:
        loaded.result().close()


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What can be done to a model: scales by link, and an order."""

    scales: list[tuple[Link, Floats]]
    order: Order | None

    def names(self) -> list[str]:
        """Kinds of links, and "order"."""
        return [*dict.fromkeys(link.kind for link, _ in self.scales), *(["order"] if self.order else [])]

    def only(self, names: Sequence[str]) -> "_Parts":
        """The parts of these names."""
        kept = [(link, scale) for link, scale in self.scales if link.kind in names]
        return _Parts(kept, self.order if "order" in names else None)

    def links(self) -> dict[str, int]:
        """How many links of each kind."""
        return dict(collections.Counter(link.kind for link, _ in self.scales))

    def changes(self) -> dict[str, Change]:
        """What happens to each tensor."""
        return changes_of(self.scales, self.order)


class _Attempt:
    """Writes changed models to one path, and compares their logits with those of the model before.

    Attributes:
        sha256: of the last model that was written.
    """

    def __init__(self, file: GgufFile, before: Model, digest: str, out: pathlib.Path, threads: int | None) -> None:
        self._file, self._before, self._digest, self._out, self._threads = file, before, digest, out, threads
        vocabulary = file.tensors[EMBEDDING].shape[1]
        self._tokens = np.random.default_rng(0).integers(0, vocabulary, CHECKED_TOKENS).astype(np.int32)
        self._expected: Future[Floats] | None = None  # the logits before
        self.sha256 = ""

    def write(self, parts: _Parts, progress: Progress = SILENT) -> None:
        """Writes the model."""
        changes: Mapping[str, Change] = parts.changes()
        self.sha256 = copy_model(
            self._file,
            self._out,
            (KEY, self._digest),
            lambda tensor: changed_rows(self._file, tensor, changes.get(tensor.name, Change())),
            label="write the smoothed model",
            threads=self._threads,
            progress=progress,
        )

    @contextlib.contextmanager
    def comparing(self, threads: int) -> Iterator[Future[float]]:
        """Compares logits while the block does other work. An exception of the block ends the comparison.

        Each model has so many threads. Yields the largest difference of logits of what was written, as a share of the
        range of those of the position.
        """
        contexts: list[Context] = []
        ended = threading.Event()

        def watch(context: Context) -> None:
            contexts.append(context)
            if ended.is_set():
                context.stop()

        def logits(model: Model | pathlib.Path) -> Floats:
            return sequence_logits(model, self._tokens, threads=threads, watch=watch)

        def difference() -> float:
            return float(logit_differences(after.result(), before.result()).max())

        with Aside(self._threads) as disk, Aside(self._threads) as first, Aside(self._threads) as second:
            synced = disk.submit(sync_file, self._out)
            before = self._expected = self._expected or first.submit(logits, self._before)
            after = second.submit(logits, self._out)
            try:
                yield first.submit(difference)
                synced.result()
            except BaseException:
                ended.set()
                for context in contexts:
                    context.stop()
                raise

    def neutral(self, parts: _Parts, options: SmoothingOptions) -> bool:
        """Whether the logits stay if only these parts of the model change."""
        self.write(parts)
        with self.comparing(max(1, (self._threads or threads_available()) // 2)) as moved:
            return moved.result() <= options.tolerance


def _refuse_other_imatrix(file: GgufFile, matrix: Imatrix, path: pathlib.Path) -> None:
    """An order needs no entry of any link, but it moves the columns of all links."""
    for name, entry in matrix.entries.items():
        tensor = file.tensors.get(name)
        if tensor is not None and entry.sums.shape[1] != tensor.width:
            raise BitladderError(
                f"{path} belongs to another model: {name} has {number_of(entry.sums.shape[1], 'column')} there"
            )
    if not matrix.entries.keys() & file.tensors.keys():
        raise BitladderError(f"{path} belongs to another model: it has no entry for {file.path.name}'s weights")


def _links(file: GgufFile, matrix: Imatrix, path: pathlib.Path) -> list[Link]:
    """The links whose importance is known. Raises SmoothingError if weights are quantized."""
    links = [link for link in links_of(file) if link_importance(matrix, link) is not None]
    if not links:
        raise BitladderError(f"{path} belongs to another model: it has no entry for {file.path.name}'s weights")
    for link in links:
        for name in (*link.makers, *link.readers):
            kind = file.tensors[name].type.name
            if kind not in FLOATS:
                raise SmoothingError(
                    f"{file.path}: {name} is {kind}; scales move between F32, F16 or BF16 weights only, so smooth the "
                    "full-precision model"
                )
    return links


@dataclasses.dataclass(frozen=True)
class SmoothingTrial:
    """A preset of both models.

    Parameters:
        preset: its name.
        before: KLD with the model as it is, nats per token.
        after: KLD with the smoothed model.
        error: standard error of the difference.
        tokens: how many tokens were scored.
    """

    preset: str
    before: float
    after: float
    error: float
    tokens: int

    @property
    def helps(self) -> bool:
        """Whether the quant of the smoothed model is nearer to full precision by more than the error of the difference.

        A run prices types for each model that a rung is made of, so a rung is not smoothed for nothing.
        """
        return self.after + self.error < self.before


# Nine parameters: the two models, how they are compared, and what of that is there already.
@SMOOTHING_TRIAL.entry
def try_smoothing(
    plain: ModelFiles,
    smoothed: ModelFiles,
    text: Text,
    decoding: Decoding,
    options: SmoothingOptions | None = None,
    *,
    preset: QuantizeOptions | None = None,
    quant: pathlib.Path | None = None,
    work: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> SmoothingTrial:
    """Makes a preset of both models with the library's kernels, and measures both against the full precision.

    Parameters:
        plain: the model as it is, and its importance matrix.
        smoothed: the smoothed model, and its importance matrix.
        text: what is predicted: a text that the result is not judged by.
        decoding: how models are decoded.
        options: on how many chunks.
        preset: the preset; None for Q4_K_M.
        quant: the preset of the model as it is; None makes it.
        work: folder in which the predictions of full precision are kept for the next trial; None keeps nothing.
        progress: where work is shown.

    Raises:
        BitladderError: the preset cannot be made, or a model does not decode.
    """
    settings = decision_settings(decoding, (options or SmoothingOptions()).trial_chunks)
    preset, klds = preset or QuantizeOptions(PRESET), []
    with (
        tempfile.TemporaryDirectory(
            dir=plain.model.parent if work is None else work, prefix=".trial.", suffix=".tmp"
        ) as temporary,
        kept_base(work or pathlib.Path(temporary), plain.model, text, settings, progress) as base,
    ):
        own = pathlib.Path(temporary, "quant.gguf")
        for files, made in ((plain, quant), (smoothed, None)):
            if made is None:
                quantize(files.model, own, preset, imatrix=files.imatrix, threads=decoding.threads, progress=progress)
            measured = measure(made or own, text, settings, base=base, progress=progress)
            klds.append(measured.arrays["kld"])
            own.unlink(missing_ok=True)
        chunks = settings.limit(len(base.chunks))
    before, after = klds
    gap = paired_mean(after, before, chunks)
    return SmoothingTrial(preset.preset or PRESET, float(before.mean()), float(after.mean()), gap.error, before.size)


def trial_text(calibration: Sequence[Text], options: SmoothingOptions, n_ctx: int) -> Text:
    """Passages of the calibration texts on which smoothing is tried.

    Parameters:
        calibration: the texts.
        options: how many chunks, and where they begin.
        n_ctx: tokens of a chunk, of which a trial's has half.
    """
    return excerpts(calibration, options.trial_chunks, decision_chunk(n_ctx), offset=options.trial_offset)
