"""What is collected for a file of second moments, settled before a token is decoded: texts, weighting, chunks, keys."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from bitladder.calibrate.collect_imatrix import IMATRIX, ImatrixOptions, covering_chunks
from bitladder.calibrate.gradients.usable import (
    check_logits,
    has_half_products,
    require_torch,
    torch_threads,
    why_no_gradients,
)
from bitladder.calibrate.gradients.weighted_moments import GRADIENT_MOMENTS, GradientOptions, GradientWork
from bitladder.calibrate.inputs import Floats, WeightInput, model_inputs, refuse_short
from bitladder.calibrate.moments.collector import EntryPart, make_entries, plan_passes
from bitladder.calibrate.moments.positions import POSITIONS, PositionOptions, position_weights
from bitladder.calibrate.moments.schema import Provenance
from bitladder.calibrate.sum_order import ByText
from bitladder.calibrate.unfinished import UnfinishedWork, job_key
from bitladder.engine import Decoding, Model, Tokens, main_memory, sequence_logits, torch_device
from bitladder.errors import GradientsError, UsageError
from bitladder.files import sha256_file
from bitladder.gguf import joined_sha256, shards_of
from bitladder.keys import Algorithm
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress
from bitladder.text import Reading, Text

Weighting = Literal["gradients", "positions", "tokens"]
Path = str | os.PathLike[str]

MOMENTS = Algorithm(
    "moments",
    (
        "means of w xxᵀ; each input is added up once",
        "added up in float32; kept as correlations in F16 and diagonals in F32",
        "sums of each text begin at 0, and are added up in the order of the texts",
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


def usual_weighting(model: Path) -> Weighting:
    """What tokens count by if nobody chooses: "gradients" where they can be had (`why_no_gradients`), or "positions".

    Only the model's header is read. Whoever keeps moments under a key has this in the key. Where the logits show that
    gradients cannot be trusted, `collect_moments` takes positions all the same.
    """
    return "gradients" if why_no_gradients(model) is None else "positions"


class MomentsJob:
    """Texts, and how their moments are collected.

    Parameters:
        model: path of a full-precision GGUF.
        texts: the calibration texts, at least one.
        reading: which chunks of each text are read; None reads all.
        decoding: chunks of `n_ctx` tokens, one at a time, `n_ubatch` tokens in a computation.
        options: what a token counts, and what is collected.
        imatrix: whether an importance matrix is collected too.
        progress: hears of the work.

    Attributes:
        weighting: what a token counts by.

    Raises:
        BitladderError: gradients cannot be had.
        UsageError: there is no text, or chunks are shorter than MIN_CALIBRATION_CTX tokens.
    """

    def __init__(
        self,
        model: Path,
        texts: Sequence[Text],
        reading: Reading | None = None,
        decoding: Decoding | None = None,
        options: MomentsOptions | None = None,
        *,
        imatrix: bool = False,
        progress: Progress = SILENT,
    ) -> None:
        self.model, self.texts, self.progress = model, texts, progress
        self.reading, self.decoding = reading or Reading(), decoding or Decoding()
        self.options = options = options or MomentsOptions()
        self._imatrix = imatrix
        refuse_short({"-c": self.decoding.n_ctx} | ({"-ub": self.decoding.n_ubatch} if imatrix else {}))
        if not texts:
            raise UsageError("second moments need a text: pass -f")
        self.weighting: Weighting = options.weighting or usual_weighting(model)
        if options.weighting is None:
            reason = why_no_gradients(model)
            if self.weighting == "gradients":
                reason = self._why_not_trusted()
                self.weighting = "positions" if reason else self.weighting
            progress.info(f"tokens are weighted by {self.weighting}" + (f": {reason}" if reason else ""))
        self._device = torch_device(self.decoding.device) if self.weighting == "gradients" else None

    def work(self, out: pathlib.Path, text: int | None = None) -> UnfinishedWork:
        """The folder of unfinished work beside a file; of one text, which other machines may read, if one is named."""
        settings = [self.reading, self.decoding, self.decoding.n_ubatch, self.options, self.weighting, self._imatrix]
        if self.weighting == "gradients":
            device = self._device
            modules = importlib.metadata.version("transformers")
            settings += [str(require_torch().__version__), modules, has_half_products(device)]
            settings += [] if device is None else [device]
        if text is None:
            return UnfinishedWork(out, job_key(self.model, self.texts, MOMENTS, IMATRIX, settings=settings))
        settings.append(text)
        key = job_key(self.model, self.texts, MOMENTS, IMATRIX, sha256=self._sha256, settings=settings)
        return UnfinishedWork(out.with_name(f"{out.name}.text-{text}"), key)

    @contextlib.contextmanager
    def read(
        self, work: UnfinishedWork, text: int | None = None
    ) -> Iterator[tuple[Model, list[WeightInput], Tokens, ByText]]:
        """Loads the model, and reads the texts.

        Parameters:
            work: keeps what is found on the way.
            text: number of the one text that is to be collected; None collects all.

        Yields:
            The model, its inputs (none where only the vocabulary is needed), the chunks of all texts, int32
            [chunks, n_ctx], and which of them are of which text.
        """
        decoding, coverage = self.decoding, self.reading.expert_coverage
        only_vocabulary = self.weighting == "gradients" and not self._imatrix and coverage is None
        with Model(self.model, vocab_only=only_vocabulary, gpu_layers=decoding.gpu_layers) as loaded:
            inputs = [] if only_vocabulary else model_inputs(loaded, decoding.threads)
            rows = covering_chunks(loaded, self.texts, self.reading, inputs, decoding, work, self.progress)
            yield loaded, inputs, np.concatenate(rows), ByText(tuple(map(len, rows)), text)

    def provenance(self, chunks: int) -> Provenance:
        """Where the moments of so many chunks come from."""
        datasets = [text.name for text in self.texts]
        return Provenance(datasets, chunks, self.decoding.n_ctx, self.weighting, self._sha256)

    @functools.cached_property
    def _sha256(self) -> str:
        return model_sha256(self.model)

    def passes(self, inputs: Sequence[WeightInput], chunks: Tokens, work: UnfinishedWork) -> list[list[EntryPart]]:
        """The parts of each pass over the chunks, where tokens are not weighted by gradients."""
        entries = make_entries(inputs, self._position_weights(chunks, work), self.decoding.n_ctx)
        return plan_passes(entries, self.options.memory_bytes())

    def gradients(self, chunks: Tokens, by_text: ByText) -> GradientWork:
        """The work where tokens are weighted by gradients."""
        options, memory = self.options.gradients, self.options.memory_bytes()
        return GradientWork(self.model, chunks, by_text, options, memory, self.decoding.threads, self._device)

    def _why_not_trusted(self) -> str | None:
        """Why gradients of a model cannot be trusted, after a look at its logits, or do not fit; None if they can."""
        with Model(self.model, vocab_only=True) as vocabulary:
            tokens = self.reading.rows(vocabulary, self.texts, self.decoding.n_ctx)[0]
        from bitladder.calibrate.gradients.forward import TorchModel
        from bitladder.calibrate.gradients.segments import choose_matrices, lanes_of, plan_entries, room_for_sums

        memory, threads = self.options.memory_bytes(), self.decoding.threads
        try:
            with torch_threads(threads), TorchModel(self.model, memory=memory // 2, threads=threads) as ours:
                check_logits(self.model, ours.checked(tokens), threads=threads, ours=ours)
                plans = plan_entries(ours, choose_matrices(ours, None), self.options.gradients)
                room_for_sums(ours, plans, memory, lanes_of(ours, memory, self.decoding.n_ctx, threads))
        except GradientsError as error:
            return str(error)
        return None

    def _position_weights(self, chunks: Tokens, work: UnfinishedWork) -> Mapping[str, Floats]:
        """What tokens count by their positions, measured or as it was kept; nothing where all count alike."""
        if self.weighting == "tokens":
            sequence_logits(self.model, chunks[0], threads=self.decoding.threads)  # refuses a model that overflows
            return {}
        if not work.has("positions"):
            profiles = position_weights(
                self.model, chunks, options=self.options.positions, decoding=self.decoding, progress=self.progress
            )
            work.put("positions.names", np.array(list(profiles)))
            work.put("positions", np.stack(list(profiles.values())))
        names = work.get("positions.names").tolist()
        return dict(zip(names, work.get("positions"), strict=True))


def model_sha256(model: Path) -> str:
    """The hash of a model's content, of all its shards."""
    return joined_sha256([sha256_file(part) for part in shards_of(pathlib.Path(model))])
