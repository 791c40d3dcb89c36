"""Cutting a text into chunks of tokens, and choosing among them."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.engine.model import Model, Tokens
from bitladder.errors import BitladderError
from bitladder.options import Options, option
from bitladder.text.texts import Text


def text_chunks(
    model: Model,
    text: Text,
    n_ctx: int,
    *,
    chunks: int | None = None,
    from_chunk: int = 0,
    parse_special: bool = False,
    spread: bool = False,
) -> Tokens:
    """A text's chunks, int32 [chunks, n_ctx], with BOS in place of the first token where the vocabulary asks for it.

    `from_chunk` are skipped at the start of the text and at most `chunks` used: the first ones, as llama.cpp's tools
    do, or with `spread` as many at equal distances. Raises BitladderError if the text is too short.
    """
    tokens = model.tokenize(text.text, parse_special=parse_special)
    if len(tokens) < 2 * n_ctx:
        raise BitladderError(f"{text.name} has {len(tokens)} tokens; {2 * n_ctx} are needed for chunks of {n_ctx} (-c)")
    if from_chunk and (from_chunk + 2) * n_ctx >= len(tokens):
        raise BitladderError(f"{text.name} has {len(tokens) // n_ctx} chunks; --from-chunk {from_chunk} leaves too few")
    available = len(tokens) // n_ctx - from_chunk
    count = available if chunks is None else min(chunks, available)
    rows = tokens[: (from_chunk + available) * n_ctx].reshape(-1, n_ctx)[from_chunk:]
    rows = rows[spread_evenly(available, count) if spread else slice(count)].copy()
    if model.add_bos:
        rows[:, 0] = model.bos
    return rows


def spread_evenly(available: int, count: int) -> npt.NDArray[np.int64]:
    """`count` different numbers below `available`, in order: the middles of as many equal stretches."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * available // (2 * count)


@dataclasses.dataclass(frozen=True)
class Reading(Options):
    """Which chunks of each text are read, and how the text is tokenized."""

    chunks: int | None = option(
        None, "--chunks", least=1, metavar="N", help="Chunks of each text that are read.", unset="all"
    )
    from_chunk: int = option(
        0, "--from-chunk", "--chunk", least=0, metavar="N", help="Chunks that are skipped at the start of each text."
    )
    spread: bool = option(
        True, "--spread/--no-spread", help="Take the chunks from all over the text, not from its beginning."
    )
    parse_special: bool = option(
        False, "--parse-special", help='Read "<|im_end|>" and the like in the text as the tokens they name.'
    )

    def rows(self, model: Model, texts: Sequence[Text], n_ctx: int) -> Tokens:
        """The chunks of all texts, int32 [chunks, n_ctx]. Raises BitladderError for a text that is too short."""
        settings = dataclasses.asdict(self)
        return np.concatenate([text_chunks(model, text, n_ctx, **settings) for text in texts])
