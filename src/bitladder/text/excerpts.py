"""Texts made from texts: passages of a long one, the ends set apart, and several joined."""

from collections.abc import Sequence

from bitladder.text.texts import Text

CHARACTERS = 8  # of a token: passages of so many characters for each token hold enough tokens
HELD_OUT = 0.1  # share of each text that `set_apart` takes from its end


def excerpts(text: Text, chunks: int, n_ctx: int, *, offset: float = 0.0) -> Text:
    """Passages spread evenly over a text, long enough together for some chunks. Each begins with a line.

    Parameters:
        text: the text. A text that is short is returned whole.
        chunks: chunks that the passages hold.
        n_ctx: tokens of a chunk.
        offset: moves all passages, in distances between two passages, 0 … 1. Passages of two offsets do not overlap if
            the text is long enough.
    """
    count = chunks + 1
    length = n_ctx * CHARACTERS
    if len(text.text) <= count * length * 2:
        return text
    stride = len(text.text) / count
    passages = []
    for index in range(count):
        start = int((index + offset) * stride)
        line = text.text.find("\n", start, start + length)
        start = line + 1 if line >= 0 else start
        passages.append(text.text[start : start + length].strip("\n"))
    return Text.of(f"{text.name} ({count} passages)", "\n\n".join(passages))


def joined(texts: Sequence[Text]) -> Text:
    """Several texts as one, with an empty line between two."""
    if len(texts) == 1:
        return texts[0]
    return Text.of(" + ".join(text.name for text in texts), "\n\n".join(text.text for text in texts))


def set_apart(texts: Sequence[Text], share: float = HELD_OUT) -> tuple[list[Text], Text]:
    """Each text without its end, and the ends joined, which are then held out.

    Parameters:
        texts: the texts.
        share: share of the characters of each text that is its end, 0 … 1.
    """
    beginnings: list[Text] = []
    ends: list[Text] = []
    for text in texts:
        cut = int(len(text.text) * (1 - share))
        beginnings.append(Text.of(text.name, text.text[:cut]))
        ends.append(Text.of(text.name, text.text[cut:]))
    return beginnings, joined(ends)
