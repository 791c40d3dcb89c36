"""Texts to calibrate on and to measure with: loaded, and made from others (passages, ends set apart, several joined).

A text is a file that the user names, or one of two built-in texts: `pydoc:calibration` and `pydoc:test`. These are
made from `pydoc_data.topics`, the language reference that comes with every CPython, so that a first run needs no
download. The two share no paragraph.
"""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Sequence
from typing import Self

from bitladder.errors import BitladderError
from bitladder.files import sha256_bytes
from bitladder.text.plain import plain_text

BUILTIN = ("pydoc:calibration", "pydoc:test")
CHARACTERS = 8  # of a token: passages of so many characters for each token hold enough tokens
HELD_OUT = 0.1  # share of each text that `set_apart` takes from its end


@dataclasses.dataclass(frozen=True)
class Text:
    """A text.

    Parameters:
        name: the name in reports, never a path.
        text: the characters. Bytes that are not UTF-8 are kept as surrogate escapes, so that the tokenizer sees the
            bytes of the file. One newline at the very end is dropped, as llama.cpp's tools do.
        sha256: SHA-256 of the bytes, in hexadecimal digits.
    """

    name: str
    text: str
    sha256: str

    @classmethod
    def of(cls, name: str, text: str) -> Self:
        """A text of these characters."""
        return cls(name, text, sha256_bytes(text.encode("utf-8", "surrogateescape")))


def load_text(spec: str) -> Text:
    """Loads "pydoc:calibration", "pydoc:test" or a file.

    Raises BitladderError if there is no such file or text, or if it is empty or not text.
    """
    if spec in BUILTIN:
        text = builtin_text(spec.removeprefix("pydoc:"))
        return Text(spec, text.removesuffix("\n"), sha256_bytes(text.encode()))
    path = pathlib.Path(spec)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        known, reason = " or ".join(BUILTIN), getattr(error, "strerror", None) or error
        raise BitladderError(f"cannot read the text {spec}: {reason} (a file, {known})") from error
    if not data.strip():
        raise BitladderError(f"the text {spec} is empty")
    text = plain_text(data, f"the text {spec}").removesuffix("\n")
    return Text(path.name, text, sha256_bytes(data))


@functools.cache
def _halves() -> tuple[str, str]:
    from pydoc_data.topics import topics

    # A hash of its name puts a topic into a half, so that another Python version moves none of them. Some topics repeat
    # paragraphs of others word for word: each paragraph is used once.
    seen: set[str] = set()
    halves: dict[int, list[str]] = {0: [], 1: []}
    ordered = sorted(topics, key=lambda name: (-_half(name), name))
    for name in ordered:
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                halves[_half(name)].append(paragraph.strip("\n"))
    return "\n\n".join(halves[0]) + "\n", "\n\n".join(halves[1]) + "\n"


def _half(topic: str) -> int:
    """1 for the test half, 0 for the calibration half."""
    return zlib.crc32(topic.encode()) & 1


def builtin_text(half: str) -> str:
    """One half of Python's language reference: "calibration" or "test". Raises KeyError for another word.

    The text depends on the Python version that runs. Its hash is recorded wherever it is used.
    """
    return _halves()[{"calibration": 0, "test": 1}[half]]


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
