"""Texts to calibrate on and to measure with: loaded, and made from others (passages, ends set apart).

A text is a file that the user names, conversations in such a file (`chat`), rows of a data set of the hub, or one of
two built-in texts: `pydoc:calibration` and `pydoc:test`. These are made from `pydoc_data.topics`, the reference of the
language that comes with every CPython, so that a first run needs no download. The two share no paragraph.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Self

from bitladder import hub
from bitladder.errors import BitladderError, UsageError, nearest
from bitladder.files import close_paths, sha256_bytes
from bitladder.keys import Algorithm
from bitladder.options import option
from bitladder.text.chat import (
    LISTS,
    ChatTemplate,
    Conversation,
    chat_sha256,
    conversation,
    is_chat,
    read_conversations,
    rendered_text,
)
from bitladder.text.file_content import parquet_column, plain_text
from bitladder.units import number_of

BUILTIN = ("pydoc:calibration", "pydoc:test")
CHARACTERS = 8  # of a token: passages of so many characters for each token hold enough tokens
EXCERPTS = Algorithm(
    "excerpts",
    (
        "passages are spread evenly over a text, and those of several texts take turns",
        "their order spreads any beginning over the texts: the chunks that are read were all of the first half before",
    ),
)
PARQUET, TEXT_COLUMN = ".parquet", "text"
MOST = 16 << 20  # characters that are read of the rows of a data set
HELD_OUT = 0.1  # share of each text that `set_apart` takes from its end


@dataclasses.dataclass(frozen=True)
class Text:
    """A text.

    Parameters:
        name: the name in reports, never a path.
        text: the characters. Bytes that are not UTF-8 are kept as surrogate escapes, so that the tokenizer sees the
            bytes of the file. One newline at the very end is dropped, as llama.cpp's tools do.
        sha256: SHA-256 of the bytes, in hexadecimal digits; of a text whose special tokens are parsed `chat_sha256`.
        special: whether "<|im_end|>" and the like in it are always read as the tokens that they name.
        answers: of conversations, the only characters whose tokens are scored (the first, and the one after the last of
            each answer); None scores all.
        conversations: conversations that no model has rendered yet. `text` has their contents, to judge the length.
    """

    name: str
    text: str
    sha256: str
    special: bool = False
    answers: tuple[tuple[int, int], ...] | None = None
    conversations: tuple[Conversation, ...] = dataclasses.field(default=(), repr=False)

    @classmethod
    def of(cls, name: str, text: str, *, special: bool = False) -> Self:
        """A text of these characters."""
        digest = chat_sha256(text) if special else sha256_bytes(text.encode("utf-8", "surrogateescape"))
        return cls(name, text, digest, special)

    def rendered(self, model: pathlib.Path, *, assistant_only: bool = False) -> "Text":
        """Conversations as text, in the chat template of a GGUF. Any other text stays as it is.

        Parameters:
            model: the file with the template.
            assistant_only: whether only answers are scored.

        Raises:
            BitladderError: the model has no template, or it fails (`chat.ChatTemplate.render`).
        """
        if not self.conversations:
            return self
        text, answers = rendered_text(self.conversations, ChatTemplate.of(model), answers=assistant_only)
        return dataclasses.replace(Text.of(self.name, text, special=True), answers=answers)


def answers_option(**more: Any) -> Any:
    """The option --assistant-only, which several commands have; `more` as for `options.option`."""
    words = "Score only the answers. Every text must be conversations (.jsonl, .json)."
    return option(False, "--assistant-only", help=words, **more)


def load_text(spec: str, model: pathlib.Path | None = None, *, assistant_only: bool = False) -> Text:
    """Loads "pydoc:calibration", "pydoc:test", a file, or a data set of the hub ("hf://datasets/OWNER/NAME").

    Parameters:
        spec: the text. A file that ends in .jsonl or .json holds conversations; rows of parquet are conversations or
            texts. Of these some 16 million characters are read, and only the files that they need.
        model: the GGUF whose chat template renders conversations. Without one they stay as they are.
        assistant_only: whether only the answers of conversations are scored.

    Raises:
        BitladderError: the text is empty or not text; or as `Text.rendered`.
        UsageError: there is no such file or text; or `assistant_only`, and the text has no answers.
    """
    text = _load(spec)
    if assistant_only and not text.conversations:
        raise UsageError(f"--assistant-only needs conversations (.jsonl, .json, .parquet); {text.name} has none")
    return text if model is None else text.rendered(model, assistant_only=assistant_only)


def _load(spec: str) -> Text:
    if spec in BUILTIN:
        text = builtin_text(spec.removeprefix("pydoc:"))
        return Text(spec, text.removesuffix("\n"), sha256_bytes(text.encode()))
    if spec.startswith(hub.DATA_SETS):
        return _of_hub(hub.data_files(spec))
    path = pathlib.Path(spec)
    if path.suffix.lower() == PARQUET and path.is_file():
        return _of_parquet([path], path.name, None)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the text {spec}: {reason}{_way_out(spec)}") from error
    if not data.strip():
        raise BitladderError(f"the text {spec} is empty")
    if is_chat(path):
        conversations = read_conversations(path, data)
        contents = "\n".join(content for part in conversations for content in part.contents)
        return Text(path.name, contents, sha256_bytes(data), conversations=conversations)
    text = plain_text(data, f"the text {spec}").removesuffix("\n")
    return Text(path.name, text, sha256_bytes(data))


def _way_out(spec: str) -> str:
    """What may be meant by a text that is not there."""
    if spec in hub.TEXTS:
        return f"; fetch it with: bitladder texts fetch {spec}"
    if close := nearest(spec, BUILTIN, least=0.75):
        return f"; did you mean {' or '.join(close)}?"
    return close_paths(spec) or f" (a file, {' or '.join(BUILTIN)}, or {hub.DATA_FORM} of the hub)"


def _of_hub(data: hub.DataFiles) -> Text:
    """The text of a data set of the hub: its rows, or those of its files that are no parquet."""
    name = f"{data.repository}@{data.revision[:8]}"
    if data.files[0].endswith(PARQUET):
        return _of_parquet(data.fetch(), name, data.column)
    if data.column or len(data.files) > 1:
        raise UsageError(f"{data.files[0]} of {data.repository} is not parquet: name one such file, without a column")
    text = _load(str(next(data.fetch())))
    return dataclasses.replace(text, name=f"{name}/{data.files[0]}")


def _of_parquet(paths: Iterable[pathlib.Path], name: str, column: str | None) -> Text:
    """The rows of parquet files: conversations, or texts that follow one another; at most MOST characters of them."""
    conversations: list[Conversation] = []
    parts: list[str] = []
    for where, chosen, row in parquet_column(paths, name, column, (*LISTS, TEXT_COLUMN), MOST):
        value = row[chosen]
        if isinstance(value, str):
            parts += [value if value.endswith("\n") else f"{value}\n\n"] if value else []
        elif value is not None:
            conversations.append(conversation(where, {**row, LISTS[0]: value}))
    if conversations and parts:
        raise BitladderError(f"{name} has both texts and conversations in one column")
    text = "\n".join(content for part in conversations for content in part.contents) or "".join(parts).rstrip("\n")
    if not text.strip():
        raise BitladderError(f"the text {name} is empty")
    if not conversations:
        return Text.of(name, text)
    messages = json.dumps([[part.messages, part.more] for part in conversations], sort_keys=True)
    return Text(name, text, sha256_bytes(messages.encode()), conversations=tuple(conversations))


def load_texts(specs: Sequence[str], model: pathlib.Path | None = None, *, assistant_only: bool = False) -> list[Text]:
    """Loads several texts to measure on, as `load_text`. Texts of the same name get a number.

    Raises UsageError if two of them are the same text.
    """
    texts: list[Text] = []
    for text in (load_text(spec, model, assistant_only=assistant_only) for spec in specs):
        if same := next((other for other in texts if other.sha256 == text.sha256), None):
            raise UsageError(f"the texts {same.name} and {text.name} are the same: name each text once")
        number, names = 1, {other.name for other in texts}
        while (name := text.name if number == 1 else f"{text.name} ({number})") in names:
            number += 1
        texts.append(dataclasses.replace(text, name=name))
    return texts


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


@EXCERPTS.entry
def excerpts(texts: Sequence[Text], chunks: int, n_ctx: int, *, offset: float = 0.0) -> Text:
    """Passages spread evenly over each text, long enough together for some chunks. Each begins with a line.

    A passage has characters for more tokens than a chunk, so the chunks are a beginning of the result. Any beginning is
    spread over each text. Of several texts each gives as many passages, as far as it is long enough, and they take
    turns.

    Parameters:
        texts: the texts. A single text that is short is returned whole.
        chunks: chunks that the passages hold.
        n_ctx: tokens of a chunk.
        offset: moves all passages, in distances between two passages, 0 … 1. Passages of two offsets do not overlap if
            the texts are long enough.
    """
    count, length = chunks + 1, n_ctx * CHARACTERS
    if len(texts) == 1 and len(texts[0].text) <= count * length * 2:
        return texts[0]
    shares = _shares(count, [-(-len(text.text) // length) for text in texts])
    parts = [_passages(text.text, share, length, offset) for text, share in zip(texts, shares, strict=True)]
    passages = [passage for turn in itertools.zip_longest(*parts) for passage in turn if passage]
    names = " + ".join(text.name for text in texts)
    special = any(text.special for text in texts)
    return Text.of(f"{names} ({number_of(len(passages), 'passage')})", "\n\n".join(passages), special=special)


def _shares(count: int, most: Sequence[int]) -> list[int]:
    """`count` passages divided among texts as evenly as the most that each can give allows."""
    shares = [0] * len(most)
    while sum(shares) < min(count, sum(most)):
        least = min((share, place) for place, share in enumerate(shares) if share < most[place])
        shares[least[1]] += 1
    return shares


def _passages(text: str, count: int, length: int, offset: float) -> list[str]:
    """Passages of so many characters, spread evenly over a text. Any beginning of them is spread over it too.

    Source of the order: van der Corput's sequence, the numbers by their bits in reverse.
    """
    passages = []
    for index in sorted(range(count), key=lambda number: f"{number:064b}"[::-1]):
        start = int((index + offset) * len(text) / count)
        line = text.find("\n", start, start + length)
        start = line + 1 if line >= 0 else start
        passages.append(text[start : start + length].strip("\n"))
    return passages


def set_apart(texts: Sequence[Text], share: float = HELD_OUT) -> tuple[list[Text], list[Text]]:
    """Each text without its end, and the ends, which are then held out.

    Parameters:
        texts: the texts.
        share: share of the characters of each text that is its end, 0 … 1.
    """
    beginnings: list[Text] = []
    ends: list[Text] = []
    for text in texts:
        cut = int(len(text.text) * (1 - share))
        beginnings.append(Text.of(text.name, text.text[:cut], special=text.special))
        ends.append(Text.of(text.name, text.text[cut:], special=text.special))
    return beginnings, ends
