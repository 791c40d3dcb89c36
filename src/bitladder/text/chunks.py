"""A text as tokens, cut into chunks, as llama.cpp's tools cut it.

The whole text is tokenized at once and cut into chunks of `n_ctx` tokens. The rest at the end is dropped. Where the
vocabulary asks for BOS, BOS takes the place of the first token of a chunk when the chunk is decoded. llama-perplexity
scores only the second half of a chunk, so that every scored token has at least n_ctx/2 tokens before it.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.options import Options, option
from bitladder.text.texts import Text
from bitladder.units import number_of

if TYPE_CHECKING:  # texts need no native library
    from bitladder.engine import Model

Tokens = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)
MIN_CHUNKS = 2  # of a text, as llama-perplexity has it


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Chunks of a text.

    Parameters:
        tokens: token ids as the text has them, int32, shape [chunks, n_ctx].
        bos: id that replaces the first token of each chunk when the chunk is decoded, or None.
        available: chunks that the text has, of which these are some.
        answers: whether each token is of an answer, bool, shape [chunks, n_ctx]; None if all tokens count.
        unscored: how many predictions at the start of a chunk are not scored; None for those of its first half.
    """

    tokens: Tokens
    bos: int | None
    available: int
    answers: Flags | None = None
    unscored: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_ctx(self) -> int:
        """Tokens of a chunk."""
        return int(self.tokens.shape[1])

    @property
    def first(self) -> int:
        """The first position whose prediction is scored."""
        return self.n_ctx // 2 if self.unscored is None else self.unscored

    @property
    def scored(self) -> int:
        """Scored tokens of a chunk: the predictions at positions first … n_ctx−2."""
        return self.n_ctx - 1 - self.first

    def inputs(self, chunk: int | slice = slice(None)) -> Tokens:
        """The tokens to decode, a copy: int32, shape [n_ctx] of one chunk, or [chunks, n_ctx] of several or all."""
        tokens: Tokens = self.tokens[chunk].copy()
        if self.bos is not None:
            tokens[..., 0] = self.bos
        return tokens

    def targets(self, chunk: int) -> Tokens:
        """The tokens whose predictions are scored, int32, shape [scored]."""
        tokens: Tokens = self.tokens[chunk, self.first + 1 :]
        return tokens

    def head(self, count: int) -> "Chunks":
        """The first `count` chunks."""
        answers = None if self.answers is None else self.answers[:count]
        return dataclasses.replace(self, tokens=self.tokens[:count], answers=answers)

    @property
    def counted(self) -> Flags:
        """Which scored tokens count, bool, shape [chunks, scored]."""
        if self.answers is None:
            return np.ones((len(self), self.scored), bool)
        return self.answers[:, self.first + 1 :]


def text_chunks(
    model: "Model",
    text: Text,
    n_ctx: int,
    *,
    chunks: int | None = None,
    from_chunk: int = 0,
    spread: bool = False,
    parse_special: bool = False,
    unscored: int | None = None,
) -> Chunks:
    """Tokenizes a text and cuts it into chunks.

    Parameters:
        model: the model whose vocabulary is used.
        text: the text.
        n_ctx: tokens of a chunk.
        chunks: chunks at most; None takes all.
        from_chunk: chunks that are skipped at the start of the text.
        spread: whether the chunks lie at equal distances; otherwise they are the first ones, as in llama.cpp's tools.
        parse_special: whether "<|im_end|>" and the like in the text are read as the tokens that they name.
        unscored: as of `Chunks`.

    Raises:
        BitladderError: the text has fewer than two chunks, or fewer than two are left behind `from_chunk`; or it is
            conversations that nobody has rendered.
    """
    if text.conversations:
        raise BitladderError(f"{text.name} holds conversations, which cannot be used here; name a plain text")
    tokens = model.tokenize(text.text, parse_special=parse_special or text.special)
    if len(tokens) < MIN_CHUNKS * n_ctx:
        raise BitladderError(
            f"the text {text.name} has {number_of(len(tokens), 'token')}, but chunks of {n_ctx} tokens need at least "
            f"{MIN_CHUNKS * n_ctx:,}; take a longer text or a smaller --ctx-size (-c)"
        )
    available = len(tokens) // n_ctx - from_chunk
    if from_chunk and (from_chunk + MIN_CHUNKS) * n_ctx >= len(tokens):
        raise BitladderError(
            f"the text {text.name} has {number_of(len(tokens) // n_ctx, 'chunk')} of {n_ctx} tokens; --from-chunk "
            f"{from_chunk} leaves too few"
        )
    count = available if chunks is None else min(chunks, available)
    chosen = spread_evenly(available, count) if spread else slice(count)

    def cut(values: npt.NDArray[T]) -> npt.NDArray[T]:
        return values[: (from_chunk + available) * n_ctx].reshape(-1, n_ctx)[from_chunk:][chosen]

    answers = None if text.answers is None else cut(answer_tokens(model, text, tokens))
    bos = model.bos if model.add_bos and model.bos >= 0 else None
    return Chunks(cut(tokens), bos, available, answers, unscored)


