"""A short text that has a little of everything in a long one."""

from bitladder.files import sha256_bytes
from bitladder.text.texts import Text

CHARACTERS = 8  # of a token, at most, as a rule: enough text for the chunks wanted


def excerpts(text: Text, chunks: int, n_ctx: int, *, offset: float = 0.0) -> Text:
    """Passages spread evenly over a text, together long enough for `chunks` chunks of `n_ctx` tokens.

    Each begins with a line. `offset`, a fraction of the distance between two passages, moves all of them: passages
    of other offsets do not overlap if the text is long enough. A text that is short is returned whole.
    """
    count = chunks + 1
    length = n_ctx * CHARACTERS
    if len(text.text) <= count * length * 2:
        return text
    stride = len(text.text) / count
    parts = []
    for index in range(count):
        start = int((index + offset) * stride)
        line = text.text.find("\n", start, start + length)
        start = line + 1 if line >= 0 else start
        parts.append(text.text[start : start + length].strip("\n"))
    joined = "\n\n".join(parts)
    data = joined.encode("utf-8", "surrogateescape")
    return Text(f"{text.name} ({count} passages)", joined, sha256_bytes(data))
