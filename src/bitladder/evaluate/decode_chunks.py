"""Chunks of a text, cut and decoded as in llama-perplexity.

The whole text is tokenized at once and cut into chunks of `n_ctx` tokens; the rest is dropped. If the vocabulary asks
for BOS, BOS replaces the first token of a chunk when the chunk is decoded. Only the second half of a chunk is scored,
so every scored token has at least n_ctx/2 tokens before it.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitladder.engine.context import Context
from bitladder.engine.model import Model
from bitladder.errors import BitladderError
from bitladder.evaluate.settings import Settings
from bitladder.text.texts import Text

Tokens = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Tokens to score.

    Parameters:
        tokens: as they are in the text, int32 [chunks, n_ctx].
        bos: id that replaces the first token of each chunk when it is decoded; None replaces nothing.
        available: chunks in the whole text.
    """

    tokens: Tokens
    bos: int | None
    available: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_ctx(self) -> int:
        """Tokens of a chunk."""
        return int(self.tokens.shape[1])

    @property
    def first(self) -> int:
        """The first position with a scored prediction."""
        return self.n_ctx // 2

    @property
    def scored(self) -> int:
        """Scored tokens of a chunk: the predictions at positions first … n_ctx−2."""
        return self.n_ctx - 1 - self.first

    def inputs(self, chunk: int) -> Tokens:
        """A copy of the tokens to decode, int32 [n_ctx]."""
        row: Tokens = self.tokens[chunk].copy()
        if self.bos is not None:
            row[0] = self.bos
        return row

    def targets(self, chunk: int) -> Tokens:
        """The tokens to predict, int32 [scored]."""
        row: Tokens = self.tokens[chunk, self.first + 1 :]
        return row

    def head(self, count: int) -> "Chunks":
        """The first `count` chunks."""
        return dataclasses.replace(self, tokens=self.tokens[:count])


def cut(model: Model, text: Text, settings: Settings) -> Chunks:
    """Tokenizes a text and cuts it into chunks. Raises BitladderError if the text has fewer than two chunks."""
    n_ctx = settings.n_ctx
    tokens = model.tokenize(text.text)
    if len(tokens) < 2 * n_ctx:
        raise BitladderError(
            f"the text {text.name} has {len(tokens)} tokens, but a context of {n_ctx} needs at least {2 * n_ctx}; "
            "use a longer text or a smaller --ctx-size"
        )
    available = len(tokens) // n_ctx
    count = settings.limit(available)
    bos = model.bos if model.add_bos and model.bos >= 0 else None
    return Chunks(tokens[: count * n_ctx].reshape(count, n_ctx), bos, available)


def decode(context: Context, chunks: Chunks, chunk: int) -> Iterator[tuple[int, Floats]]:
    """Decodes a chunk from an empty context, in batches of the context's n_batch.

    Yields:
        For each batch with scored positions, the number of scored rows before it and its logits, float32
        [rows, n_vocab]. The logits are a view of native memory, valid until the next step.
    """
    context.clear()
    inputs = chunks.inputs(chunk)
    positions = np.arange(chunks.n_ctx, dtype=np.int32)
    outputs = (positions >= chunks.first) & (positions < chunks.n_ctx - 1)
    for start in range(0, chunks.n_ctx, context.n_batch):
        stop = min(start + context.n_batch, chunks.n_ctx)
        part = slice(start, stop)
        count = int(outputs[part].sum())
        context.decode(inputs[part], positions[part], np.zeros(stop - start, np.int32), outputs[part])
        if count:
            yield max(start - chunks.first, 0), context.logits()