def answer_tokens(model: "Model", text: Text, tokens: Tokens) -> Flags:
    """Whether each token has its first byte in an answer, bool, shape [tokens].

    The bytes that tokens stand for follow one another in the text, but for blanks that a tokenizer puts in, and BOS.

    Parameters:
        model: the model whose vocabulary is used.
        text: the text, with its answers.
        tokens: the tokens of the text, int32.

    Raises:
        BitladderError: the tokenizer changes the text, so that no place is known.
    """
    data = text.text.encode("utf-8", "surrogateescape")
    inside = np.zeros(len(data) + 1, bool)
    seen = byte = 0  # characters up to here have so many bytes
    for start, end in text.answers or ():
        byte += len(text.text[seen:start].encode("utf-8", "surrogateescape"))
        size = len(text.text[start:end].encode("utf-8", "surrogateescape"))
        inside[byte : byte + size] = True
        seen, byte = end, byte + size
    pieces: dict[int, bytes] = {}
    places = np.empty(len(tokens), np.int64)
    place = 0
    for number, token in enumerate(tokens.tolist()):
        piece = pieces.get(token)
        if piece is None:
            piece = pieces[token] = model.piece(token)
        places[number] = place
        if data.startswith(piece, place):
            place += len(piece)
        elif piece.startswith(b" ") and data.startswith(piece[1:], place):
            place += len(piece) - 1
        elif number:
            raise BitladderError(
                f"{model.path.name}: its tokenizer changes the text, so that tokens of answers cannot be told; leave "
                "--assistant-only out"
            )
    return inside[places]


def spread_evenly(available: int, count: int) -> npt.NDArray[np.int64]:
    """The middles of `count` equal stretches of the numbers below `available`, in order.

    Example:
        >>> spread_evenly(10, 3).tolist()
        [1, 5, 8]
    """
    return (2 * np.arange(count, dtype=np.int64) + 1) * available // (2 * count)


@dataclasses.dataclass(frozen=True)
class Reading(Options):
    """Which chunks of each text are read, and how the text is tokenized."""

    GROUP = "Text"

    chunks: int | None = option(
        None, "--chunks", least=1, metavar="N", help="Chunks of each text that are read.", unset="all"
    )
    from_chunk: int = option(
        0, "--from-chunk", "--chunk", least=0, metavar="N", help="Chunks that are skipped at the start of each text."
    )
    spread: bool = option(
        True, "--spread/--no-spread", help="Spread the chunks over the text. Do not take them from its beginning."
    )
    parse_special: bool = option(
        False, "--parse-special", help='Read "<|im_end|>" and the like in the text as the tokens they name.'
    )
    expert_coverage: int | None = option(
        None,
        "--expert-coverage",
        least=1,
        metavar="N",
        help="Read on until each expert has N tokens, or the texts end.",
        unset="only the chunks that --chunks names",
    )

    def rows(self, model: "Model", texts: Sequence[Text], n_ctx: int) -> Tokens:
        """The tokens to decode of all texts, int32, shape [chunks, n_ctx].

        Raises BitladderError for a text that is too short.
        """
        return np.concatenate(self.rows_by_text(model, texts, n_ctx))

    def rows_by_text(self, model: "Model", texts: Sequence[Text], n_ctx: int) -> list[Tokens]:
        """The tokens of each text, as `rows` has them together."""
        return [self._chunks(model, text, n_ctx).inputs() for text in texts]

    def further(self, model: "Model", texts: Sequence[Text], n_ctx: int) -> Tokens:
        """The chunks that `rows` leaves, a chunk of each text after the other, int32, shape [chunks, n_ctx]."""
        left, places = [], []
        for text in texts:
            whole = self.replace(chunks=None, spread=False)._chunks(model, text, n_ctx)
            count = len(whole) if self.chunks is None else min(self.chunks, len(whole))
            read = spread_evenly(len(whole), count) if self.spread else slice(count)
            left.append(np.delete(whole.inputs(), read, axis=0))
            places.append(np.arange(len(left[-1])))
        order = np.argsort(np.concatenate(places), kind="stable")
        return np.asarray(np.concatenate(left)[order])

    def _chunks(self, model: "Model", text: Text, n_ctx: int) -> Chunks:
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "expert_coverage"}
        return text_chunks(model, text, n_ctx, **settings)
