"""A file of log-probabilities as a base to compare with. The figures are llama-perplexity's."""

import dataclasses
import functools
import pathlib

import numpy as np
import numpy.typing as npt

from bitladder.engine import Lanes, Model
from bitladder.errors import BitladderError
from bitladder.evaluate.base.logits_file import Codes, Floats, LogitsFile, LogitsLayout
from bitladder.evaluate.divergence import BaseRows
from bitladder.evaluate.identity import MeasureOptions
from bitladder.evaluate.token_scores import TokenScores, compare_with_base
from bitladder.files import Closing, sha256_file
from bitladder.progress import SILENT, Progress
from bitladder.text import Chunks, Text
from bitladder.units import number_of

Doubles = npt.NDArray[np.float64]

# llama-perplexity leaves log-probabilities of −16 and less out of its divergence. They add nothing to the sum if they
# are replaced by a number whose exponential is 0.
_LEAST = np.float32(-16)
_NOTHING = np.float32(-1e4)
# Largest distance of the sum of a row's probabilities from 1. Those that are left out, e^−16 each, are a few percent.
_TOLERANCE = 0.1
_NUMBERS = 1 << 18  # of a block of rows × vocabulary, about, so that it fits into a core's cache
_MIN_WIDTH, _MAX_WIDTH = 256, 4096


class LogitsBase(Closing):
    """An open file of log-probabilities as a `divergence.Base`.

    Parameters:
        file: the open file.
        bos: the token that replaced the first one of each chunk when the file was made; None if none did. The file
            does not contain this.
    """

    def __init__(self, file: LogitsFile, bos: int | None) -> None:
        self.file = file
        self.chunks = Chunks(file.tokens, bos, file.layout.chunks)
        self._mass: dict[int, Doubles] = {}
        self._buffers: dict[int, Floats] = {}

    @property
    def name(self) -> str:
        """The file's name, without folder. The file does not name its model."""
        return self.file.path.name

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the file's content."""
        return sha256_file(self.file.path)

    @property
    def layout(self) -> LogitsLayout:
        """Sizes of context, vocabulary and file."""
        return self.file.layout

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def rows(self, chunk: int) -> BaseRows:
        """What is kept of a chunk's scored rows; `top_logit` is a log-probability. Raises as `mass`."""
        self.mass(chunk)
        codes, scale, floor = self.file.read(chunk)
        every = np.arange(len(codes))
        top = codes.argmax(axis=1)
        targets = self.chunks.targets(chunk)
        nll = -(scale * codes[every, targets] + floor)
        return BaseRows(nll.astype(np.float64), top.astype(np.int32), scale * codes[every, top] + floor)

    def mass(self, chunk: int) -> Doubles:
        """The sum of the probabilities above e^−16 of each scored row, float64 [scored]: near 1, but not 1.

        It is computed once for each chunk.

        Raises:
            BitladderError: a sum is far from 1; the error names chunk and row.
        """
        if chunk in self._mass:
            return self._mass[chunk]
        sums = np.empty(self.layout.scored)
        for row, parts in enumerate(zip(*self.file.read(chunk), strict=True)):
            codes, scale, floor = parts
            logs = scale * codes + floor
            sums[row] = np.exp(logs, where=logs > _LEAST, out=np.zeros_like(logs)).sum(dtype=np.float64)
        wrong = np.flatnonzero(~(np.abs(sums - 1) < _TOLERANCE))
        if len(wrong):
            raise BitladderError(
                f"{self.file.path}: the probabilities in row {wrong[0] + 1} of chunk {chunk + 1} sum to "
                f"{sums[wrong[0]]:.3g}: the file is damaged; make it again"
            )
        self._mass[chunk] = sums
        return sums

    def logits(self, chunk: int, start: int, stop: int) -> "LogProbabilities":
        """Log-probabilities of a chunk's scored rows start … stop−1, which serve as logits."""
        codes, scale, floor = self.file.read(chunk)
        return LogProbabilities(self, codes[start:stop], scale[start:stop], floor[start:stop])

    def buffer(self, slot: int, rows: int, columns: int) -> Floats:
        """The scratch array of a slot."""
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.size < rows * columns:
            buffer = self._buffers[slot] = np.empty(rows * columns, np.float32)
        return buffer[: rows * columns].reshape(rows, columns)


@dataclasses.dataclass(frozen=True)
class LogProbabilities:
    """Stored log-probabilities of some rows, expanded when they are needed (a `divergence.LogitBlocks`)."""

    base: LogitsBase
    codes: Codes
    scale: Floats
    floor: Floats

    @property
    def step(self) -> int:
        """Tokens of a block."""
        return min(self.base.layout.n_vocab, max(_MIN_WIDTH, min(_NUMBERS // len(self.codes), _MAX_WIDTH)))

    @property
    def count(self) -> int:
        """Blocks that make up the vocabulary."""
        return -(-self.base.layout.n_vocab // self.step)

    def block(self, index: int, slot: int) -> tuple[int, Floats]:
        """The first token id of a block and its log-probabilities, float32 [rows, block]; see `hidden.HeadLogits`."""
        first = index * self.step
        codes = self.codes[:, first : first + self.step]
        out = self.base.buffer(slot, *codes.shape)
        np.multiply(codes, self.scale[:, None], out=out)
        out += self.floor[:, None]
        np.copyto(out, _NOTHING, where=out <= _LEAST)
        return first, out


def compare_logits(lanes: Lanes, base: LogitsBase, count: int, progress: Progress = SILENT) -> TokenScores:
    """Compares as `token_scores.compare_with_base`, with the divergence of llama-perplexity from such a file.

    The sum S of the stored probabilities is not quite 1. llama-perplexity does not scale them: its figure is
    Σ p (ln p − ln q) = S (KL + ln S) with KL of p/S. The figure of a token can be slightly below 0.
    """
    scores = compare_with_base(lanes, base, count, progress)
    mass = np.concatenate([base.mass(chunk) for chunk in range(count)])
    return dataclasses.replace(scores, kld=mass * (scores.kld + np.log(mass)))


def open_logits(path: pathlib.Path, text: Text | None, settings: MeasureOptions, model: pathlib.Path) -> LogitsBase:
    """Opens a file of log-probabilities that must fit.

    Parameters:
        path: the file.
        text: the text to measure on; None takes the tokens of the file.
        settings: how to decode. If `chunks` is None all chunks of the file are used, as in llama-perplexity.
        model: one of the models to compare, for its tokenizer.

    Raises:
        BitladderError: the file is damaged or does not fit.
    """
    with Model(model, vocab_only=True) as vocabulary:
        base = LogitsBase(LogitsFile(path), _bos(vocabulary))
        try:
            check_logits(base, vocabulary, text, settings)
        except BaseException:
            base.close()
            raise
    return base


def check_logits(base: LogitsBase, model: Model, text: Text | None, settings: MeasureOptions) -> None:
    """Raises BitladderError that says what differs if the file does not fit a model, a text and settings.

    The file names neither its model nor its text, so the tokens of the text must be those in the file. Without a text
    they are not checked.
    """
    layout, name = base.layout, model.name
    if layout.n_vocab != model.n_vocab:
        raise BitladderError(
            f"{base.file.path} was made with a vocabulary of {layout.n_vocab} tokens, but {name} has {model.n_vocab}: "
            "they cannot be compared"
        )
    if layout.n_ctx != settings.n_ctx:
        raise BitladderError(f"{base.file.path} was made with -c {layout.n_ctx}, not {settings.n_ctx}")
    if base.chunks.bos != _bos(model):
        raise BitladderError(f"{name} begins a text with another token than the model {base.file.path} was opened for")
    if settings.chunks is not None and layout.chunks < settings.chunks:
        raise BitladderError(
            f"{base.file.path} has {number_of(layout.chunks, 'chunk')}, not {settings.chunks}; use --chunks "
            f"{layout.chunks}"
        )
    if text is not None:
        _check_text(base, model, text)


def _check_text(base: LogitsBase, model: Model, text: Text) -> None:
    layout, name = base.layout, model.name
    tokens = model.tokenize(text.text, parse_special=text.special)
    kept = base.chunks.tokens.reshape(-1)
    short = min(len(kept), len(tokens))
    different = np.flatnonzero(kept[:short] != tokens[:short])
    if not len(different) and short == len(kept):
        return
    first = int(different[0]) if len(different) else short
    chunk, position = divmod(first, layout.n_ctx)
    in_text = repr(model.detokenize([int(tokens[first])], special=True)) if first < len(tokens) else "the end"
    in_file = repr(model.detokenize([int(kept[first])], special=True))
    raise BitladderError(
        f"{base.file.path} was made of another text than {text.name}, or with another tokenizer than {name}'s: at "
        f"token {position} of chunk {chunk + 1} it has {in_file} and the text has {in_text}"
    )


def _bos(model: Model) -> int | None:
    return model.bos if model.add_bos and model.bos >= 0 else None
